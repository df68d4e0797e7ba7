"""The judge of captions, tested with a local chat endpoint whose answers follow rules, on captions of known truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import KEY, ChatServer, serving
from sklearn.metrics import cohen_kappa_score

from onediff.config import Judge, Runtime
from onediff.data.record import Record, read_table, write_shards
from onediff.data.writer import endpoint
from onediff.eval.analysis.grammar import parse, says_the_truth, truth
from onediff.eval.analysis.judge import (
    ANSWERS,
    Verdict,
    agreement,
    as_text,
    judge,
    judge_files,
    kappa,
    known_truths,
    summary,
)

ROOT = Path(__file__).parents[3]
SETTINGS = Judge(model="tiny-judge")
TRUTH = {"a": ["the red cube was removed", "the red block is gone"], "b": ["nothing has changed"],
         "c": ["the blue ball moved to the left"]}
PREDICTIONS = {"a": "The red block is gone", "b": "a dog appeared", "c": "the blue ball moved to the right"}
ALONE = {name: name for name in TRUTH}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ChatServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WRITER_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    with serving() as started:
        yield started


@pytest.fixture
def runtime(server: ChatServer) -> Runtime:
    return Runtime(writer_url=server.url, writer_max_usd=1.0, writer_usd_per_million_input=1.0,
                   writer_usd_per_million_output=1.0)


def verdict(pair_id: str, is_true: bool | None) -> Verdict:
    status, states, invents = {None: ("malformed", "", ""), True: ("ok", "yes", "no"),
                               False: ("ok", "partly", "no")}[is_true]
    return Verdict(pair_id, "x", ["y"], status, "", states, invents, "m", "k")


def put_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kappa_equals_cohen_kappa_score_of_scikit_learn() -> None:
    draw = np.random.default_rng(3)
    for _ in range(23):
        ours = draw.random(61) < draw.random()
        theirs = np.where(draw.random(61) < draw.random(), ours, draw.random(61) < 0.5)
        counts = np.array([[((ours == a) & (theirs == b)).sum() for b in (False, True)] for a in (False, True)])
        assert float(kappa(counts.astype(float))) == pytest.approx(cohen_kappa_score(ours, theirs))


def test_agreement_counts_errors_separately_and_draws_complete_groups() -> None:
    draw = np.random.default_rng(5)
    truths = {f"p{k}": bool(draw.random() < 0.4) for k in range(120)}
    judged = {name: is_true if draw.random() < 0.85 else not is_true for name, is_true in truths.items()}
    verdicts = [verdict(name, judged[name]) for name in truths] + [verdict(f"e{k}", None) for k in range(30)]
    truths |= {f"e{k}": True for k in range(30)}
    group_of = {name: name for name in truths}
    figures = agreement(verdicts, truths, group_of)
    right = sum(judged[name] == truths[name] for name in judged)
    assert (figures["num_judged"], figures["num_errors"]) == (120, 30)
    assert (figures["accuracy"], figures["accuracy_of_all"]) == (pytest.approx(right / 120), pytest.approx(right / 150))
    assert figures["kappa"] == pytest.approx(cohen_kappa_score(list(judged.values()),
                                                               [truths[name] for name in judged]))
    assert figures["kappa_interval"][0] < figures["kappa"] < figures["kappa_interval"][1]
    copies = [replace(each, pair_id=f"{each.pair_id}/{copy}") for each in verdicts for copy in range(7)]
    grouped = agreement(copies, {each.pair_id: truths[each.pair_id.split("/")[0]] for each in copies},
                        {each.pair_id: each.pair_id.split("/")[0] for each in copies})
    assert grouped["kappa_interval"] == pytest.approx(figures["kappa_interval"])  # Copies of a pair add no information.
    assert sum(grouped["counts"].values()) == 7 * 120


def test_kappa_is_undefined_if_all_verdicts_are_equal() -> None:
    figures = agreement([verdict(name, True) for name in "abc"], dict.fromkeys("abc", True), {k: k for k in "abc"})
    assert (figures["accuracy"], figures["kappa"], figures["kappa_interval"]) == (1.0, None, [None, None])
    none = agreement([verdict("a", None)], {"a": True}, {"a": "a"})
    assert (none["num_judged"], none["num_errors"]) == (0, 1)
    for each in (figures, none):
        assert "un" in as_text({"num_judged": 0, "num_pairs": 1, "errors": {}, "agreement": each})


def test_each_caption_and_its_references_are_sent_to_the_judge(server: ChatServer, runtime: Runtime) -> None:
    verdicts = judge(PREDICTIONS, TRUTH, SETTINGS, runtime)
    assert [(each.pair_id, each.states, each.invents) for each in verdicts] == [
        ("a", "yes", "no"), ("b", "no", "yes"), ("c", "partly", "yes")]
    sent = next(seen["body"] for seen in server.seen if "cube" in json.dumps(seen["body"]["messages"][1]))
    assert sent["messages"][1]["content"] == (
        'References: ["the red cube was removed", "the red block is gone"]\nCaption: "The red block is gone"')
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("tiny-judge", 0.0, 60)
    assert sent["response_format"]["json_schema"]["name"] == "judgement"
    figures = summary(verdicts, ALONE)
    assert {value: row["count"] for value, row in figures["states"].items()} == {"yes": 1, "partly": 1, "no": 1}
    assert figures["invents"]["yes"]["share"] == pytest.approx(2 / 3)
    assert "states the change: yes" in as_text(figures) and "3 of 3 captions judged" in as_text(figures)


def test_stored_answers_are_used_again_for_equal_captions_and_settings(server: ChatServer, runtime: Runtime) -> None:
    first = judge(PREDICTIONS, TRUTH, SETTINGS, runtime)
    assert judge(PREDICTIONS, TRUTH, SETTINGS, Runtime(writer_url="http://127.0.0.1:9/v1")) == first
    renamed = judge({"z": PREDICTIONS["a"]}, {"z": TRUTH["a"]}, SETTINGS, Runtime())
    assert (renamed[0].key, len(server.seen)) == (first[0].key, 3)
    other = judge(PREDICTIONS, TRUTH, SETTINGS.model_copy(update={"model": "other"}), runtime)
    assert len(server.seen) == 6 and not {each.key for each in other} & {each.key for each in first}


@pytest.mark.parametrize(("content", "reason"), [
    ("I think it is true.", "not JSON"), ('{"states": "mostly", "invents": "no"}', "states: Input should be 'yes', "),
    ('{"states": "yes"}', "invents: Field required"), ("refuse", "refused"),
    ("length", "cut off at judge.max_tokens 60")])
def test_malformed_answers_are_errors_and_give_no_verdict(server: ChatServer, runtime: Runtime, content: str,
                                                          reason: str) -> None:
    server.contents = {"dog": content}
    verdicts = judge(PREDICTIONS, TRUTH, SETTINGS, runtime)
    assert reason in verdicts[1].reason and not (verdicts[1].states or verdicts[1].invents or verdicts[1].is_true)
    figures = summary(verdicts, ALONE)
    assert (figures["num_judged"], figures["errors"]) == (2, {verdicts[1].status: 1})
    assert f"2 of 3 captions judged, 1 {verdicts[1].status}" in as_text(figures)


def test_a_verdict_in_capital_letters_is_accepted(server: ChatServer, runtime: Runtime) -> None:
    server.contents = {"dog": '{"states": "No", "invents": "YES "}'}
    assert [judge(PREDICTIONS, TRUTH, SETTINGS, runtime)[1].states] == ["no"]


@pytest.fixture
def shards(scene_pairs: list[Record], tmp_path: Path) -> Path:
    test_records = [replace(record, split="test") for record in scene_pairs]
    write_shards(test_records, tmp_path / "data/diffcap", "test", shard_pairs=99)
    return tmp_path / "data/diffcap"


def predictions_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return a prediction for each row: a true caption, the caption of another pair, or a sentence outside the grammar.
    """
    return {row["pair_id"]: (row["references"][0], rows[number - 1]["references"][0],
                             "something is odd here")[number % 3]
            for number, row in enumerate(rows)}


def test_verdicts_are_compared_with_the_grammar_of_the_source(server: ChatServer, runtime: Runtime,
                                                              shards: Path) -> None:
    rows = read_table(shards, "test-*.parquet")
    predictions = predictions_of(rows)
    path = put_lines(Path("p.jsonl"), [{"pair_id": key, "prediction": text} for key, text in predictions.items()])
    result, verdicts = judge_files(path, None, SETTINGS, runtime, known="scenes", shards=shards)
    truths = {row["pair_id"]: says_the_truth(parse(predictions[row["pair_id"]]), truth(row)) for row in rows}
    assert known_truths(predictions, rows, "scenes") == truths and len(set(truths.values())) == 2
    figures = result["agreement"]
    assert figures["accuracy"] == pytest.approx(np.mean([each.is_true == truths[each.pair_id] for each in verdicts]))
    assert figures["kappa"] == pytest.approx(cohen_kappa_score([each.is_true for each in verdicts],
                                                               [truths[each.pair_id] for each in verdicts]))
    assert figures["num_groups"] == len({row["group_id"] for row in rows}) < len(rows)
    assert "Cohen's kappa" in as_text(result)


def test_option_truth_is_refused_for_a_source_without_grammar_and_for_unknown_pairs(
        server: ChatServer, runtime: Runtime, shards: Path) -> None:
    path = put_lines(Path("p.jsonl"), [{"pair_id": "a", "prediction": "x"}])
    with pytest.raises(ValueError, match=r"--truth spot_the_diff: must be a benchmark with a grammar"):
        judge_files(path, None, SETTINGS, runtime, known="spot_the_diff", shards=shards)
    with pytest.raises(ValueError, match=r"--truth scenes: all pairs of the predictions must be in .*\(first: a\)"):
        judge_files(path, None, SETTINGS, runtime, known="scenes", shards=shards)
    with pytest.raises(FileNotFoundError, match=r"nowhere/test-.*parquet does not exist"):
        judge_files(path, None, SETTINGS, runtime, known="scenes", shards=Path("nowhere"))


def test_wrong_files_are_refused_before_the_first_request(server: ChatServer, runtime: Runtime) -> None:
    truths = put_lines(Path("r.jsonl"), [{"pair_id": key, "references": texts} for key, texts in TRUTH.items()])
    for rows, message in (([], "p.jsonl: must have one line per pair, but is empty"),
                          ([{"pair_id": "a", "prediction": "x"}], r"p.jsonl: .* 2 \(b, c\) are missing from the pred"),
                          ([{"pair_id": "a"}], "p.jsonl line 1: must have 'pair_id' and 'prediction'")):
        with pytest.raises(ValueError, match=message):
            judge_files(put_lines(Path("p.jsonl"), rows), truths, SETTINGS, runtime)
    with pytest.raises(ValueError, match="--references is needed"):
        judge_files(put_lines(Path("p.jsonl"), [{"pair_id": "a", "prediction": "x"}]), None, SETTINGS, runtime)
    assert not server.seen and not ANSWERS.exists()


def test_a_server_that_is_down_is_an_error_and_earlier_answers_are_kept(server: ChatServer, runtime: Runtime) -> None:
    judge({"a": PREDICTIONS["a"]}, {"a": TRUTH["a"]}, SETTINGS, runtime)
    down = runtime.model_copy(update={"writer_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/v1: no answer after 8 attempts.*again to continue"):
        judge(PREDICTIONS, TRUTH, SETTINGS, down)
    judge(PREDICTIONS, TRUTH, SETTINGS, runtime)
    assert len(server.seen) == 3


def test_the_error_for_an_unknown_prompt_version_contains_the_key_in_params_yaml(
        server: ChatServer, runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml: judge\.prompts: must be one of v1, got 'v9'"):
        judge(PREDICTIONS, TRUTH, SETTINGS.model_copy(update={"prompts": "v9"}), runtime)


def test_a_run_that_was_killed_continues_without_paying_twice(server: ChatServer, tmp_path: Path) -> None:
    pairs = {f"p{k}": f"the thing number {k} was removed" for k in range(40)}
    put_lines(Path("p.jsonl"), [{"pair_id": key, "prediction": text} for key, text in pairs.items()])
    put_lines(Path("r.jsonl"), [{"pair_id": key, "references": [text]} for key, text in pairs.items()])
    server.seconds = 0.2
    free = {f"ONEDIFF_WRITER_USD_PER_MILLION_{side}": "0" for side in ("INPUT", "OUTPUT")}
    command = [sys.executable, "-m", "onediff", "judge", "--predictions", "p.jsonl", "--references", "r.jsonl",
               "--model", "tiny-judge", "--base-url", server.url, "--out", "verdicts.jsonl", "--json"]
    environment = os.environ | free | {"PYTHONPATH": str(ROOT), "ONEDIFF_WRITER_CONCURRENCY": "2"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while sum(server.paid.values()) < 9:
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert b"SIGTERM: stopped after" in running.communicate()[1] and running.returncode == 1
    assert not Path("verdicts.jsonl").exists()
    server.seconds = 0
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["states"]["yes"]["count"] == 40
    assert sum(server.paid.values()) == 40
    lines = [json.loads(line) for line in Path("verdicts.jsonl").read_text().splitlines()]
    assert [line["pair_id"] for line in lines] == list(pairs) and set(lines[0]) == set(asdict(verdict("a", True)))
    assert KEY not in ANSWERS.read_text() + Path("verdicts.jsonl").read_text()
