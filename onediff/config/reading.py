"""Read a YAML file into checked objects, and explain each wrong value in one line.

The line says where the value is, which rule it breaks, what was got, and how to correct it.
"""

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
    """The base class of all sections: immutable, without type conversion, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file that holds a mapping; a file with comments only gives an empty dictionary.

    Raises FileNotFoundError, or ValueError with the line number if the file cannot be parsed.
    """
    try:
        # DVC also uses ruamel.yaml, which reads 1e-3 as a number. PyYAML reads it as text.
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.absolute()} does not exist; run this command in the project's folder, where "
                                "'onediff preset tiny' writes the file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8, got {error.reason} at byte {error.start}; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:  # The file contains only comments, like runtime.example.yaml.
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must map keys to values, got a {type(values).__name__}; see presets/ for an example")
    return values


def checked(kind: type[T], values: dict[str, Any], path: Path) -> T:
    """Return the values of a YAML file as an object of class `kind`.

    Raises ValueError with a line for each wrong value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, item, path) for item in error.errors())) from None


def _explain(kind: type[Section], item: Any, path: Path) -> str:
    """Turn a pydantic error into a line: `params.yaml: align.lr_vison: unknown key; did you mean 'lr_vision'?`"""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        key, keys = str(item["loc"][-1]), _keys_at(kind, item["loc"][:-1])
        return f"{path}: {where}: unknown key; {did_you_mean(key, keys, 'remove it')}"
    if item["type"] == "missing":
        return f"{path}: {where}: this key is missing; see presets/ for a complete file"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return "\n".join(f"{path}: {where + ': ' if where else ''}{line}" for line in message.split("\n"))
    return f"{path}: {where}: {message[0].lower() + message[1:]}, got {item['input']!r}"


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """Suggest the name of `names` that resembles the wrong name, or return `otherwise` if none does."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def _keys_at(kind: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are allowed at the path `loc` below `kind`; empty if no section is at this path."""
    for key in loc:
        annotation = kind.model_fields[str(key)].annotation
        # This also finds the section of an optional key, whose type is `Section | None`.
        sections = [part for part in (annotation, *get_args(annotation))
                    if isinstance(part, type) and issubclass(part, Section)]
        if not sections:
            return []
        kind = sections[0]
    return list(kind.model_fields)
