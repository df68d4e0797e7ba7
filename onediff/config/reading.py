"""Reads a YAML file into checked objects, and explains each wrong value in one line: where, rule, got, cure."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
T = TypeVar("T", bound="Section")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # as DVC reads it: 1e-3 is a number
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.absolute()} not found: run this in the project's folder, where 'onediff preset "
                                "tiny' writes it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:  # comments alone, as in runtime.example.yaml
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of sections, got {type(values).__name__}")
    return values


def checked(kind: type[T], values: dict[str, Any], path: Path) -> T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, item, path) for item in error.errors())) from None


def _explain(kind: type[Section], item: Any, path: Path) -> str:
    """One pydantic error -> `params.yaml: align.lr_vison: unknown key; did you mean 'lr_vision'?`"""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        key, keys = str(item["loc"][-1]), _keys_at(kind, item["loc"][:-1])
        return f"{path}: {where}: unknown key; {did_you_mean(key, keys, 'remove it')}"
    if item["type"] == "missing":
        return f"{path}: {where}: missing; see presets/ for a complete file"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return "\n".join(f"{path}: {where + ': ' if where else ''}{line}" for line in message.split("\n"))
    return f"{path}: {where}: {message[0].lower() + message[1:]}, got {item['input']!r}"


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """A cure for a wrong name: the name that it resembles, or else `otherwise`."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def _keys_at(kind: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    for key in loc:
        annotation = kind.model_fields[str(key)].annotation
        sections = [part for part in (annotation, *get_args(annotation))  # the arguments of `Section | None`, too
                    if isinstance(part, type) and issubclass(part, Section)]
        if not sections:
            return []
        kind = sections[0]
    return list(kind.model_fields)
