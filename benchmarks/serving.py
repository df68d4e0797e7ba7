"""Measures `onediff serve`: start, throughput, wrong requests, memory and changes of the champion; one table.

    python -m benchmarks.serving                            # every row; about half an hour on two cores
    python -m benchmarks.serving --part throughput          # one row
    python -m benchmarks.serving --write                    # write the table into docs/serving.md

The pairs are generated scenes. The clients run in this process, on the same machine as the server. Rows that compare
two programs measure both in turns. `--share 0.1` sends a tenth of the requests, for a first look.
"""

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from typer import Option

from benchmarks import load, script, servers
from benchmarks.load import Message, Reply
from onediff.config import load_params
from onediff.data.synthesis.scenes.records import scene_records
from onediff.inputs.images import open_image
from onediff.library_logs import silence_libraries
from onediff.ops.predict import folder_of
from onediff.paths import CHAMPION

PAGE = script.ROOT / "docs/serving.md"
NUM_PAIRS = 40
CLIENTS = 20
MARGIN = 1e-3  # A smaller difference between the two most probable tokens may give another caption in another batch.


@dataclass
class Bench:
    """The model that is served, the share of the requests to send, and the pairs with their captions."""

    model: str
    share: float
    peak: float = field(default=0.0, init=False)  # requests per second of 20 clients

    @cached_property
    def folder(self) -> Path:
        return folder_of(self.model)

    @cached_property
    def captioner(self) -> Any:
        silence_libraries()
        from onediff.model.captioner import Captioner

        return Captioner.load(self.folder)

    @cached_property
    def files(self) -> list[tuple[bytes, bytes]]:
        """Return the image files of the first pairs of generated scenes."""
        config = load_params(script.ROOT / "presets/tiny.yaml")
        records = (record for index in count() for record in scene_records(config, "test", index))
        return [(record.before, record.after) for record in islice(records, NUM_PAIRS)]

    @cached_property
    def messages(self) -> list[Message]:
        return [load.form(*pair) for pair in self.files]

    @cached_property
    def captions(self) -> list[str]:
        """Return the captions of sequential calls, one pair at a time."""
        return [self.captioner.caption([(open_image(before), open_image(after))])[0] for before, after in self.files]

    def number(self, requests: int) -> int:
        """Return a number of requests, reduced by `share`."""
        return max(CLIENTS, round(self.share * requests))

    def check(self, replies: list[tuple[int, Reply]]) -> int:
        """Check the captions of (number of a pair, answer), and return how many differ within the margin.

        Raises ValueError if a caption differs although the model was sure.
        """
        different = {pair for pair, reply in replies if reply.caption != self.captions[pair]}
        if unsure := [pair for pair in different if self._margin(pair) >= MARGIN]:
            raise ValueError(f"pairs {unsure}: the server must give the captions of sequential calls, got others")
        return sum(pair in different for pair, _ in replies)

    @torch.inference_mode()
    def _margin(self, pair: int) -> float:
        """Return the smallest difference between the two highest probabilities of a token of the caption."""
        images = tuple(open_image(file) for file in self.files[pair])
        inputs = self.captioner.processor([images])
        tokenizer = self.captioner.processor.tokenizer
        output = self.captioner.model.generate(
            **inputs, do_sample=False, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, output_scores=True)
        highest = torch.stack(output.scores).softmax(-1).topk(2).values
        return float((highest[..., 0] - highest[..., 1]).min())


def start(bench: Bench) -> str:
    parts = bench.captioner.model.vision.tower, bench.captioner.model.language, bench.captioner.processor.tokenizer
    classes = sorted({type(part).__name__ for part in parts} | {"AutoTokenizer", "AutoImageProcessor"})
    imports, ready = [], []
    for _ in range(3):
        imports.append(servers.import_seconds(classes))
        with servers.running("onediff", "serve", "--model", bench.model) as server:
            ready.append(server.ready_s)
    return (f"{median(ready) / median(imports):.2f} times: {median(ready):.1f} s, the import "
            f"{median(imports):.1f} s (medians of 3)")


def throughput(bench: Bench) -> str:
    messages = list(islice(cycle(bench.messages), bench.number(200)))
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    with (servers.running("onediff", "serve", "--model", bench.model) as ours,
          servers.running("benchmarks.servers", "plain", str(bench.folder)) as plain):
        for name, server in (("ours", ours), ("plain", plain)) * 3:
            begin = time.perf_counter()
            replies = asyncio.run(load.closed_loop(server.port, messages, CLIENTS))
            rates[name].append(len(messages) / (time.perf_counter() - begin))
            bench.check([(position % NUM_PAIRS, reply) for position, reply in enumerate(replies)])
    bench.peak = median(rates["ours"])
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["plain"], strict=True)]
    return f"{median(ratios):.2f} times: {bench.peak:.1f} and {median(rates['plain']):.1f} pairs/s (medians of 3)"


def mixed(bench: Bench) -> str:
    if not bench.peak:
        throughput(bench)
    bad = cycle(load.bad_requests(bench.messages[0], bench.files[0][0]).values())
    numbers = [None if position % 10 == 9 else position % NUM_PAIRS for position in range(bench.number(2000))]
    messages = [next(bad) if pair is None else bench.messages[pair] for pair in numbers]
    with servers.running("onediff", "serve", "--model", bench.model) as server:
        replies = asyncio.run(load.open_loop(server.port, messages, 0.6 * bench.peak))
    good = [(pair, reply) for pair, reply in zip(numbers, replies, strict=True) if pair is not None]
    wrong = [reply.status for pair, reply in zip(numbers, replies, strict=True) if pair is None]
    if set(wrong) - {0, 413, 422}:
        raise ValueError(f"bad requests must be refused with 413 or 422, got {sorted(set(wrong))}")
    seconds = sorted(reply.seconds for _, reply in good)
    return (f"{len(good)} good ones answered, {bench.check(good)} captions differ with a margin below {MARGIN:g}; p50 "
            f"{1e3 * median(seconds):.0f} ms, p95 {1e3 * seconds[int(0.95 * len(seconds))]:.0f} ms; {len(wrong)} bad "
            f"ones refused; {0.6 * bench.peak:.1f} requests/s")


def memory(bench: Bench) -> str:
    early, late = bench.number(1000), bench.number(10_000)
    with servers.running("onediff", "serve", "--model", bench.model) as server:
        sizes = []
        for requests in (early, late - early):
            messages = list(islice(cycle(bench.messages), requests))
            replies = asyncio.run(load.closed_loop(server.port, messages, CLIENTS))
            bench.check([(position % NUM_PAIRS, reply) for position, reply in enumerate(replies)])
            sizes.append(server.memory_mb())
    return (f"{100 * (sizes[1] / sizes[0] - 1):+.1f} %: {sizes[0]:.0f} MB after {early:,}, {sizes[1]:.0f} MB after "
            f"{late:,}")


def attacks(bench: Bench) -> str:
    pair = {"before": load.base64_text(load.bomb()), "after": load.base64_text(load.bomb())}
    requests = [load.form(load.bomb(), load.bomb()), load.json_body([pair] * 4), *[load.form(load.bomb(), b"")] * 6]
    with servers.running("onediff", "serve", "--model", bench.model) as server:
        asyncio.run(load.closed_loop(server.port, bench.messages[:CLIENTS], CLIENTS))
        server.forget_peak()
        before = server.memory_mb()
        replies = asyncio.run(load.closed_loop(server.port, requests, len(requests)))
        grown = server.memory_mb("VmHWM") - before
    if {reply.status for reply in replies} != {413}:
        raise ValueError(f"each attack must be refused with 413, got {[reply.status for reply in replies]}")
    return f"refused in at most {1e3 * max(reply.seconds for reply in replies):.0f} ms, {grown:.0f} MB more"


def champion(bench: Bench) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folders = [shutil.copytree(bench.folder, Path(scratch, name)) for name in ("first", "second")]
        (folders[1] / "note.txt").write_text("another digest", encoding="utf-8")
        names = Path(scratch, "names")
        names.write_text(str(folders[0]), encoding="utf-8")
        with servers.running("benchmarks.servers", "following", str(names)) as server:
            replies, changes = asyncio.run(_while_changing(server.port, bench.messages, names, folders))
    bench.check(replies)
    return f"{changes} changes, {len(replies)} requests, none failed"


async def _while_changing(port: int, messages: list[Message], names: Path,
                          folders: list[Path]) -> tuple[list[tuple[int, Reply]], int]:
    """Send requests until the served folder has changed five times; return the answers and the number of changes."""
    replies: list[tuple[int, Reply]] = []
    changes = 0

    async def work(first: int) -> None:
        client = load.Client(port)
        for number in islice(cycle(range(NUM_PAIRS)), first, None):
            if changes == 5:
                break
            replies.append((number, await client.send(messages[number])))
        client.close()

    clients = [asyncio.create_task(work(first)) for first in range(8)]
    for folder in islice(cycle(folders), 1, 6):
        names.write_text(str(folder), encoding="utf-8")
        while str(folder).encode() not in replies[-1][1].body if replies else True:
            await asyncio.sleep(0.1)
        changes += 1
    await asyncio.gather(*clients)
    return replies, changes


def curl(bench: Bench) -> str:
    with (tempfile.TemporaryDirectory() as scratch,
          servers.running("onediff", "serve", "--model", bench.model) as server):
        paths = [Path(scratch, f"{side}.png") for side in ("before", "after")]
        seconds = []
        for files in bench.files:
            for path, content in zip(paths, files, strict=True):
                path.write_bytes(content)
            begin = time.perf_counter()
            subprocess.run(["curl", "-sf", "--noproxy", "*", "-F", f"before=@{paths[0]}", "-F", f"after=@{paths[1]}",
                            f"http://{load.HOST}:{server.port}/v1/captions"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
    return f"p50 {median(seconds):.2f} s, slowest {max(seconds):.2f} s, of {len(seconds)}"


PARTS: dict[str, tuple[str, str, Callable[[Bench], str]]] = {
    "start": ("from `onediff serve` to ready, against a bare import of torch and of the model's transformers classes",
              "1.5 times", start),
    "throughput": ("20 clients against a plain FastAPI handler that captions one pair at a time", "2.0 times",
                   throughput),
    "mixed": ("2,000 requests at 60 % of the highest rate, 10 % of them bad: corrupt, bomb, huge, wrong JSON, cut "
              "connections", "all good ones answered, p95 2 s", mixed),
    "memory": ("resident memory after request 10,000 against that after request 1,000", "+5 %", memory),
    "attacks": ("one-bit PNG of 64 megapixels: one pair, four pairs, six requests at once", "100 ms, 100 MB", attacks),
    "champion": ("the champion changes five times under load", "no request fails", champion),
    "curl": ("a caption through a running server, by `curl`", "p50 0.3 s", curl),
}


def main(part: Annotated[str | None, Option(help=f"One of {', '.join(PARTS)}; without it, all of them.")] = None,
         model: Annotated[str, Option(help="A model folder or a registered version.")] = CHAMPION,
         share: Annotated[float, Option(help="The share of the requests to send.")] = 1.0,
         write: Annotated[bool, Option("--write", help="Write the table into docs/serving.md.")] = False) -> None:
    """Measure the server, and print a Markdown table."""
    if part not in {None, *PARTS}:
        raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {part}")
    if write and (part or share != 1.0):
        raise ValueError("--write needs every row with all requests: leave out --part and --share")
    bench = Bench(model, share)
    lines = ["| what | target | measured | part |", "|---|---|---|---|"]
    for name in [part] if part else PARTS:
        what, target, measure = PARTS[name]
        lines.append(f"| {what} | {target} | {measure(bench)} | `{name}` |")
        print(lines[-1], flush=True)
    if write:
        script.write_table(PAGE, lines)


if __name__ == "__main__":
    script.main(main)
