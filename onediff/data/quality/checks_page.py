"""The page on a validation: what was counted, and what the offenders look like. One file that needs no network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from onediff.data.quality.probe import read_group, row_groups
from onediff.data.record import Record
from onediff.inputs.images import open_image

THUMBNAIL_PX = 160
SHOWN = 200  # characters of an offender's captions
_RANDOM = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_TIMES = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z?|\d{8}T\d{6}(?:\.\d+)?Z"


@dataclass(frozen=True)
class Offender:
    """A bad pair as the page shows it: small JPEGs as data URIs or why there is none, and the start of its captions."""

    images: list[str]
    captions: str


def page(suites: Iterable[Mapping[str, Any]], complaints: list[str], offenders: Mapping[int, Offender]) -> str:
    """`suites`: what checks.py counted in each; `complaints`: what stops the run; `offenders` by their place."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda count: f"{count:,}"
    environment.filters["percent"] = lambda share: f"{share:.2%}"
    template = environment.from_string(Path(__file__).with_name("checks.html.j2").read_text(encoding="utf-8"))
    return template.render(suites=suites, complaints=complaints, offenders=offenders) + "\n"


def offline(expectations: str) -> str:
    """The body of Great Expectations' page, without the scripts and remote pictures that it loads from six hosts, and
    without times and random names, so that the same data gives the same page."""
    body = expectations.partition("<body")[2].partition(">")[2].rpartition("</body>")[0]
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.S)
    body = re.sub(r"<nav class=\"navbar navbar-expand.*?</nav>\s*</div>\s*</nav>", "", body, flags=re.S)
    body = re.sub(r"<footer\b.*?</footer>", "", body, flags=re.S)
    body = re.sub(r"<(?:img|link)\b[^>]*>", "", body)
    return re.sub(rf"-{_RANDOM}|{_TIMES}", "", body)


def read_offenders(shard_folders: list[Path], wanted: Mapping[int, str]) -> dict[int, Offender]:
    """Pairs by their place in the shards; `wanted` are their pair_ids. Raises ValueError if another pair stands there.
    """
    places, found = np.array(sorted(wanted), dtype=np.int64), {}
    for path, group, start, end in row_groups(shard_folders) if wanted else ():
        here = {int(place) for place in places[(places >= start) & (places < end)]}
        for place, record in enumerate(read_group(path, group) if here else (), start):
            if place in here and record.pair_id != wanted[place]:
                raise ValueError(f"{path}: not what data/probe.parquet was made of; 'dvc repro' makes it again")
            if place in here:
                found[place] = _offender(record)
    return found


def _offender(record: Record) -> Offender:
    said = " | ".join(record.references)
    return Offender([_thumbnail(image) for image in record.images], said[:SHOWN] + ("..." if len(said) > SHOWN else ""))


def _thumbnail(content: bytes) -> str:
    try:
        image = open_image(content)
    except ValueError as error:
        return str(error) if content else "no image"
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
