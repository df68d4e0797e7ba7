"""1,000 answers from an endpoint that is slow, fails now and then, and is killed twice: what is lost, what paid twice?

    python -m benchmarks.writer [--pairs 1000] [--seconds 0.5] [--concurrency 16] [--folder DIR]

The endpoint is a server of this machine (tests/chat_server.py); the stage runs as DVC runs it. It is stopped by SIGTERM
at about a third of the answers and killed by SIGKILL at two thirds. Once with an endpoint that honours Idempotency-Key
(it gives an answer that was paid for again, for nothing), once with one that does not.
"""

from __future__ import annotations

import argparse
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

from onediff.data.record import Record, read_table, write_shards
from tests.chat_server import ChatServer, serving

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = Path("data/answers/mine/write.jsonl")


def prepare(folder: Path, num_pairs: int) -> None:
    """A source with captions of both images of each pair; text mode reads nothing else."""
    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    values["data"] |= {"raw": ["mine"], "written": ["mine"], "writer": {
        "model": "local", "mode": "text", "prompts": "v1", "temperature": 0.7, "max_tokens": 200}}
    YAML().dump(values, folder / "params.yaml")
    records = [Record(pair_id=f"mine-train-{number}", source="mine", split="train", group_id=f"mine-{number}",
                      before=b"", after=b"", references=[], instruction="What changed?", change_type="unlabelled",
                      provenance={"captions": [f"room {number}", f"garden {number}"]}) for number in range(num_pairs)]
    write_shards(records, folder / "data/pairs/mine", "train", shard_pairs=400)


def start(folder: Path, server: ChatServer, concurrency: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "ONEDIFF_WRITER_URL": server.url, "ONEDIFF_WRITER_CONCURRENCY": str(concurrency),
        "ONEDIFF_WRITER_USD_PER_MILLION_INPUT": "0.15", "ONEDIFF_WRITER_USD_PER_MILLION_OUTPUT": "0.6",
        "ONEDIFF_WRITER_MAX_USD": "10"}
    return subprocess.Popen([sys.executable, "-m", "onediff.stages.write", "mine"], cwd=folder, env=environment,
                            stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("ab"))


def kill_at(process: subprocess.Popen[bytes], number: signal.Signals, folder: Path, num_answers: int) -> int:
    """Returns the exit code; raises RuntimeError if the stage ends too early."""
    while not (folder / ANSWERS).exists() or (folder / ANSWERS).read_bytes().count(b"\n") < num_answers:
        if process.poll() is not None:
            raise RuntimeError((folder / "stderr").read_text()[-2000:])
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait()


def measure(folder: Path, *, num_pairs: int, seconds: float, concurrency: int, honours_keys: bool) -> dict[str, Any]:
    """One run of the stage with two kills, and what server and folder then say."""
    prepare(folder, num_pairs)
    with serving(seconds=seconds, failing=0.05, honours_keys=honours_keys) as server:
        begun = time.monotonic()
        codes = [kill_at(start(folder, server, concurrency), number, folder, num_pairs * part // 3)
                 for part, number in ((1, signal.SIGTERM), (2, signal.SIGKILL))]
        codes.append(start(folder, server, concurrency).wait())
        took = time.monotonic() - begun
    rows = [json.loads(line) for line in (folder / ANSWERS).read_bytes().splitlines()]
    kept = [row["key"] for row in rows if "key" in row]
    written = read_table(folder / "data/written/mine") if codes[-1] == 0 else []
    return {"honours_keys": honours_keys, "exit_codes": codes, "seconds": round(took, 1), "answers_kept": len(kept),
            "kept_twice": len(kept) - len(set(kept)), "paid_but_lost": len(set(server.paid) - set(kept)),
            "pairs_written": len(written), "requests": len(server.seen), "failed_429_500": server.failures,
            "billed_keys": len(server.paid), "billed": sum(server.paid.values()),
            "billed_twice": sum(count - 1 for count in server.paid.values()), "in_flight_at_most": server.most_flying}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    for honours_keys in (True, False):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            found = measure(Path(folder), num_pairs=asked.pairs, seconds=asked.seconds, concurrency=asked.concurrency,
                            honours_keys=honours_keys)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
