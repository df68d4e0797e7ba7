"""Renders the validation page: one HTML file with the number of bad pairs of each rule and images of some of them."""

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from onediff.data.quality.probe import read_group, row_groups_with
from onediff.inputs.images import jpeg, open_image

THUMBNAIL_PX = 160
SHOWN = 200  # largest number of characters shown of the captions of a bad pair
MEANINGS = {  # maps each suite to the heading of its section on the page
    "generated": "Generated pairs", "raw": "Published, retrieved and own pairs",
    "diffcap": "The training corpus DiffCap"}
_RANDOM = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_TIMES = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z?|\d{8}T\d{6}(?:\.\d+)?Z"
# The page that Great Expectations renders loads scripts and images from six hosts, and links to a missing page.
# The page that Great Expectations renders contains times and random names, so it would differ in each run.
_LEFT_OUT = (re.compile(r"<script\b.*?</script>", re.DOTALL),
             re.compile(r"<nav class=\"navbar navbar-expand.*?</nav>\s*</div>\s*</nav>", re.DOTALL),
             re.compile(r"<footer\b.*?</footer>", re.DOTALL), re.compile(r"<(?:img|link)\b[^>]*>"),
             re.compile(r"<a\b[^>]*>|</a>"), re.compile(r"<th >\s*</th>"),
             re.compile(rf"-{_RANDOM}|{_TIMES}"))


def page(suites: Iterable[Mapping[str, Any]], complaints: list[str], bad_pairs: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the validation page as HTML.

    `suites` holds the values that checks.py computes for each suite of rules. `complaints` lists the reasons why the
    data may not be used. `bad_pairs` is the result of read_bad_pairs: the images and the captions of the bad pairs.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"thousands": "{:,}".format, "percent": "{:.2%}".format}
    template = environment.from_string(Path(__file__).with_name("checks.html.j2").read_text(encoding="utf-8"))
    return template.render(suites=suites, complaints=complaints, offenders=bad_pairs, meanings=MEANINGS) + "\n"


def offline(expectations: str) -> str:
    """Return the body of an HTML page of Great Expectations, without parts that load from the network or vary."""
    body = expectations.partition("<body")[2].partition(">")[2].rpartition("</body>")[0]
    for pattern in _LEFT_OUT:
        body = pattern.sub("", body)
    return body


def read_bad_pairs(shard_folders: list[Path], pair_ids: Mapping[int, str]) -> dict[int, dict[str, Any]]:
    """Return a dict from the position of each given pair to its images and the start of its captions.

    `pair_ids` maps the position of a pair in all shards to the expected pair_id. Each image is a thumbnail as data URI,
    or a text that says why the image cannot be shown. Raises ValueError if a position holds another pair.
    """
    positions, shown = np.array(sorted(pair_ids), dtype=np.int64), {}
    for path, group, rows, part in row_groups_with(shard_folders, positions) if pair_ids else ():
        records = list(read_group(path, group))
        for position, row in zip(positions[part].tolist(), rows, strict=True):
            record, captions = records[row], " | ".join(records[row].references)
            if record.pair_id != pair_ids[position]:
                raise ValueError(f"{path}: contains pair {record.pair_id} where data/probe.parquet lists pair "
                                 f"{pair_ids[position]}; run 'dvc repro' to write data/probe.parquet again")
            shown[position] = {"images": [thumbnail(image, THUMBNAIL_PX, quality=80) for image in record.images],
                            "captions": captions[:SHOWN] + ("..." if len(captions) > SHOWN else "")}
    return shown


def thumbnail(content: bytes, size_px: int, *, quality: int, resample: Image.Resampling = Image.Resampling.BICUBIC,
              absent: str = "no image") -> str:
    """Return a JPEG thumbnail of an image, at most `size_px` wide and high, as data URI.

    `content` holds the bytes of the image file. If it is empty, return the text `absent`; if the image cannot be
    decoded, return the error message.
    """
    try:
        image = open_image(content)
    except ValueError as error:
        return str(error) if content else absent
    image.thumbnail((size_px, size_px), resample)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(image, quality=quality)).decode()}"
