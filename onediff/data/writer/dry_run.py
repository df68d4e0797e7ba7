"""The dry run: shows the exact requests that a stage would send to the writer, and what they would cost."""

import json
import re
from collections import Counter
from dataclasses import asdict
from typing import Any

from onediff.config import Config, Runtime
from onediff.data.writer.answers import answers_path, read_answers, spent_usd
from onediff.data.writer.endpoint import shown_url
from onediff.data.writer.jobs import Stage, jobs
from onediff.data.writer.request import Request, Tokens, expected_tokens, max_tokens

NUM_SHOWN = 3
_DATA_URI = re.compile(r"(data:image/jpeg;base64,[^\"]{24})[^\"]+")


def plan(source: str, config: Config, runtime: Runtime, *, stage: Stage = "write") -> dict[str, Any]:
    """Count the requests, tokens and US dollars that a stage would need, without sending anything.

    The key `requests` of the result contains the first few requests exactly as they would be sent. The costs in `usd`
    are None if a price is not set. Raises the ValueError or FileNotFoundError that the stage itself would raise.
    """
    answers = read_answers(answers_path(source, stage))
    counts = Counter(jobs=0, unfit=0, answered=0, to_ask=0)
    tokens = {"expected": Tokens(0, 0), "at_most": Tokens(0, 0)}
    requests: list[dict[str, Any]] = []
    keys: set[str] = set()
    for job in jobs(source, config, stage):
        counts["jobs"] += 1
        if not isinstance(job, Request):
            counts["unfit"] += 1
        elif job.key in answers:
            counts["answered"] += 1
        elif job.key not in keys:
            keys.add(job.key)
            counts["to_ask"] += 1
            tokens["expected"] += expected_tokens(job)
            tokens["at_most"] += max_tokens(job)
            requests += [_exact(job, runtime)] if len(requests) < NUM_SHOWN else []
    prices_known = None not in (runtime.writer_usd_per_million_input, runtime.writer_usd_per_million_output)
    return {"source": source, "stage": stage, "url": shown_url(runtime), **counts,
            "tokens": {name: asdict(number) for name, number in tokens.items()},
            "usd": {name: number.usd(runtime) if prices_known else None for name, number in tokens.items()}
            | {"spent": spent_usd(), "cap": runtime.writer_max_usd},
            "requests": requests}


def _exact(request: Request, runtime: Runtime) -> dict[str, Any]:
    headers = {"Authorization": "Bearer ***", "Content-Type": "application/json", "Idempotency-Key": request.key}
    try:
        return {"name": request.name, "url": f"{shown_url(runtime).rstrip('/')}/chat/completions", "headers": headers,
                "body": request.body()}
    except ValueError as error:
        return {"name": request.name, "unreadable": str(error)}


def as_text(plan: dict[str, Any]) -> str:
    """Format the plan of a dry run as text for the terminal, and shorten the encoded images in it."""
    tokens, usd = plan["tokens"], plan["usd"]
    cost = "cost: unknown; set writer_usd_per_million_input and writer_usd_per_million_output in runtime.yaml"
    if usd["expected"] is not None:
        cost = (f"cost: about {usd['expected']:.4f} USD, at most {usd['at_most']:.4f}; spent so far "
                f"{usd['spent']:.4f} of writer_max_usd {usd['cap']:g}")
    shown = [_DATA_URI.sub(r"\1...", json.dumps(request, indent=1, ensure_ascii=False)) for request in plan["requests"]]
    return "\n".join([
        f"{plan['source']} ({plan['stage']}), {plan['url']}: {plan['jobs']:,} texts to be written, of which "
        f"{plan['answered']:,} have a stored answer and {plan['unfit']:,} lack what a request needs; "
        f"{plan['to_ask']:,} requests would be sent",
        f"tokens: about {tokens['expected']['input']:,} in and {tokens['expected']['output']:,} out, at most "
        f"{tokens['at_most']['input']:,} and {tokens['at_most']['output']:,}",
        cost, *(f"request {number}:\n{text}" for number, text in enumerate(shown, 1))])
