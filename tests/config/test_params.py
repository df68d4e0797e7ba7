"""Tests of loading params.yaml, runtime.yaml and the presets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from onediff.config import Config, Drift, Judge, Section, load_params, load_runtime
from onediff.train.engine import learning_rates

ROOT = Path(__file__).resolve().parents[2]
TINY = (ROOT / "presets/tiny.yaml").read_text()


def _written(folder: Path, old: str, new: str) -> Path:
    """Write the tiny preset with one replacement of text as params.yaml, and return the path."""
    assert old in TINY, f"presets/tiny.yaml no longer holds {old!r}"
    path = folder / "params.yaml"
    path.write_text(TINY.replace(old, new, 1))
    return path


@pytest.mark.parametrize("name", ["micro", "tiny", "paper"])
def test_every_preset_loads(name: str) -> None:
    load_params(ROOT / f"presets/{name}.yaml")


def test_preset_micro_has_the_model_of_preset_tiny_and_less_data() -> None:
    micro, tiny = (load_params(ROOT / f"presets/{name}.yaml") for name in ("micro", "tiny"))
    assert micro.model == tiny.model
    assert micro.data.scenes.num_scenes.train < tiny.data.scenes.num_scenes.train


def test_preset_paper_has_the_settings_of_the_paper() -> None:
    paper = load_params(ROOT / "presets/paper.yaml")
    assert (paper.model.vision.image_px // paper.model.vision.patch_px) ** 2 == 576
    assert paper.model.delta.inputs == "pair" and paper.model.delta.levels == [8, 8, 16, 16, 24, 24]
    assert learning_rates(paper.align) == {"vision": 0, "delta": 1e-3, "projector": 1e-3, "language": 0}
    assert all(learning_rates(paper.tune).values())
    runtime = load_runtime(ROOT / "presets/paper.runtime.yaml")
    for phase in (paper.align, paper.tune):
        assert phase.batch_size % (runtime.gpus * (runtime.micro_batch_size or 1)) == 0


def test_scientific_notation_without_a_dot_is_read_as_a_number() -> None:
    assert load_params(ROOT / "presets/tiny.yaml").tune.lr_delta == 0.001


@pytest.mark.parametrize(("old", "new", "message"), [
    ("lr_vision: 0 ", "lr_vison: 0 ", r"align\.lr_vison: unknown key; did you mean 'lr_vision'\?"),
    ("seed: 7", "seed: seven", r"params\.yaml: seed: .*got 'seven'"),
    ("seed: 7", "seed: -1", r"params\.yaml: seed: .*got -1"),
    ("seed: 7\n", "", r"params\.yaml: seed: this key is missing"),
    ("    image_px: 96\n    patch_px: 12", "    image_px: 100\n    patch_px: 16",
     r"model\.vision: image_px 100 is not a multiple of patch_px 16; nearest are 96 and 112"),
    ("levels: [2, 2, 4, 4]", "levels: [2, 2, 4, 5]", r"delta\.levels must not exceed vision\.layers 4, got 5"),
    ("levels: [2, 2, 4, 4]", "levels: [4, 2]", r"levels \[4, 2\] must be sorted in ascending order"),
    ("heads: 4", "heads: 3", r"width 128 is not a multiple of heads 3"),
    ("reading: C", "reading: B", r"token layout B .*patch_pool must be 1"),
    ("places: 12", "places: 7", r"delta\.fusion\.places must divide the 96 / 4 cells per side .*, got 7"),
    ("places: 12", "places: 6", r"places must be at least 8, because each place sees 3 of the 24 cells .*, got 6"),
    ("num_tokens: 8", "num_tokens: 0", r"fusion needs delta tokens, so num_tokens must be above 0, got 0"),
    ("patch_level: -1", "patch_level: 9", r"patch_level must be from -5 to 4 .*, got 9"),
    ("  epochs: null", "  epochs: 1", r"set exactly one of the keys steps and epochs"),
    ("lr_inherited: null", "lr_inherited: 1e-4", r"align\.lr_inherited: this is the rate of weights from BERT, but "),
    ("lr_delta: 2e-3\n  lr_inherited: null", "lr_delta: 0\n  lr_inherited: 1e-4",
     r"align: lr_inherited must be null if lr_delta is 0, .*, got 0\.0001; set lr_delta above 0"),
    ("loss: tokens", "loss: words", r"align\.loss: .*'tokens' or 'samples'.*got 'words'"),
    ("weight_decay: {vision: 0, delta: 0, projector: 0, language: 0}", "weight_decay: 0.05",
     r"align\.weight_decay: must be a section with keys and values, got 0\.05"),
    ("  mixture: {scenes: 1}", "  mixture: {edit: 1}",
     r"align\.mixture: 'edit' is not one of the sources scenes, edits; did you mean 'edits'\?"),
    ("generated: [scenes, edits]", "generated: []", r"at least one source, got none; add one to generated"),
    ("raw: []", "raw: [scenes]", r"source 'scenes' must occur only once in generated, raw"),
    ("raw: []", "raw: [My pairs]", r"data\.raw\.0: .*got 'My pairs'"),
    ("retrieved: []", "retrieved: [coco]", r"the pairs of source 'coco' have no captions; add the source to"),
    ("written: []", "written: [coco]", r"written lists 'coco', but only these sources are allowed there: \[\]"),
    ("partial: []", "partial: [edits]", r"partial lists 'edits', but only these sources are allowed there: \[\]"),
    ("tolerance: {generated: 0.01, raw: 0.01}", "tolerance: 0.01", r"data\.tolerance: .*got 0\.01"),
    ("max_distance: {}", "max_distance: {mnie: 2.0}",
     r"data\.leaks\.max_distance: 'mnie' is not one of the sources scenes, edits; correct the name"),
    ("action: stop", "action: warn", r"data\.leaks\.action: .*'drop' or 'stop'.*got 'warn'"),
    ("renderer: raytracer", "renderer: povray", r"data\.scenes\.renderer: .*got 'povray'"),
    ("photograph: 0.4", "photograph: 1.6", r"data\.edits\.shares\.photograph: .*got 1\.6"),
    ("photograph: 0.4", "photograph: 0.5", r"data\.edits\.shares: .* must add up to 1, got 1\.1"),
    ("light: [0.85, 1.18]", "light: [0.6, 1.18]", r"light \[0\.6, 1\.18\] must contain 1 and be inside edit_light"),
    ("  blur_px: 0.35", "  blur_px: 0.8", r"blur_px 0\.8 must be below edit_blur_px 0\.7"),
    ("min_objects: 3", "min_objects: 6", r"min_objects 6 must not be above max_objects 4"),
    ("max_distance: 0.25", "max_distance: 25", r"drift\.max_distance: .*got 25"),
    ("min_pairs: 100", "min_pairs: 1", r"drift\.min_pairs: .*got 1"),
    ("chance: 0.01", "chanse: 0.01", r"drift\.chanse: unknown key; did you mean 'chance'\?"),
    ("seed: 7", "seed: [7", r"params\.yaml line \d+: not valid YAML"),
])
def test_the_error_for_a_wrong_value_contains_the_key_the_rule_and_the_value(tmp_path: Path, old: str, new: str,
                                                                             message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_params(_written(tmp_path, old, new))


@pytest.mark.parametrize(("key", "message"), [
    ("writer", r"source 'instruct_pix2pix' needs the key writer, .* see presets/paper\.yaml"),
    ("retrieval", r"source 'coco' needs the key retrieval"), ("clip", r"source 'coco' needs the key clip")])
def test_the_error_lists_the_key_that_a_source_needs(tmp_path: Path, key: str, message: str) -> None:
    values = YAML(typ="safe").load((ROOT / "presets/paper.yaml").read_text())
    values["data"][key] = None
    YAML().dump(values, tmp_path / "params.yaml")
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path / "params.yaml")


def test_one_error_lists_every_wrong_value(tmp_path: Path) -> None:
    path = _written(tmp_path, "seed: 7", "seed: x")
    path.write_text(path.read_text().replace("num_beams: 1", "num_beams: 0"))
    with pytest.raises(ValueError, match=r"(?s)seed.*\n.*num_beams"):
        load_params(path)


def test_the_error_for_a_missing_params_yaml_says_how_to_create_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="onediff preset tiny"):
        load_params(tmp_path / "params.yaml")


def test_a_folder_instead_of_a_yaml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder, but must be a YAML file"):
        load_runtime(tmp_path)


def test_a_byte_order_mark_at_the_start_of_a_yaml_file_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.encode())
    assert load_params(path) == load_params(ROOT / "presets/tiny.yaml")


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"seed: \xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        load_params(path)


def test_an_error_of_yaml_names_an_existing_line_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text("seed: [\n")
    with pytest.raises(ValueError, match=r"runtime\.yaml line 1: not valid YAML: .*; check the brackets"):
        load_runtime(path)
    path.unlink()
    monkeypatch.setenv("ONEDIFF_NODES", "[")
    with pytest.raises(ValueError, match=r"^ONEDIFF_NODES line 1: not valid YAML: .*; check the brackets"):
        load_runtime(path)


@pytest.mark.parametrize(("text", "message"), [
    ("serve: 3", r"serve: must be a section with keys and values, got 3"),
    ("serve: {pairs: 200}", r"serve: pairs must be at most waiting_pairs, got 200 and 128, because .*; raise waiting_"),
    ("serve: {body_mb: .inf}", r"serve\.body_mb: input should be a finite number, got inf")])
def test_wrong_limits_of_the_server_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_runtime(path)


def test_environment_variables_override_runtime_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text("workers: 3\ngpus: 5\n")
    monkeypatch.setenv("ONEDIFF_WORKERS", "7")
    assert (load_runtime(path).workers, load_runtime(path).gpus) == (7, 5)


def test_runtime_example_yaml_lists_every_key_with_its_default(tmp_path: Path) -> None:
    lines = (ROOT / "runtime.example.yaml").read_text().splitlines()
    path = tmp_path / "runtime.yaml"
    path.write_text("\n".join(line.removeprefix("# ") for line in lines if re.match("# [a-z_]+: ", line)))
    from onediff.config import Runtime

    assert load_runtime(path) == Runtime()
    assert set(Runtime.model_fields) == {line.split(":")[0] for line in path.read_text().splitlines()}


def test_runtime_example_yaml_loads_and_changes_no_default() -> None:
    assert load_runtime(ROOT / "runtime.example.yaml") == load_runtime(ROOT / "no such file")


def _sections(kind: type[Section]) -> Iterator[type[Section]]:
    """Yield the class of a section and the classes of all sections inside it."""
    yield kind
    for field in kind.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                yield from _sections(part)


# No stage reads the sections `drift` and `judge`, so they may have default values.
SECTIONS_OF_STAGES = sorted(set(_sections(Config)) - {Drift, Judge}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("section", SECTIONS_OF_STAGES)
def test_sections_that_a_stage_reads_have_no_default_values(section: type[Section]) -> None:
    """DVC would not notice a changed default value, because onediff/config is not a dependency of any stage."""
    optional = {name for name, field in section.model_fields.items() if not field.is_required()}
    assert optional == ({"drift", "judge"} if section is Config else set())


@pytest.mark.parametrize("section", SECTIONS_OF_STAGES)
def test_sections_that_a_stage_reads_have_no_methods_except_checks(section: type[Section]) -> None:
    """DVC would not notice a changed method or property of a section, although the change could alter a result."""
    own = [vars(parent) for parent in section.__mro__[:section.__mro__.index(Section)]]
    methods = {name for names in own for name, value in names.items() if callable(value) or isinstance(value, property)}
    checks = set(section.__pydantic_decorators__.model_validators)
    assert {name for name in methods - checks if not name.startswith("__")} == set()
