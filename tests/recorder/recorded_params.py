"""Record which keys of params.yaml a stage reads, by patching the sections to report every access to a value."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PHASES = {"align", "tune"}  # stages/training.py loads the parameters for both phases


def install(note: Callable[[str, str], None], set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Patch the sections so that note(stage, key) is called for every value that a stage reads."""
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
    """Remembers the stage and the key of every section that a stage has loaded."""

    def __init__(self, note: Callable[[str, str], None], section: type) -> None:
        self.note, self.section = note, section
        self.places: dict[int, tuple[str, str]] = {}
        self.kept: list[object] = []  # All labelled sections; a deleted section would free its id for another object.

    def label(self, section: Any, stage: str, place: str) -> None:
        """Remember the stage and the key of a section, and of all sections inside it."""
        self.places[id(section)] = (stage, place)
        self.kept.append(section)
        for name, value in vars(section).items():
            if isinstance(value, self.section):
                self.label(value, stage, f"{place}.{name}".lstrip("."))

    def read(self, section: object, name: str) -> None:
        """Report the access, except by tracking/runs.py, which only sends all parameters to MLflow."""
        if id(section) in self.places and sys._getframe(2).f_globals["__name__"] != "onediff.tracking.runs":
            stage, place = self.places[id(section)]
            self.note(stage, f"{place}.{name}".lstrip("."))


def _stage_that_loads() -> str | None:
    """Return the stage whose module called load_params, or None for command.py, which only checks the parameters."""
    frame = sys._getframe(3)
    module = frame.f_globals["__name__"]
    if module == "__main__":
        module = frame.f_globals["__spec__"].name
    stage = module.removeprefix("onediff.stages.")
    if stage == "training":
        return str(frame.f_locals["phase"])
    return None if stage in (module, "command") else stage


def undeclared(read: set[tuple[str, str]]) -> Iterator[str]:
    """Yield `stage: key` for each key that a stage has read but dvc.yaml does not list in the params of the stage."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage, key in sorted(read):
        declared = [item for item in stages[stage].get("params", ()) if isinstance(item, str)]
        declared += [str(items).strip("${}") for items in stages[stage].get("matrix", {}).values()]
        matches = any(f"{key}.".startswith(f"{_without_item(item, key)}.") for item in declared)
        if not matches and "params.yaml" not in stages[stage]["deps"]:
            yield f"{stage}: {key}"


def _without_item(declared: str, key: str) -> str:
    """Replace ${item.source} in a parameter of `synthesize` by the source in the key: data.scenes or data.edits."""
    return declared.replace("${item.source}", key.split(".")[1]) if key.startswith(("data.scenes", "data.edits")) \
        else declared


def append_to(path: str) -> Callable[[str, str], None]:
    """Return a function that appends each stage and key once per process to a file, which several processes share."""
    noted: set[tuple[str, str]] = set()

    def note(stage: str, key: str) -> None:
        if (stage, key) not in noted:
            noted.add((stage, key))
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{stage} {key}\n")

    return note


def read_notes(path: Path) -> set[tuple[str, str]]:
    """Return the pairs of stage and key in a file that `append_to` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(stage, key) for stage, key in map(str.split, lines)}


if "DVC_STAGE" in os.environ and "RECORDED_PARAMS" in os.environ:
    from onediff import interrupts

    interrupts._handle(interrupts._end_at_once)  # A signal during `install` ends the process without a traceback.
    install(append_to(os.environ["RECORDED_PARAMS"]))
    interrupts.handle_as_python_does()
