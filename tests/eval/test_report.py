from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from onediff.data.record import Record
from onediff.eval.metrics import METRICS
from onediff.eval.report import choose, data_uri, example, line_chart, render_page, smooth, thin

VOID = {"meta", "img", "br", "input", "link"}


class Balanced(HTMLParser):
    """Every opened tag is closed in order; remembers links to elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        links = [value for name, value in attrs if name in ("src", "href") and value]
        self.outside += [value for value in links if not value.startswith(("#", "data:"))]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), color).save(buffer, "PNG")
    return buffer.getvalue()


def record(pair_id: str = "a", change_type: str = "add", source: str = "scenes") -> Record:
    thing = {"shape": "cube", "color": "red", "size": "big", "material": "matte"}
    where = {"object": thing, "new": None, "region_before": None, "region_after": [10, 5, 30, 15]}
    references = ["a red cube <i>was</i> added"]
    return Record(pair_id, source, "test", "g", png(), png("blue"), references, "What?", change_type, where)


def result() -> dict[str, Any]:
    scores = dict.fromkeys(METRICS, 0.5)
    return {**scores, "score_intervals": {name: [0.41, 0.59] for name in METRICS}, "num_pairs": 3,
            "protocol": "coco-caption/v1", "references": "0f", "leave_one_out": {**scores, "num_pairs": 2},
            "floor": {"constant": {**scores, "sentence": "no <change>"}, "random_train": scores},
            "by_change_type": {"add": {"num_pairs": 3, "CIDEr": 1.0, "ROUGE-L": 0.4}}, "change_type_accuracy": 0.8765,
            "false_alarm_rate": 0.0, "change_type_accuracy_by_type": {"add": 0.8765},
            "intervals": {"change_type_accuracy": [0.8, 0.9], "false_alarm_rate": [0.0, 0.0]},
            "changed": {"num_pairs": 2, "CIDEr": 1.0, "oracle_CIDEr": 2.0, "oracle_ratio": 0.5}}


def page(**changes: Any) -> str:
    card = {"num_pairs": {"train": {"scenes": {"add": 7}}, "test": {"scenes": {"add": 3}}}, "num_quarantined": 11,
            "leaks": {"images": 0, "groups": 0, "near_train_images": {"scenes": {"test": 13}}, "near_bits": 3}}
    lines = [{"step": step, "loss": 1 / step, "pairs_per_s": 17.0, "seconds": step / 2} for step in range(1, 50)]
    values: dict[str, Any] = {
        "when": "now", "subtitle": "s", "params": "seed: 7  # <b>",
        "metrics": {"scenes": result()}, "gate": {"scenes": result()},
        "curves": {"align": lines, "tune": [*lines, {"step": 49, "val_CIDEr": 1.5}]}, "card": card,
        "gallery": {"scenes": [example("scenes", record(), "a red <b>cube</b> & more")]}}
    return render_page(**values | changes)


def test_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    html = page()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == [] and parser.outside == []
    assert not re.search(r"<script|@import|url\(|https?://", html)
    for shown in ("87.6", "80.0 to 90.0", "11 pairs quarantined", "test 13", "<td>17</td>", "reaches 50.0 %",
                  "val CIDEr, last value 150"):
        assert shown in html, shown


def test_captions_and_parameters_are_escaped() -> None:
    html = page()
    for text in ("a red &lt;b&gt;cube&lt;/b&gt; &amp; more", "&lt;i&gt;was&lt;/i&gt;", "no &lt;change&gt;",
                 "seed: 7  # &lt;b&gt;"):
        assert text in html, text
    assert "<b>" not in html


def test_page_without_curves_gate_or_gallery() -> None:
    html = page(curves={"align": [], "tune": []}, gate={}, gallery={})
    assert "0 steps" in html


def test_images_come_back_from_the_page() -> None:
    uri = re.search(r'src="data:image/png;base64,([^"]+)"', page())
    assert uri and base64.b64decode(uri[1]) == png()
    assert data_uri(b"\xff\xd8abc").startswith("data:image/jpeg;")


def test_regions_are_percent_of_the_image() -> None:
    shown = example("scenes", record(), "a red cube was added")
    assert (shown.region_before, shown.region_after, shown.right) == (None, [25.0, 25.0, 50.0, 50.0], True)
    assert not example("scenes", record(), "a blue cube was added").right


def test_gallery_shows_failures_of_every_type() -> None:
    rows = [vars(record(f"{kind}{i}", kind)) for kind in ("add", "drop", "none") for i in range(5)]
    said = {row["pair_id"]: "nothing has changed" for row in rows} | {"add3": "a red cube was added"}
    said |= {f"drop{i}": "the red cube is gone" for i in range(1, 5)}
    assert choose("scenes", rows, said, per_type=4) == [
        "add3", "add0", "add1", "add2", "drop1", "drop2", "drop3", "drop0", "none0", "none1", "none2", "none3"]


def test_chart_starts_at_zero_and_ends_at_the_last_point() -> None:
    points = [(float(x), 2.0) for x in range(10)]
    path = re.findall(r'class="strong" points="([^"]+)"', line_chart([], points, label="loss"))[0].split()
    assert path[0].startswith("44.0,") and path[-1] == "548.0,8.0"
    assert "step 9" in line_chart([], points, label="loss") and "<polyline" in line_chart([], points[:1], label="one")


def test_smoothing_keeps_a_straight_line_and_thinning_keeps_the_ends() -> None:
    line = [(float(x), 3.0 * x) for x in range(600)]
    assert smooth(line)[300] == pytest.approx(line[300])
    assert thin(line)[0] == line[0] and thin(line)[-1] == line[-1] and len(thin(line)) <= 241


def test_page_tells_how_fast_each_phase_was() -> None:
    lines = [{"step": step, "loss": 1.0, "pairs_per_s": 17.0 + step, "padding_share": 0.125, "seconds": 1.0}
             for step in range(3)]
    told = page(curves={"tune": lines})
    for cell in ("<th>rows/s</th>", "<td>18</td>", "<th>padding left out</th>", "<td>12.5%</td>"):
        assert cell in told
    assert "MFU" not in told
