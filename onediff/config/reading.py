"""Read a YAML file into checked objects, and explain each wrong value in one line.

The line says where the value is, which rule it breaks, what was got, and how to correct it.
"""

import difflib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from onediff.encoding import read_text

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
SourceName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
T = TypeVar("T", bound="Section")


class Section(BaseModel):
    """The base class of all sections of a settings file. Sections are immutable and reject unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that maps keys to values. If the file contains only comments, return an empty dictionary.

    Raises FileNotFoundError if the file does not exist, and ValueError if it is not valid YAML or not a mapping.
    """
    try:
        values = parse_yaml(read_text(path, "a YAML file"), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.absolute()} does not exist; run this command in the project's folder, where "
                                "'onediff preset tiny' writes the file") from None
    if values is None:  # The YAML file contains only comments, like runtime.example.yaml.
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must map keys to values, got a {type(values).__name__}; see presets/ for an example")
    return values


def parse_yaml(text: str, place: str) -> Any:
    """Return the value of a YAML text. Raises ValueError, which names `place` and the line, if it is not valid YAML."""
    try:
        # ruamel.yaml reads 1e-3 as a number, as DVC does, which also uses it. PyYAML would read 1e-3 as text.
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # The mark of an error at the end of the text is one line after the last line.
        line = f" line {min(mark.line + 1, max(1, len(text.splitlines())))}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ValueError(f"{place}{line}: not valid YAML: {problem}; check the brackets, quotes and indentation of "
                         "this line and of the lines before it") from None


def with_values(path: Path, changes: Iterable[str]) -> str:
    """Return the text of a YAML file with other values; the comments are kept.

    Each change is KEY=VALUE, for example align.lr_delta=3e-4. Raises ValueError if it has another form, or if a section
    in the key does not exist.
    """
    yaml, text = YAML(), io.StringIO()
    yaml.width = 4096  # Break no line.
    document = yaml.load(read_text(path, "a YAML file"))
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise ValueError(f"--set must be KEY=VALUE, got {change}; write for example align.lr_delta=3e-4")
        *names, last = key.split(".")
        section = document
        for name in names:
            section = section.get(name)
            if not isinstance(section, dict):
                raise ValueError(f"--set {change}: '{name}' is not a section of params.yaml; see {path} for the keys")
        section[last] = parse_yaml(value, f"--set {change}")
    yaml.dump(document, text)
    return text.getvalue()


def checked(kind: type[T], values: dict[str, Any], path: Path) -> T:
    """Convert the values of a YAML file to an object of class `kind`.

    Raises ValueError whose message has one line for each wrong value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, item, path) for item in error.errors())) from None


def _explain(kind: type[Section], item: Any, path: Path) -> str:
    """Convert a pydantic error to text such as `params.yaml: align.lr_vison: unknown key; did you mean 'lr_vision'?`"""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        key, keys = str(item["loc"][-1]), _keys_at(kind, item["loc"][:-1])
        return f"{path}: {where}: unknown key; {did_you_mean(key, keys, 'remove it')}"
    if item["type"] == "missing":
        return f"{path}: {where}: this key is missing; see presets/ for a complete file"
    if item["type"] == "model_type":
        return f"{path}: {where}: must be a section with keys and values, got {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return "\n".join(f"{path}: {where + ': ' if where else ''}{line}" for line in message.split("\n"))
    return f"{path}: {where}: {message[0].lower() + message[1:]}, got {item['input']!r}"


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """Return the question "did you mean ...?" with the most similar of `names`, or `otherwise` if none is similar."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def _keys_at(kind: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    """Return the allowed keys of the section at the path `loc` below `kind`, or an empty list if there is no section.

    For example, the path ("model", "vision") below Config is the section model.vision of params.yaml.
    """
    for key in loc:
        annotation = kind.model_fields[str(key)].annotation
        # The type of an optional section is `Section | None`, so the parts of a union type are searched too.
        sections = [part for part in (annotation, *get_args(annotation))
                    if isinstance(part, type) and issubclass(part, Section)]
        if not sections:
            return []
        kind = sections[0]
    return list(kind.model_fields)
