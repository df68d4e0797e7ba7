"""Trains the tiny preset with several seeds, and writes its figures in the README and in docs/.

    python -m benchmarks.seeds run --seeds 3   # trains and scores seeds 7, 8 and 9, then writes the tables
    python -m benchmarks.seeds table           # writes the tables again from the scores of all seeds

Each seed has its own clone of the last commit in .onediff/seeds/SEED, where `dvc repro` runs the pipeline. An
interrupted run continues with the same command, because DVC keeps finished stages and training keeps its last step.
After a new commit, the same command runs only the stages that this commit made stale.

`table` writes docs/seeds.json (mean, lowest and highest value of each figure), the tables in README.md and
docs/results.md, and the largest share of false alarms that mlflow/promotion.yaml accepts: the upper end of the 95 %
interval of the worst seed.
"""

import math
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from scipy.stats import binomtest

from benchmarks import script, seed_tables
from onediff.files import new_folder, read_json, refusing_lock, write_json, write_text
from onediff.git import git, git_paths, head
from onediff.model.digest import weights_digest
from onediff.paths import GATE, METRICS, PARAMS, SEEDS, STRESS, TRAINED

HOME, FIRST_SEED = Path(".onediff/seeds"), 7
PRESET, PAGES, PROMOTION = "tiny", (Path("README.md"), Path("docs/results.md")), Path("mlflow/promotion.yaml")
SCORES = {"": METRICS, "gate.": GATE, "stress.": STRESS}  # the prefix of the names of the figures in each file
ALARMS, UNCHANGED = "scenes.false_alarm_rate", "gate.scenes.by_change_type.none.num_pairs"

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(seeds: int = 3) -> None:
    """Run the pipeline for each seed, and write the tables."""
    with refusing_lock(HOME / "lock", f"{HOME}: another run ({{holder}}) uses this folder; wait until it ends"):
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            folder = HOME / str(seed)
            prepare(folder, seed)
            minutes = train(folder, seed)
            repro(folder, seed)
            write_json(HOME / f"{seed}.json", {"commit": head(folder), "cpu_minutes": minutes,
                                               "figures": figures_of(folder)}, indent=1)
    table()


@app.command()
def table() -> None:
    """Write docs/seeds.json, the tables of README.md and docs/results.md, and the rule for false alarms."""
    results = {int(path.stem): read_json(path) for path in HOME.glob("[0-9]*.json")}
    if not results:
        raise ValueError(f"{HOME} must contain the scores of at least one seed, but has none; "
                         "'python -m benchmarks.seeds run' makes them")
    commits = {result["commit"] for result in results.values()}
    if len(commits) > 1:
        raise ValueError(f"{HOME}: the scores of all seeds must belong to one commit, but belong to {len(commits)}; "
                         "'python -m benchmarks.seeds run' brings all seeds to the last commit")
    seeds = sorted(results)
    figures = summary([results[seed]["figures"] for seed in seeds])
    write_json(SEEDS, {"preset": PRESET, "seeds": seeds, "commit": commits.pop(), "figures": figures}, indent=1)
    for page in PAGES:
        for name, lines in seed_tables.BLOCKS[page.name].items():
            script.write_block(page, name, lines(figures))
    if f"gate.{ALARMS}" in figures:
        allow_alarms(PROMOTION, figures[f"gate.{ALARMS}"]["high"], round(figures[UNCHANGED]["mean"]))
    print(f"{SEEDS}: {len(figures)} figures of the seeds {', '.join(map(str, seeds))}")


def prepare(folder: Path, seed: int) -> None:
    """Clone the last commit into `folder` with the preset and the seed, or bring an existing clone to this commit."""
    if not folder.exists():
        with new_folder(folder) as part:
            script.clone(part)
    elif head(folder) != head(script.ROOT):
        # dvc.lock and the scores say which stages are finished, so they survive the new commit.
        kept = {path: (folder / path).read_bytes() for path in git_paths("diff", "--name-only", "HEAD", root=folder)
                if (folder / path).exists()}
        git("fetch", "-q", str(script.ROOT), "HEAD", root=folder)
        git("reset", "-q", "--hard", "FETCH_HEAD", root=folder)
        for path, content in kept.items():
            (folder / path).write_bytes(content)
    preset = (folder / f"presets/{PRESET}.yaml").read_text(encoding="utf-8")
    write_text(folder / PARAMS, re.sub(r"^seed: \d+$", f"seed: {seed}", preset, count=1, flags=re.MULTILINE))


def train(folder: Path, seed: int) -> float:
    """Train the model in a clone, and return the minutes of processor time of both training phases.

    The minutes of interrupted runs are added. They are kept as long as the trained weights stay the same.
    """
    print(f"== seed {seed}", flush=True)
    repro(folder, seed, "build")
    path = HOME / f"{seed}.cpu"
    state = read_json(path) if path.exists() else {"weights": None, "minutes": 0.0, "pending": 0.0}
    start = _children_minutes()
    try:
        repro(folder, seed, "tune")
    finally:
        state["pending"] += _children_minutes() - start
        write_json(path, state)
    if (weights := weights_digest(folder / TRAINED)) != state["weights"]:
        state |= {"weights": weights, "minutes": state["pending"]}
    write_json(path, state | {"pending": 0.0})
    return float(state["minutes"])


def _children_minutes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def repro(folder: Path, seed: int, *stages: str) -> None:
    """Run the stale ones of these stages of the pipeline in a clone, or of all stages, and what they need.

    Raises ValueError if a stage fails.
    """
    done = subprocess.run([sys.executable, "-P", "-m", "dvc", "repro", *stages], cwd=folder, check=False,
                          env=script.project_environment(folder.absolute()))
    if done.returncode:
        raise ValueError(f"seed {seed}: 'dvc repro' failed in {folder}; see its message above; "
                         "after the cure, the same command continues")


def figures_of(folder: Path) -> dict[str, float]:
    """Return all figures of one seed: the test scores, and those of the split `gate` and of the stress test."""
    return {prefix + name: value for prefix, path in SCORES.items()
            for name, value in numbers(read_json(folder / path))}


def numbers(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, value) for each number in nested dictionaries; the name joins their keys with points."""
    for key, value in scores.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield prefix + key, value


def summary(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean, lowest and highest value of each figure that all seeds have."""
    values = {name: [figures[name] for figures in seeds] for name in seeds[0]
              if all(name in figures for figures in seeds)}
    return {name: {"mean": round(sum(each) / len(each), 4), "low": round(min(each), 4), "high": round(max(each), 4)}
            for name, each in sorted(values.items())}


def allow_alarms(rules: Path, worst: float, num_pairs: int) -> None:
    """Write the largest accepted share of false alarms into the promotion rules.

    It is the upper end of the exact 95 % interval of `worst`, the share of the worst seed among `num_pairs` unchanged
    pairs, rounded up to whole percents.
    """
    limit = math.ceil(100 * binomtest(round(worst * num_pairs), num_pairs).proportion_ci().high) / 100
    text, count = re.subn(rf"^(\s+{re.escape(ALARMS)}:) \S+$", rf"\g<1> {limit:g}", rules.read_text(encoding="utf-8"),
                          flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{rules}: 'maxima' must have one line '{ALARMS}: NUMBER', but has {count}; add this line")
    write_text(rules, text)


if __name__ == "__main__":
    script.main(app)
