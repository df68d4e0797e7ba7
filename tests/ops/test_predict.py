"""Tests of `onediff predict` and `onediff references`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chat_checkpoints import qwen2_vl
from commands import run_cli

from onediff.baselines.siamese_cnn import Architecture, SiameseCaptioner, SiameseCNN, Vocabulary
from onediff.config import Config
from onediff.data.record import Record, write_shards
from onediff.eval.caption_files import EXTRAS, read_predictions, read_references
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.ops import predict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(scene_pairs: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the benchmarks scenes (five pairs) and mine (three pairs)."""
    records = [replace(record, source="scenes" if i < 5 else "mine") for i, record in enumerate(scene_pairs[:8])]
    write_shards(records, tmp_path / "data/diffcap", "test", shard_pairs=4)
    (tmp_path / "params.yaml").write_bytes((ROOT / "presets/micro.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cnn(project: Path) -> Path:
    """The folder of a small random Siamese CNN captioner."""
    shape = Architecture(image_px=48, channels=(5, 7, 11), width=26, heads=2, layers=1, max_words=6)
    vocabulary = Vocabulary(["the", "cube", "moved"])
    SiameseCaptioner(SiameseCNN(shape, len(vocabulary.words)), vocabulary).save(project / "cnn")
    return project / "cnn"


def test_predictions_and_references_are_readable_by_score_and_compare(
        project: Path, cnn: Path, scene_pairs: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(monkeypatch, "predict", "scenes", "--cnn", str(cnn), "--out", "out/p.jsonl") == 0
    assert run_cli(monkeypatch, "references", "scenes", "--out", "r.jsonl") == 0
    predictions, truth = read_predictions(Path("out/p.jsonl")), read_references(Path("r.jsonl"))
    assert list(predictions) == [record.pair_id for record in scene_pairs[:5]]
    assert truth == [{name: getattr(record, name) for name in ("pair_id", "references", *EXTRAS)}
                     for record in scene_pairs[:5]]
    assert run_cli(monkeypatch, "predict", "scenes", "--cnn", str(cnn), "--out", "p.json", "--format", "coco") == 0
    assert run_cli(monkeypatch, "references", "scenes", "--out", "r.json", "--format", "coco") == 0
    assert json.loads(Path("p.json").read_text())[0] == {
        "image_id": scene_pairs[0].pair_id, "caption": predictions[scene_pairs[0].pair_id]}
    assert read_predictions(Path("p.json")) == predictions and read_references(Path("r.json")) == truth


def test_a_chat_model_gets_the_instruction_of_each_pair_and_the_prompt_is_printed(
        project: Path, scene_pairs: list[Record], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    from onediff.baselines.chat import ChatCaptioner
    from onediff.inputs.images import open_image

    folder = project / "chat"
    folder.mkdir()
    prompt = "{question} In few words."
    assert run_cli(monkeypatch, "predict", "mine", "--chat", qwen2_vl(folder), "--prompt", prompt, "--out",
                    "p.jsonl", "--batch-size", "2") == 0
    assert f"prompt, after both images: {prompt}\n" in capsys.readouterr().out
    captioner = ChatCaptioner.load(str(folder), prompt=prompt)
    expected = [captioner.caption([(open_image(r.before), open_image(r.after))], [DEFAULT_INSTRUCTION],
                                  max_new_tokens=predict.load_params().caption.max_new_tokens)[0]
                for r in scene_pairs[5:8]]
    assert list(read_predictions(Path("p.jsonl")).values()) == expected


def test_a_system_that_is_interrupted_keeps_the_old_file(project: Path) -> None:
    out = Path("p.jsonl")
    out.write_text("as before\n")

    def failing_system(records: Iterator[Record]) -> Iterator[tuple[Record, str]]:
        yield next(records), "something changed"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict.write_predictions("scenes", failing_system, out)
    assert out.read_text() == "as before\n" and not list(project.glob("*.part"))


def test_an_unknown_benchmark_lists_the_existing_benchmarks_and_loads_no_model(project: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    message = "onediff: data/diffcap: split test has no benchmark 'scene'; its benchmarks are scenes, mine"
    assert run_cli(monkeypatch, "predict", "scene", "--chat", "nobody/nothing", "--out", "p.jsonl") == message
    assert run_cli(monkeypatch, "references", "scene", "--out", "r.jsonl") == message
    assert not Path("p.jsonl").exists() and not Path("r.jsonl").exists()


@pytest.mark.parametrize(("options", "message"), [
    ([], "one system must write the captions: give one of --model, --chat and --cnn"),
    (["--cnn", "a", "--chat", "b"], "one system must write the captions"),
    (["--cnn", "a", "--prompt", "b"], "--prompt works only with --chat"),
    (["--model", "nowhere"], "nowhere is not a model folder"),
    (["--cnn", "nowhere"], "nowhere must contain a Siamese CNN"),
])
def test_contradictory_or_missing_options_are_refused(options: list[str], message: str, project: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in str(run_cli(monkeypatch, "predict", "scenes", *options, "--out", "p.jsonl"))
    assert not Path("p.jsonl").exists()


@pytest.mark.parametrize(("out", "message"), [
    ("data", "onediff: data is a folder, but must be a file: give the path of a file"),
    ("params.yaml/p.jsonl", "onediff: params.yaml/p.jsonl cannot be written (File exists): give a path in a folder"),
    ("/proc/x/y", "onediff: /proc/x/y cannot be written (No such file or directory): give a path in a folder"),
])
def test_a_wrong_output_path_is_refused_before_the_model_loads(out: str, message: str, project: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "onediff", lambda _: pytest.fail("the model was loaded"))
    for command in (("predict", "scenes", "--model", "m"), ("references", "scenes")):
        assert str(run_cli(monkeypatch, *command, "--out", out)).startswith(message)


def test_a_folder_without_a_model_is_not_suggested_as_the_cure(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / predict.TRAINED).mkdir(parents=True)
    message = str(run_cli(monkeypatch, "predict", "scenes", "--model", str(predict.TRAINED), "--out", "p.jsonl"))
    assert "'make run' trains one in" in message and "give another model" not in message


def test_a_onediff_model_gives_the_captions_of_the_stage_caption(
        project: Path, scene_pairs: list[Record], micro: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from onediff.eval.caption import caption_records
    from onediff.model.assemble import build
    from onediff.model.captioner import Captioner

    model, processor = build(micro.model, seed=3)
    for part in (model, processor):
        part.save_pretrained("model")
    assert run_cli(monkeypatch, "predict", "scenes", "--model", "model", "--out", "p.jsonl") == 0
    expected = caption_records(Captioner.load(Path("model")), scene_pairs[:5], micro.caption, micro.tasks)
    assert list(read_predictions(Path("p.jsonl")).values()) == [text for _, text in expected]
