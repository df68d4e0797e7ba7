"""The page on a validation: what was counted, and what the bad pairs look like. One file that needs no network."""

import base64
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from onediff.data.quality.probe import read_group, row_groups_with
from onediff.inputs.images import open_image

THUMBNAIL_PX = 160
SHOWN = 200  # characters of a bad pair's captions
_RANDOM = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_TIMES = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z?|\d{8}T\d{6}(?:\.\d+)?Z"
# Scripts and remote pictures, which Great Expectations' page loads from six hosts; times and random names, without
# which the same data gives the same page.
_LEFT_OUT = (re.compile(r"<script\b.*?</script>", re.DOTALL),
             re.compile(r"<nav class=\"navbar navbar-expand.*?</nav>\s*</div>\s*</nav>", re.DOTALL),
             re.compile(r"<footer\b.*?</footer>", re.DOTALL), re.compile(r"<(?:img|link)\b[^>]*>"),
             re.compile(rf"-{_RANDOM}|{_TIMES}"))


def page(suites: Iterable[Mapping[str, Any]], complaints: list[str], bad_pairs: Mapping[int, Mapping[str, Any]]) -> str:
    """`suites`: what checks.py counted in each; `complaints`: what stops the run; `bad_pairs` by their place."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"thousands": "{:,}".format, "percent": "{:.2%}".format}
    template = environment.from_string(Path(__file__).with_name("checks.html.j2").read_text(encoding="utf-8"))
    return template.render(suites=suites, complaints=complaints, offenders=bad_pairs) + "\n"


def offline(expectations: str) -> str:
    """The body of Great Expectations' page, without what needs a network or differs from run to run."""
    body = expectations.partition("<body")[2].partition(">")[2].rpartition("</body>")[0]
    for pattern in _LEFT_OUT:
        body = pattern.sub("", body)
    return body


def read_bad_pairs(shard_folders: list[Path], pair_ids: Mapping[int, str]) -> dict[int, dict[str, Any]]:
    """By place in the shards: small JPEGs as data URIs, or why there is none, and the start of the captions.

    `pair_ids` are those of the places. Raises ValueError if another pair stands there.
    """
    places, shown = np.array(sorted(pair_ids), dtype=np.int64), {}
    for path, group, rows, part in row_groups_with(shard_folders, places) if pair_ids else ():
        records = list(read_group(path, group))
        for place, row in zip(places[part].tolist(), rows, strict=True):
            record, captions = records[row], " | ".join(records[row].references)
            if record.pair_id != pair_ids[place]:
                raise ValueError(f"{path}: not what data/probe.parquet was made of; 'dvc repro' makes it again")
            shown[place] = {"images": [thumbnail(image, THUMBNAIL_PX, quality=80) for image in record.images],
                            "captions": captions[:SHOWN] + ("..." if len(captions) > SHOWN else "")}
    return shown


def thumbnail(content: bytes, size_px: int, *, quality: int, resample: Image.Resampling = Image.Resampling.BICUBIC,
              absent: str = "no image") -> str:
    """The image as a small JPEG in a data URI, `absent` for no content, or what is wrong with it."""
    try:
        image = open_image(content)
    except ValueError as error:
        return str(error) if content else absent
    image.thumbnail((size_px, size_px), resample)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
