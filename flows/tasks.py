"""The tasks of the flows: one DVC stage each, then registering and promotion."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.pipeline import outcome, reason, small_outs
from flows.processes import DVC, stream
from onediff.eval.metrics.catalog import HEADLINES
from onediff.repro.lock import lock_kept, restore_outs, uncached_outs

if TYPE_CHECKING:
    from onediff.registry import Case, Evidence, Verdict


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def repro(stage: str, *, ask: bool = True) -> State[Any]:
    """`dvc repro --single-item`. Its state says what happened: Ran, Restored (from DVC's run cache) or UpToDate.

    `ask` False: it is known to be up to date, so DVC is spared. No retries: the same bytes would fail again.
    """
    if not ask:
        return Completed(name="UpToDate", message=f"{stage}: UpToDate")
    start = time.time()
    with lock_kept():
        status, said = stream([*DVC, "repro", "--single-item", stage])
    if status:
        restore_outs(stage)  # for a stage that was killed before it could do so
        return Failed(message=f"{stage} failed{reason(Path(), start)}")
    lost = [path for path in uncached_outs(stage) if path not in small_outs()]
    if lost:
        return Failed(message=f"{stage}: {lost[0]} is not in DVC's cache, see DVC's message above; if the disk is "
                              "full, make room, then run the same command again")
    return Completed(name=outcome(said), message=f"{stage}: {outcome(said)}, {time.time() - start:.0f} s")


def _may_pass(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a service may answer the next time; wrong values and missing files will not mend themselves."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, (ConnectionError, TimeoutError)) or "cannot be reached" in str(error)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def keep_scores() -> str:
    """Scores, report and sample pictures in MLflow; the same ones are kept once."""
    from onediff.config import load_params
    from onediff.tracking import log_evaluation

    return log_evaluation(load_params())


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def register(evaluation: str, *, by: str) -> str:
    """The model that stage `tune` left becomes the candidate; the same model stays the same version."""
    from onediff.ops import candidate as registering

    run_id = json.loads(Path("data/runs/tune.json").read_text())["run_id"]
    return registering.register(Path("data/models/tune"), run_id=run_id, evaluation_run=evaluation, by=by)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def propose(version: str, *, by: str) -> None:
    """The version becomes the candidate."""
    from onediff import registry

    registry.propose(version, by=by)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def judge(version: str | None) -> Verdict:
    """What the gate says, before anybody is asked; changes nothing."""
    from onediff import registry

    return registry.assess(version)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def change(version: str | None, *, by: str, why: str | None, approved: Case | None) -> Verdict:
    """The version becomes champion if mlflow/promotion.yaml lets it, and if the case is still the one approved."""
    from onediff import registry

    verdict = registry.promote(version, by=by, why=why, approved=approved)
    print(f"version {verdict.version}: {'champion' if verdict.promoted else 'refused'}", *verdict.reasons, sep="\n  ")
    return verdict


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def turn_back(*, by: str, why: str | None) -> str:
    """`previous` becomes champion again; gives its number."""
    from onediff import registry

    return registry.rollback(by=by, why=why)


@task(cache_policy=NO_CACHE)
def score_again(model: str) -> Evidence:
    """Captions and scores a registered version in .onediff/evaluate, so that the pipeline's results stay; gives the
    digests of the model folder and of the new scores.
    """
    from onediff import registry

    if not Path("data/diffcap/card.json").exists():
        raise ValueError(f"data/diffcap not found in {Path.cwd()}, where {model} is to be scored again: "
                         "'dvc pull data/diffcap' there, or 'make run'")
    folder = Path(".onediff/evaluate").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    (folder / "data/diffcap").symlink_to(Path("data/diffcap").absolute(), target_is_directory=True)
    for name in ("params.yaml", "runtime.yaml"):
        if Path(name).exists():
            shutil.copy(name, folder)
    weights = registry.model_folder(model).absolute()
    for stage, *arguments in (("caption", str(weights)), ("score",)):
        status, _ = stream([sys.executable, "-m", f"onediff.stages.{stage}", *arguments], folder)
        if status:
            raise ValueError(f"{stage} of {model} failed; see its message above")
    return registry.evidence_of(weights, folder)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_pass)
def keep_rescored(version: str, evidence: Evidence) -> None:
    """The new scores on the version and in an MLflow run."""
    from onediff import registry
    from onediff.config import load_params
    from onediff.tracking import log_evaluation

    registry.rescore(version, evidence)
    log_evaluation(load_params(), data=evidence.root / "data")


@task(cache_policy=NO_CACHE)
def publish_scores(scores: Path, key: str) -> str:
    """The score table as a Markdown artifact in Prefect; gives the table."""
    table = score_table(json.loads(scores.read_text()))
    create_markdown_artifact(table, key=key, description=f"Scores in {scores}")
    return table


def score_table(metrics: dict[str, Any]) -> str:
    """Markdown: one row per benchmark with its floors below, one column per score, aligned for reading as text too."""
    columns = [name for name in HEADLINES if any(name in scores for scores in metrics.values())]
    rows = [["", "pairs", *columns]]
    for benchmark, scores in metrics.items():
        rows.append([benchmark, str(scores["num_pairs"]), *(_cell(scores, name) for name in columns)])
        for floor, values in scores.get("floor", {}).items():
            rows.append([f"floor: {floor}", "", *(_cell(values, name) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(scores: dict[str, Any], name: str) -> str:
    return f"{scores[name]:.3f}" if isinstance(scores.get(name), (int, float)) else ""
