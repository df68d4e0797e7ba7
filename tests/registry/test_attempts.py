"""Attempts to promote a model that must not become champion. Each attempt must fail with the right message.

Two attempts are outside the scope: somebody who can write into MLflow's database, and somebody who can forge all files
of a pipeline run with its dvc.lock before they are committed, can write whatever the gate reads. The command
`onediff lineage VERSION --verify` detects both, because it captions and scores again.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from registered import (
    GOOD,
    commit,
    git,
    model,
    pairs_of,
    register,
    score_again,
    write_data,
    write_json,
    write_lock,
    write_results,
    write_rules,
)

from onediff import registry, tracking

TUNE, RULES, CODE = Path("data/models/tune"), Path("mlflow/promotion.yaml"), Path("onediff/code.py")
GATE, SCORED = Path("data/gate.json"), Path("data/scored/gate.json")
REQUIRED = {"require": ["data_validated", "leak_audit", "clean_lineage"]}
ATTEMPTS: list[Any] = []


@pytest.fixture(autouse=True)
def honest(store: Path) -> None:
    """Write a model that would become the first champion: validated data, committed code and its own scores."""
    write_rules(RULES, **REQUIRED)
    CODE.parent.mkdir()
    CODE.write_text("one")
    commit(CODE)
    write_data()
    shutil.copytree(model("good"), TUNE)
    write_results()
    write_lock(TUNE, score={"deps": {"onediff/code.py": "f97c5d29941bfb1b2fdab0874906ab82"}})


def attempt(reason: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Add a function to ATTEMPTS. The function returns a verdict or raises an exception, which must match `reason`."""
    def add(work: Callable[[], Any]) -> Callable[[], Any]:
        ATTEMPTS.append(pytest.param(work, reason, id=work.__name__.replace("_", " ")))
        return work
    return add


def promoted(**options: Any) -> registry.Verdict:
    """Register the model and promote it, as the command line does."""
    register(TUNE)
    return registry.promote(**options)


def edit(path: Path, **figures: object) -> None:
    """Replace scores of the benchmark `scenes` in a JSON file."""
    content = json.loads(path.read_text())
    content["scenes"] |= figures
    path.write_text(json.dumps(content))


def scored_as(text: str | None = None, /, **figures: object) -> registry.Verdict:
    """Promote as if the stage `score` had written `text` into gate.json, or `figures` as scores of `scenes`."""
    if text is None:
        edit(GATE, **figures)
    else:
        GATE.write_text(text)
    write_lock(TUNE)
    return promoted()


def test_the_unchanged_model_becomes_champion() -> None:
    assert promoted().promoted
    assert registry.trail()[-1].rules["commit"] == tracking.provenance()["git_commit"]


@attempt("data/gate.json: must be the output of stage score, md5 .* in dvc.lock, got .*'dvc repro'")
def hand_edited_gate_json() -> Any:
    edit(GATE, false_alarm_rate=0.0)
    return promoted()


@attempt("data/metrics.json: must be the output of stage score")
def hand_edited_metrics_json() -> Any:
    edit(Path("data/metrics.json"), CIDEr=9.0)
    return promoted()


@attempt("data/scored: must be the output of stage score")
def hand_edited_scores_of_pairs() -> Any:
    edit(SCORED, CIDEr=[9.0] * 200)
    return promoted()


@attempt("data/captions: must be the output of stage caption")
def hand_edited_captions() -> Any:
    Path("data/captions/gate/scenes.jsonl").write_text("{}")
    return promoted()


@attempt("data/scored does not exist: run 'dvc repro'")
def scores_of_pairs_that_are_missing() -> Any:
    shutil.rmtree("data/scored")
    return promoted()


@attempt("data/models/tune: must be the model folder that stage caption read")
def new_weights_with_the_old_scores() -> Any:
    (TUNE / "model.safetensors").write_bytes(b"new")
    return promoted()


@attempt("data/models/tune that stage caption read: must be the output of stage tune")
def new_weights_that_were_trained_but_not_captioned() -> Any:
    (TUNE / "model.safetensors").write_bytes(b"new")
    write_lock(TUNE, caption={"deps": {"data/models/tune": "0" * 32 + ".dir"}})
    return promoted()


@attempt("data/captions that stage score read: must be the output of stage caption")
def scores_of_other_captions() -> Any:
    write_lock(TUNE, score={"deps": {"data/captions": "0" * 32 + ".dir"}})
    return promoted()


@attempt("data/diffcap that stage score read: must be the data that stage tune read")
def scores_on_other_data() -> Any:
    write_lock(TUNE, score={"deps": {"data/diffcap": "0" * 32 + ".dir"}})
    return promoted()


@attempt("data/models/tune: must be the model folder that stage caption read")
def old_weights_with_a_new_tokenizer() -> Any:
    (TUNE / "tokenizer.json").write_text("{}")
    return promoted()


@attempt("data/models/tune: must be the model folder that stage caption read")
def a_changed_config() -> Any:
    (TUNE / "config.json").write_text('{"num_tokens": 3}')
    return promoted()


@attempt("models/other: must be the model folder that stage caption read")
def a_model_folder_that_was_not_scored() -> Any:
    register(model("other"))


@attempt("dvc.lock: data/gate.json must be what the commit's dvc.lock has for the same captions")
def dvc_lock_edited_to_fit_a_hand_edited_gate_json() -> Any:
    commit("dvc.lock")
    edit(GATE, false_alarm_rate=0.0)
    write_lock(TUNE, score={"deps": {"onediff/code.py": "f97c5d29941bfb1b2fdab0874906ab82"}})
    return promoted()


@attempt("dvc.lock: must contain stage caption, which records")
def dvc_lock_without_a_stage() -> Any:
    Path("dvc.lock").write_text(Path("dvc.lock").read_text().replace('"caption"', '"captions"'))
    return promoted()


@attempt("data/scored/gate.json: edits: must be a benchmark in both")
def scores_of_the_test_split() -> Any:
    return scored_as(Path("data/metrics.json").read_text())


@attempt(r"data/gate.json: scenes.false_alarm_rate: must be a number from 0 to 1, got -0.5; 'dvc repro'")
def a_negative_false_alarm_rate() -> Any:
    return scored_as(false_alarm_rate=-0.5)


@attempt("scenes.change_type_accuracy: must be a number from 0 to 1, got 5.0")
def a_rate_of_five() -> Any:
    return scored_as(change_type_accuracy=5.0)


@attempt("scenes.CIDEr: must be a number from 0 to 10, got 10.5")
def a_cider_above_ten() -> Any:
    return scored_as(CIDEr=10.5)


@attempt("data/gate.json: must be valid JSON, got: numbers must be finite in JSON, got Infinity")
def infinity_as_a_score() -> Any:
    return scored_as(change_type_accuracy=float("inf"))


@attempt("numbers must be finite in JSON, got NaN")
def nan_as_a_score() -> Any:
    return scored_as(change_type_accuracy=float("nan"))


@attempt("scenes.change_type_accuracy: must be a number from 0 to 1, got inf")
def a_number_too_large_for_a_float() -> Any:
    return scored_as(GATE.read_text().replace('"change_type_accuracy": 0.9', '"change_type_accuracy": 1e999'))


@attempt("scenes.change_type_accuracy: must be a number from 0 to 1, got 1000000")
def a_huge_integer_as_a_score() -> Any:
    return scored_as(change_type_accuracy=10**400)


@attempt("scenes.change_type_accuracy: must be a number from 0 to 1, got True")
def true_as_a_score() -> Any:
    return scored_as(change_type_accuracy=True)


@attempt("scenes.change_type_accuracy: must be a number from 0 to 1, got '1.0'")
def a_text_as_a_score() -> Any:
    return scored_as(change_type_accuracy="1.0")


@attempt(r"scenes.change_type_accuracy_by_type.add: must be a number from 0 to 1, got 7")
def an_accuracy_of_seven_for_one_type_of_change() -> Any:
    return scored_as(change_type_accuracy_by_type={"add": 7})


@attempt("must be valid JSON, got: each key of a JSON object must occur once, but 'CIDEr' occurs twice")
def a_score_file_with_a_repeated_key() -> Any:
    return scored_as(GATE.read_text().replace('"CIDEr": 3.0', '"CIDEr": 0.1, "CIDEr": 3.0'))


@attempt("data/gate.json: edits: must have num_pairs, protocol, references, BLEU-1")
def a_benchmark_without_scores() -> Any:
    return scored_as(json.dumps({"scenes": GOOD, "edits": {}}))


@attempt("scenes.num_pairs: must be at least 1, got 0")
def a_benchmark_without_pairs() -> Any:
    return scored_as(num_pairs=0)


@attempt("scenes: must have METEOR")
def a_missing_metric() -> Any:
    return scored_as(json.dumps({"scenes": {key: value for key, value in GOOD.items() if key != "METEOR"}}))


@attempt("data/gate.json: must be valid JSON, got: Expecting value")
def an_empty_score_file() -> Any:
    return scored_as("")


@attempt("data/gate.json: must be a mapping with at least one benchmark, got an empty one")
def a_score_file_without_benchmarks() -> Any:
    return scored_as("{}")


@attempt("scenes.CIDEr: the mean of the pairs must be the score of the split, 9, got 3")
def a_score_that_is_not_the_mean_of_its_pairs() -> Any:
    return scored_as(CIDEr=9.0)


@attempt("data/scored/gate.json: scenes.CIDEr: must be a list of num_pairs 200 items")
def scores_of_fewer_pairs() -> Any:
    edit(SCORED, CIDEr=[3.0])
    return scored_as()


@attempt("edits.operation_accuracy is not in the gate scores, must be at least 0.5")
def a_benchmark_of_the_rules_that_was_not_scored() -> Any:
    write_json(SCORED, pairs_of({"scenes": GOOD}))
    return scored_as(json.dumps({"scenes": GOOD}))


@attempt(r"scenes: the pairs of split gate must be of at least 2 groups .*, got 1")
def a_gate_split_of_only_one_group() -> Any:
    write_results(groups=1)
    return scored_as()


@attempt("the data/quarantine.parquet that a later stage read must be the output of stage")
def data_that_was_not_validated() -> Any:
    write_lock(TUNE, validate={"outs": {"data/quarantine.parquet": "0" * 32}})
    return promoted()


@attempt("leak_audit: no: scenes: 3 of 1000 test pairs leak")
def pairs_of_test_that_leak_into_train() -> Any:
    write_data(verdict="3 of 1000 test pairs leak")
    write_lock(TUNE)
    return promoted()


@attempt("clean_lineage: no: changed since the commit: onediff/code.py")
def code_that_is_not_committed() -> Any:
    CODE.write_text("two")
    write_lock(TUNE)
    return promoted()


@attempt("clean_lineage: no: changed since the commit: onediff/code.py")
def a_change_of_code_that_git_is_configured_to_ignore() -> Any:
    git("update-index", "--assume-unchanged", "onediff/code.py")
    CODE.write_text("two")
    write_lock(TUNE)
    return promoted()


@attempt("clean_lineage: no: changed since the commit: onediff/more.py")
def code_that_git_does_not_track() -> Any:
    Path("onediff/more.py").write_text("two")
    return promoted()


@attempt("clean_lineage: no: stage score ran with another version of onediff/code.py")
def code_that_was_restored_after_the_scoring() -> Any:
    write_lock(TUNE, score={"deps": {"onediff/code.py": "0" * 32}})
    return promoted()


def loosened(*, staged: bool = False, hidden: bool = False) -> registry.Verdict:
    """Promote with rules that were changed without a commit, staged or hidden from git with --assume-unchanged."""
    RULES.write_text(json.dumps(json.loads(RULES.read_text()) | {"maxima": {"scenes.false_alarm_rate": 1}}))
    if staged:
        git("add", str(RULES))
    if hidden:
        git("update-index", "--assume-unchanged", str(RULES))
    return promoted()


@attempt("mlflow/promotion.yaml: must equal the file in the git commit, but it was changed, staged")
def rules_loosened_without_a_commit() -> Any:
    return loosened()


@attempt("must equal the file in the git commit")
def rules_loosened_and_staged() -> Any:
    return loosened(staged=True)


@attempt("must equal the file in the git commit")
def rules_loosened_while_git_assumes_that_the_file_is_unchanged() -> Any:
    return loosened(hidden=True)


@attempt("rules.yaml: must equal the file in the git commit")
def other_rules_that_are_not_committed() -> Any:
    Path("rules.yaml").write_text(RULES.read_text())
    return promoted(rules=Path("rules.yaml"))


@attempt("minima.edits.swap_consistency: the gate scores of 'edits' have no 'swap_consistency'")
def a_rule_about_a_figure_that_the_benchmark_does_not_have() -> Any:
    write_rules(RULES, minima={"edits.swap_consistency": 0.0})
    return promoted()


@attempt("clean_lineage: no git: run 'git init' and 'git commit'")
def a_second_champion_without_git() -> Any:
    shutil.rmtree(".git")
    assert promoted().promoted  # Without git, only the first champion is accepted.
    assert registry.trail()[-1].rules["commit"] == "no git"
    (TUNE / "model.safetensors").write_bytes(b"better")
    write_results(CIDEr=4.0)
    return scored_as()


def approved() -> registry.PromotionCase:
    """Register the model and return the promotion case that a person has approved for this version."""
    register(TUNE)
    case = registry.assess().case
    assert case and case.version == "1"
    return case


@attempt(r"the approval was for version 1 \(model .*\), but the promotion would now be of version 2 \(model")
def a_candidate_swapped_during_approval() -> Any:
    case = approved()
    (TUNE / "model.safetensors").write_bytes(b"other")
    write_lock(TUNE)
    return promoted(approved=case)


@attempt("the approval was for version 1 .*, but the promotion would now be of version 1 ")
def scores_replaced_during_the_approval() -> Any:
    case = approved()
    write_results(change_type_accuracy=0.95)
    write_lock(TUNE)
    return promoted(approved=case)


@attempt(r"the approval was for version 1 .*rules \w+\), but the promotion would now be of version 1 .*rules")
def rules_loosened_and_committed_during_approval() -> Any:
    case = approved()
    write_rules(RULES, minima={"scenes.CIDEr": 0})
    return registry.promote(approved=case)


@attempt("approval_h requires that a person approves version 1 .* as champion, but no approval was given")
def a_promotion_that_nobody_approved() -> Any:
    write_rules(RULES, approval_h=1)
    return promoted()


def in_store(name: str) -> Path:
    register(TUNE)
    return next(Path("mlflow-artifacts").rglob(name))


@attempt("version 1: the files in .* must have the registered digest .*, got .*, so they were changed")
def weights_changed_in_the_store() -> Any:
    in_store("model.safetensors").write_bytes(b"evil")
    return registry.promote()


@attempt("version 1: the files in .* so they were changed")
def a_config_changed_in_the_store() -> Any:
    in_store("config.json").write_text('{"num_tokens": 3}')
    return registry.promote()


@attempt("version 1: the files in .* so they were changed")
def a_file_added_in_the_store() -> Any:
    (in_store("config.json").parent / "tokenizer.json").write_text("{}")
    return registry.promote()


@attempt("scored/gate.json must have the registered md5 .*, so the file was changed: score the version again")
def scores_of_pairs_changed_in_the_store() -> Any:
    path = in_store("scored/gate.json")
    path.write_text(path.read_text().replace("3.0", "9.0"))
    return registry.promote()


@attempt("scores/gate.json must have the registered md5 .*, so the file was changed: score the version again")
def scores_changed_in_the_store() -> Any:
    path = in_store("scores/gate.json")
    path.write_text(path.read_text().replace('"CIDEr": 3.0', '"CIDEr": 9.0'))
    return registry.promote()


@attempt("scenes.change_type_accuracy is not in the gate scores")
def scores_removed_from_the_store() -> Any:
    in_store("scores/gate.json").unlink()
    return registry.promote()


@attempt("scores/gate.json must have the registered md5 .*, so the file was changed: score the version again")
def scores_replaced_by_a_tag_and_a_file() -> Any:
    in_store("scores/gate.json").write_text("{}")
    tracking.client().set_model_version_tag("onediff", "1", "scores_gate", '{"scenes.CIDEr": 9.0}')
    return registry.promote()


@attempt("scenes.false_alarm_rate is -1.0, which is outside the range of this score, must be at most 0.06")
def scores_in_the_tag_of_earlier_code_that_were_not_read_strictly() -> Any:
    path = in_store("scores/gate.json")
    scores = tracking.flatten(json.loads(path.read_text()))
    path.unlink()
    tracking.client().set_model_version_tag("onediff", "1", "scores_gate", json.dumps(
        scores | {"scenes.false_alarm_rate": -1.0}))
    return registry.promote()


@attempt("version 1: its new scores must be those of its model, digest .*, got scores of the model")
def new_scores_of_another_model() -> Any:
    register(TUNE)
    write_results(Path("again"), CIDEr=9.0)
    registry.rescore("1", registry.evidence_of(model("other"), Path("again")))


@attempt("leak_audit: no: the version was trained on other data")
def a_version_scored_again_on_data_that_nobody_audited_against_its_own() -> Any:
    register(TUNE)
    write_json(Path("data/diffcap/card.json"), {"other": 1})
    write_lock(TUNE)
    score_again("1")
    return registry.promote()


@attempt("the champion must have passed the promotion rules, but version 1 became champion outside OneDiff: 'onediff")
def a_champion_set_by_hand_in_mlflow() -> Any:
    register(TUNE)
    tracking.client().set_registered_model_alias("onediff", "champion", "1")
    try:
        registry.model_folder()
    finally:
        registry.repair()


@attempt("must equal the file in the git commit")
def rules_loosened_and_committed_in_a_repository_inside_the_project() -> Any:
    register(TUNE)
    RULES.write_text(json.dumps(json.loads(RULES.read_text()) | {"maxima": {"scenes.false_alarm_rate": 1}}))
    for words in (["init", "--quiet"], ["add", RULES.name], ["commit", "--quiet", "--message", "one"]):
        git("-C", str(RULES.parent), *words)
    return registry.promote()


@attempt("must equal the file in the git commit")
def rules_loosened_while_a_filter_of_git_hides_the_change() -> Any:
    register(TUNE)
    git("config", "filter.hide.clean", f"git show HEAD:{RULES}")
    Path(".git/info/attributes").write_text(f"{RULES} filter=hide\n")
    RULES.write_text(json.dumps(json.loads(RULES.read_text()) | {"maxima": {"scenes.false_alarm_rate": 1}}))
    return registry.promote()


@attempt("must equal the file in the git commit")
def rules_loosened_while_git_replaces_the_commit() -> Any:
    register(TUNE)
    RULES.write_text(json.dumps(json.loads(RULES.read_text()) | {"maxima": {"scenes.false_alarm_rate": 1}}))
    commit(RULES)
    git("replace", "HEAD~1", "HEAD")
    git("reset", "--quiet", "--soft", "HEAD~1")
    return registry.promote()


@attempt("clean_lineage: no: changed since the commit: onediff/code.py")
def code_that_is_not_committed_while_a_filter_of_git_hides_the_change() -> Any:
    git("config", "filter.hide.clean", f"git show HEAD:{CODE}")
    Path(".git/info/attributes").write_text(f"{CODE} filter=hide\n")
    CODE.write_text("two")
    write_lock(TUNE)
    return promoted()


@attempt("clean_lineage: no git")
def a_model_registered_while_the_git_folder_was_renamed() -> Any:
    Path(".git").rename("moved")
    register(TUNE)
    Path("moved").rename(".git")
    return registry.promote()


@attempt("clean_lineage: no: stage tune ran with another value of tune.steps than params.yaml has now")
def parameters_that_were_restored_after_the_training() -> Any:
    Path("params.yaml").write_text("tune: {steps: 2}")
    commit("params.yaml")
    write_lock(TUNE)
    lock = json.loads(Path("dvc.lock").read_text())
    lock["stages"]["tune"]["params"] = {"params.yaml": {"tune.steps": 9}}
    write_json(Path("dvc.lock"), lock)
    return promoted()


@attempt("clean_lineage: no: stage align ran with another version of onediff/code.py")
def code_that_was_restored_after_the_first_phase() -> Any:
    write_lock(TUNE, tune={"deps": {"data/models/align": "1" * 32}})
    lock = json.loads(Path("dvc.lock").read_text())
    lock["stages"]["align"] = {"cmd": "x", "deps": [{"path": "onediff/code.py", "md5": "0" * 32}],
                               "outs": [{"path": "data/models/align", "md5": "1" * 32}]}
    write_json(Path("dvc.lock"), lock)
    return promoted()


@attempt("clean_lineage: no: .*onediff/code.py")
def code_that_was_restored_after_the_training_before_scoring_again() -> Any:
    write_lock(TUNE, tune={"deps": {"onediff/code.py": "0" * 32}})
    register(TUNE)
    score_again("1")
    return registry.promote()


@attempt("the scores of its pairs, scored/gate.json, are missing in the store: score the version again")
def scores_of_pairs_removed_from_the_store() -> Any:
    write_results(groups=1)
    write_lock(TUNE)
    in_store("scored/gate.json").unlink()
    return registry.promote()


@attempt("leak_audit: no: scenes: 3 of 1000 test pairs leak")
def a_leak_that_was_detected_after_the_registration() -> Any:
    register(TUNE)
    write_data(verdict="3 of 1000 test pairs leak")
    write_lock(TUNE)
    return promoted()


@attempt("better_than_champion.metric: .*'scene'.*did you mean 'scenes'")
def a_comparison_on_a_benchmark_that_is_misspelt() -> Any:
    write_rules(RULES, better_than_champion={"metric": "scene.CIDEr", "margin": 0})
    return promoted()


@pytest.mark.parametrize(("work", "reason"), ATTEMPTS)
def test_an_attempt_to_promote_the_wrong_model_is_refused(work: Callable[[], Any], reason: str) -> None:
    try:
        verdict = work()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        assert verdict is not None and not verdict.promoted
        message = "; ".join(verdict.reasons)
    assert re.search(reason, message), message
    assert champions() == (["1"] if work is a_second_champion_without_git else [])


def champions() -> list[str]:
    """Read from the database file every version that is champion in the audit trail or by an alias of MLflow."""
    with closing(sqlite3.connect("mlflow.db")) as database:
        changes = database.execute("SELECT value FROM model_version_tags WHERE name = 'onediff-audit' AND key = 'to'")
        recorded = [json.loads(to).get("champion") for to, in changes]
        aliases = database.execute("SELECT version FROM registered_model_aliases WHERE alias = 'champion'").fetchall()
    return sorted({str(version) for version in [*filter(None, recorded), *(version for version, in aliases)]})
