"""The dry run: what would be asked, in the exact words, and what it would cost."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from onediff.config import Config, Runtime
from onediff.data.writer.endpoint import shown_url
from onediff.data.writer.jobs import Stage, jobs
from onediff.data.writer.price import Tokens, bound, guess
from onediff.data.writer.request import Request
from onediff.data.writer.store import answers_path, read_answers, spent_usd

NUM_SHOWN = 3
_DATA_URI = re.compile(r"(data:image/jpeg;base64,[^\"]{24})[^\"]+")


def plan(source: str, config: Config, runtime: Runtime, *, stage: Stage = "write") -> dict[str, Any]:
    """Nothing is sent. `requests` are the first ones as they would go out; `usd` is None where a price is unknown.

    Raises ValueError and FileNotFoundError as the stage would.
    """
    answers = read_answers(answers_path(source, stage))
    counts = {"jobs": 0, "unfit": 0, "answered": 0, "to_ask": 0}
    expected, most = Tokens(0, 0), Tokens(0, 0)
    first: list[dict[str, Any]] = []
    seen: set[str] = set()
    for job in jobs(source, config, stage):
        counts["jobs"] += 1
        if not isinstance(job, Request):
            counts["unfit"] += 1
        elif job.key in answers:
            counts["answered"] += 1
        elif job.key not in seen:
            seen.add(job.key)
            counts["to_ask"] += 1
            expected, most = _sum(expected, guess(job)), _sum(most, bound(job))
            first += [_exact(job, runtime)] if len(first) < NUM_SHOWN else []
    return {"source": source, "stage": stage, "url": shown_url(runtime), **counts,
            "tokens": {"expected": asdict(expected), "at_most": asdict(most)},
            "usd": {"expected": _price(expected, runtime), "at_most": _price(most, runtime), "spent": spent_usd(),
                    "cap": runtime.writer_max_usd},
            "requests": first}


def as_text(plan: dict[str, Any]) -> str:
    """For people; images are cut short here, but not in the plan itself."""
    tokens, usd = plan["tokens"], plan["usd"]
    lines = [f"{plan['source']} ({plan['stage']}), {plan['url']}: {plan['jobs']:,} to be written, of which "
             f"{plan['answered']:,} are answered, {plan['unfit']:,} cannot be asked about, {plan['to_ask']:,} requests "
             "would go out",
             f"tokens: about {tokens['expected']['input']:,} in and {tokens['expected']['output']:,} out, at most "
             f"{tokens['at_most']['input']:,} and {tokens['at_most']['output']:,}"]
    if usd["expected"] is None:
        lines.append("cost: unknown; set writer_usd_per_million_input and ..._output in runtime.yaml")
    else:
        lines.append(f"cost: about {usd['expected']:.4f} USD, at most {usd['at_most']:.4f}; spent so far "
                     f"{usd['spent']:.4f} of writer_max_usd {usd['cap']:g}")
    for number, request in enumerate(plan["requests"], 1):
        shown = _DATA_URI.sub(r"\1...", json.dumps(request, indent=1, ensure_ascii=False))
        lines.append(f"request {number}:\n{shown}")
    return "\n".join(lines)


def _exact(request: Request, runtime: Runtime) -> dict[str, Any]:
    headers = {"Authorization": "Bearer ***", "Content-Type": "application/json", "Idempotency-Key": request.key}
    try:
        body = request.body()
    except ValueError as error:
        return {"name": request.name, "unreadable": str(error)}
    return {"name": request.name, "url": f"{shown_url(runtime).rstrip('/')}/chat/completions", "headers": headers,
            "body": body}


def _sum(left: Tokens, right: Tokens) -> Tokens:
    return Tokens(left.input + right.input, left.output + right.output)


def _price(tokens: Tokens, runtime: Runtime) -> float | None:
    if None in (runtime.writer_usd_per_million_input, runtime.writer_usd_per_million_output):
        return None
    return tokens.usd(runtime)
