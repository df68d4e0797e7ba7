"""Measures how many answers of a slow, unreliable chat endpoint are lost or billed twice if the stage is killed twice.

    python -m benchmarks.writer [--pairs 1000] [--seconds 0.5] [--concurrency 16] [--folder DIR]

The endpoint is a local server (tests/chat_server.py) that fails for 5 % of the requests. The stage `write` runs like
under DVC. It gets SIGTERM after about one third of the answers and SIGKILL after two thirds, and the third run
completes. The script measures this twice: with an endpoint that supports Idempotency-Key (it repeats a billed answer
free of charge), and with an endpoint that ignores the key.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks import script
from benchmarks.script import ROOT
from onediff.data.record import Record, read_table, write_shards
from onediff.files import read_jsonl
from tests.chat_server import ChatServer, serving

ANSWERS = Path("data/answers/mine/write.jsonl")


def main(pairs: int = 1000, seconds: float = 0.5, concurrency: int = 16, folder: Path | None = None) -> None:
    """Print one line of JSON for an endpoint that supports Idempotency-Key, and one for an endpoint that ignores it."""
    for honours_keys in (True, False):
        with tempfile.TemporaryDirectory(dir=folder) as project:
            print(json.dumps(measure(Path(project), num_pairs=pairs, seconds=seconds, concurrency=concurrency,
                                     honours_keys=honours_keys)))


def prepare(folder: Path, num_pairs: int) -> None:
    """Write a project with one source whose pairs have a caption for each image, but no image bytes.

    Images are not needed, because the stage `write` reads only the captions in text mode.
    """
    values = YAML(typ="safe").load(ROOT / "presets/micro.yaml")
    values["data"] |= {"raw": ["mine"], "written": ["mine"], "writer": {
        "model": "local", "mode": "text", "prompts": "v1", "temperature": 0.7, "max_tokens": 200}}
    YAML().dump(values, folder / "params.yaml")
    records = [Record(pair_id=f"mine-train-{number}", source="mine", split="train", group_id=f"mine-{number}",
                      before=b"", after=b"", references=[], instruction="What changed?", change_type="unlabelled",
                      provenance={"captions": [f"room {number}", f"garden {number}"]}) for number in range(num_pairs)]
    write_shards(records, folder / "data/pairs/mine", "train", shard_pairs=400)


def start(folder: Path, server: ChatServer, concurrency: int) -> subprocess.Popen[bytes]:
    """Start the stage `write` in the project `folder`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "ONEDIFF_WRITER_URL": server.url, "ONEDIFF_WRITER_CONCURRENCY": str(concurrency),
        "ONEDIFF_WRITER_USD_PER_MILLION_INPUT": "0.15", "ONEDIFF_WRITER_USD_PER_MILLION_OUTPUT": "0.6",
        "ONEDIFF_WRITER_MAX_USD": "10"}
    return subprocess.Popen([sys.executable, "-m", "onediff.stages.write", "mine"], cwd=folder, env=environment,
                            stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("ab"))


def kill_at(process: subprocess.Popen[bytes], number: signal.Signals, folder: Path, num_answers: int) -> int:
    """Send signal `number` to stage `write` when it has stored `num_answers` answers, and return the exit code.

    Raises RuntimeError if the stage ends before it has stored so many answers.
    """
    while not (folder / ANSWERS).exists() or (folder / ANSWERS).read_bytes().count(b"\n") < num_answers:
        if process.poll() is not None:
            raise RuntimeError((folder / "stderr").read_text()[-2000:])
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait()


def measure(folder: Path, *, num_pairs: int, seconds: float, concurrency: int, honours_keys: bool) -> dict[str, Any]:
    """Run the stage `write` three times, kill it in the first two runs, and return the values to print as JSON.

    The values count the answers that the server billed and the answers that the stage stored.
    """
    prepare(folder, num_pairs)
    with serving(seconds=seconds, failing=0.05, honours_keys=honours_keys) as server:
        began_s = time.monotonic()
        codes = [kill_at(start(folder, server, concurrency), number, folder, num_pairs * part // 3)
                 for part, number in ((1, signal.SIGTERM), (2, signal.SIGKILL))]
        codes.append(start(folder, server, concurrency).wait())
        total_s = time.monotonic() - began_s
    rows = read_jsonl(folder / ANSWERS)
    keys = [row["key"] for row in rows if "key" in row]
    written = read_table(folder / "data/written/mine") if codes[-1] == 0 else []
    return {"honours_keys": honours_keys, "exit_codes": codes, "seconds": round(total_s, 1), "answers_kept": len(keys),
            "kept_twice": len(keys) - len(set(keys)), "paid_but_lost": len(set(server.paid) - set(keys)),
            "pairs_written": len(written), "requests": len(server.seen), "failed_429_500": server.failures,
            "billed_keys": len(server.paid), "billed": sum(server.paid.values()),
            "billed_twice": sum(count - 1 for count in server.paid.values()), "in_flight_at_most": server.most_flying}


if __name__ == "__main__":
    script.main(main)
