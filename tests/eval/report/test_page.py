from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from browser import faults_of, needs_chromium
from PIL import Image

from onediff.data.record import Record
from onediff.eval.metrics.catalog import METRICS
from onediff.eval.report.figures import INSIDE, POINTING, figures
from onediff.eval.report.gallery import Album, Example, example
from onediff.eval.report.page import ModelResults, render_page

VOID = {"meta", "img", "br", "input", "link"}


class Balanced(HTMLParser):
    """A parser that checks that all tags are closed in order, and collects links to other files in `outside`."""

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
    cube = {"shape": "cube", "color": "red", "size": "big", "material": "matte"}
    where = {"object": cube, "new": None, "region_before": None, "region_after": [10, 5, 30, 15]}
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


def stress() -> dict[str, Any]:
    """Return a short version of the figures that stage `stress` writes for one benchmark."""
    rates = {"false_alarm_rate": 0.25, "same_caption_rate": 0.125,
             "intervals": {"false_alarm_rate": [0.1, 0.4], "same_caption_rate": [0.0, 0.2]}}
    point = {"change_type_accuracy": 0.75, "CIDEr": 1.0, "intervals": {"change_type_accuracy": [0.7, 0.8],
                                                                       "CIDEr": [0.9, 1.1]}}
    keys = (*INSIDE, *POINTING)
    attention = {"num_images": 5, **dict.fromkeys(keys, 0.375), "intervals": {key: [0.3, 0.45] for key in keys}}
    return {"num_pairs": 3, "identical": rates, "swapped": {**rates, "left_out": {"crop": 17}},
            "curves": {"noise": {"none": point, "5": point}},
            "attention": {**attention, "by_change_type": {"add": attention}}}


def pair(prediction: str) -> Example:
    grid = [[0.25, 0.25], [0.0, 0.0]]
    return example(record(), prediction, scores={"CIDEr": 1.375}, maps={"before": grid, "after": grid})


def page(**changes: Any) -> str:
    card = {"num_pairs": {"train": {"scenes": {"add": 7}}, "test": {"scenes": {"add": 3}}}, "num_quarantined": 11,
            "leaks": {"images": 0, "groups": 0, "near_train_images": {"scenes": {"test": 13}}, "near_bits": 3}}
    lines = [{"step": step, "loss": 1 / step, "pairs_per_s": 17.0, "seconds": step / 2} for step in range(1, 50)]
    values: dict[str, Any] = {
        "when": "now", "subtitle": "s", "params": "seed: 7  # <b>",
        "metrics": {"scenes": result()}, "gate": {"scenes": result()},
        "stress": {"scenes": stress()}, "audit": {"benchmarks": {"scenes": {"num_pairs": 3, "verdict": "clean"}}},
        "curves": {"align": lines, "tune": [*lines, {"step": 49, "val_CIDEr": 1.5}]}, "card": card,
        "albums": {"scenes": Album(shown=[pair("a red <b>cube</b> & more")])}} | changes
    albums = values.pop("albums")
    return render_page(ModelResults(**values), albums, figures(values["metrics"], values["stress"], values["curves"]))


def test_the_page_has_balanced_tags_and_loads_no_other_file() -> None:
    html = page()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == [] and parser.outside == []
    assert not re.search(r"<script \w|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", html)
    for shown in ("87.6", "80.0 to 90.0", "Validation quarantined (left out) 11 pairs", "test 13",
                  "<td>17</td>", "reaches 50.0 %",
                  "tune: CIDEr on val", "10.0 to 40.0", "crop 17", "CIDEr 137.5", "<td>clean</td>", 'class="heat"'):
        assert shown in html, shown


def test_captions_and_parameters_are_escaped() -> None:
    html = page()
    for text in ("a red &lt;b&gt;cube&lt;/b&gt; &amp; more", "&lt;i&gt;was&lt;/i&gt;", "no &lt;change&gt;",
                 "seed: 7  # &lt;b&gt;"):
        assert text in html, text
    assert "<b>" not in html


def test_the_page_can_be_made_without_curves_gate_and_gallery() -> None:
    html = page(curves={"align": [], "tune": []}, gate={}, albums={}, stress={}, audit={})
    assert "0 steps" in html and "Under stress" not in html and "What training shows" not in html


def test_published_scores_are_shown_only_with_complete_test_splits_of_an_equal_protocol() -> None:
    complete = {key: value for key, value in result().items() if key not in ("changed", "intervals")}
    html = page(metrics={"spot_the_diff/single": complete, "spot_the_diff/multi": complete})
    assert html.count("published under this protocol, not run here") == 1
    assert html.count("not reproduced by others") == 2  # The table and the figure both contain this doubt.
    assert "may have trained on test items" in html
    part = page(metrics={"spot_the_diff/single": {**complete, "incomplete": "1 image missing"}})
    assert "M3Diff" not in part and "not comparable with published scores" in part


def test_the_stress_chart_of_a_benchmark_without_grammar_shows_cider() -> None:
    only_cider = {"num_pairs": 3, "identical": {}, "swapped": {},
                  "curves": {"noise": {"none": {"CIDEr": 1.0, "intervals": {"CIDEr": [0.9, 1.1]}}}}}
    plain = {key: value for key, value in result().items() if key not in ("changed", "intervals")}
    html = page(metrics={"own": plain}, stress={"own": only_cider}, albums={})
    assert "own: noise on both images" in html and "Where the delta module looks" not in html
    assert 'id="behaviour"' not in html


def test_the_page_shows_the_speed_of_each_training_phase() -> None:
    lines = [{"step": step, "loss": 1.0, "pairs_per_s": 17.0 + step, "padding_share": 0.125, "seconds": 1.0}
             for step in range(3)]
    html = page(curves={"tune": lines})
    for cell in ("<th>pairs per second</th>", "<td>18</td>", "<th>padding avoided</th>", "<td>12.5%</td>"):
        assert cell in html
    assert "MFU" not in html


@needs_chromium
def test_the_page_has_no_fault_in_a_browser(tmp_path: Path) -> None:
    albums = {name: Album(shown=[pair("a red cube"), pair("a " + "very " * 30 + "long caption")], worst=[pair("wrong")])
              for name in ("scenes", "edits")}
    path = tmp_path / "report.html"
    path.write_text(page(albums=albums), encoding="utf-8")
    assert faults_of(path) == []
