"""Which keys of params.yaml a stage reads: its sections are patched to note every value that code takes from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
PHASES = {"align", "tune"}  # stages/training.py reads the parameters for both


def install(note: Callable[[str, str], None], set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """note(stage, key) is called for every value that a stage takes from params.yaml."""
    from onediff import config
    from onediff.config import params

    recorder = Recorder(note, config.Section)
    checked, copied, dumped = params.checked, config.Section.model_copy, config.Section.model_dump

    def load(kind: type[config.Section], values: dict[str, Any], path: Path) -> config.Section:
        loaded: config.Section = checked(kind, values, path)
        stage = _stage_that_loads()
        if kind is config.Config and stage:
            recorder.label(loaded, stage, "")
        return loaded

    def get(section: config.Section, name: str) -> Any:
        value = object.__getattribute__(section, name)
        if name in type(section).model_fields and not isinstance(value, config.Section):
            recorder.read(section, name)
        return value

    def copy(section: config.Section, **changes: Any) -> config.Section:
        made = copied(section, **changes)
        if id(section) in recorder.places:
            recorder.label(made, *recorder.places[id(section)])
        return made

    def dump(section: config.Section, **options: Any) -> dict[str, Any]:
        for name in type(section).model_fields:
            recorder.read(section, name)
        return dumped(section, **options)

    set_attribute(params, "checked", load)
    for name, method in (("__getattribute__", get), ("model_copy", copy), ("model_dump", dump)):
        set_attribute(config.Section, name, method)


class Recorder:
    """Knows the stage and the place of every section of the parameters that a stage has loaded."""

    def __init__(self, note: Callable[[str, str], None], section: type) -> None:
        self.note, self.section = note, section
        self.places: dict[int, tuple[str, str]] = {}
        self.kept: list[object] = []  # Python gives an object's id to another one after its end

    def label(self, section: Any, stage: str, place: str) -> None:
        self.places[id(section)] = (stage, place)
        self.kept.append(section)
        for name, value in vars(section).items():
            if isinstance(value, self.section):
                self.label(value, stage, f"{place}.{name}".lstrip("."))

    def read(self, section: object, name: str) -> None:
        """tracking/runs.py sends all parameters to MLflow, which decides no result."""
        if id(section) in self.places and sys._getframe(2).f_globals["__name__"] != "onediff.tracking.runs":
            stage, place = self.places[id(section)]
            self.note(stage, f"{place}.{name}".lstrip("."))


def _stage_that_loads() -> str | None:
    """By the module that called load_params; command.py only checks the parameters before a stage."""
    frame = sys._getframe(3)
    module = frame.f_globals["__name__"]
    if module == "__main__":
        module = frame.f_globals["__spec__"].name
    stage = module.removeprefix("onediff.stages.")
    if stage == "training":
        return str(frame.f_locals["phase"])
    return None if stage in (module, "command") else stage


def undeclared(read: set[tuple[str, str]]) -> Iterator[str]:
    """The keys that a stage has read and dvc.yaml does not name in its params, as `stage: key`."""
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage, key in sorted(read):
        declared = [item for item in stages[stage].get("params", ()) if isinstance(item, str)]
        declared += [str(items).strip("${}") for items in stages[stage].get("matrix", {}).values()]  # names the item
        matches = any(f"{key}.".startswith(f"{_without_item(item, key)}.") for item in declared)
        if not matches and "params.yaml" not in stages[stage]["deps"]:
            yield f"{stage}: {key}"


def _without_item(declared: str, key: str) -> str:
    """The param data.${item.source} of `synthesize` stands for data.scenes and data.edits."""
    return declared.replace("${item.source}", key.split(".")[1]) if key.startswith(("data.scenes", "data.edits")) \
        else declared


def append_to(path: str) -> Callable[[str, str], None]:
    """Notes each key once per process, in a file that processes share."""
    noted: set[tuple[str, str]] = set()

    def note(stage: str, key: str) -> None:
        if (stage, key) not in noted:
            noted.add((stage, key))
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{stage} {key}\n")

    return note


def read_notes(path: Path) -> set[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(stage, key) for stage, key in map(str.split, lines)}


if "DVC_STAGE" in os.environ and "RECORDED_PARAMS" in os.environ:
    install(append_to(os.environ["RECORDED_PARAMS"]))
