from __future__ import annotations

import re
from html.parser import HTMLParser

from report_example import page, published_result

VOID = {"meta", "img", "br", "input", "link"}


class Balanced(HTMLParser):
    """A parser that checks that each opened tag is closed in order, and collects links to other files and sites."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        addresses = [value for name, value in attrs if name in ("src", "href") and value]
        self.links += [value for value in addresses if not value.startswith(("#", "data:"))]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_contains_no_link_to_other_files_or_to_the_network() -> None:
    html = page()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == [] and parser.links == []
    assert not re.search(r"<script \w|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", html)
    for text in ("87.6", "80.0 to 90.0", "Validation quarantined (left out) 11 pairs", "test 13",
                  "<td>17</td>", "reaches 50.0 %",
                  "tune: CIDEr on val", "10.0 to 40.0", "CIDEr 137.5", "<td>clean</td>", 'class="heat"'):
        assert text in html, text


def test_captions_and_parameters_are_escaped() -> None:
    html = page()
    for text in ("a red &lt;b&gt;cube&lt;/b&gt; &amp; more", "&lt;i&gt;was&lt;/i&gt;", "no &lt;change&gt;",
                 "seed: 7  # &lt;b&gt;"):
        assert text in html, text
    assert "<b>" not in html


def test_the_page_can_be_made_without_curves_gate_scores_gallery_stress_test_and_audit() -> None:
    html = page(curves={"align": [], "tune": []}, gate={}, albums={}, stress={}, audit={})
    assert "0 steps" in html and "Under stress" not in html and "What training shows" not in html


def test_published_scores_are_shown_only_for_the_same_protocol_and_a_complete_test_split() -> None:
    complete = published_result()
    html = page(metrics={"spot_the_diff/single": complete, "spot_the_diff/multi": complete})
    assert html.count("published under this protocol, not run here") == 1
    assert html.count("not reproduced by others") == 2 and "may have trained on test items" in html
    part = page(metrics={"spot_the_diff/single": {**complete, "incomplete": "1 image missing"}})
    assert "M3Diff" not in part and "not comparable with published scores" in part


def test_the_stress_test_of_a_benchmark_without_grammar_shows_cider() -> None:
    bare = {"num_pairs": 3, "identical": {}, "swapped": {},
            "curves": {"noise": {"none": {"CIDEr": 1.0, "intervals": {"CIDEr": [0.9, 1.1]}}}}}
    html = page(metrics={"own": published_result()}, stress={"own": bare}, albums={})
    assert "own: noise on both images" in html and "Where the delta module looks" not in html
    assert 'id="behaviour"' not in html


def test_the_page_compares_questions_and_shows_kinds_of_pictures_and_ways_back() -> None:
    html = " ".join(page().split())
    assert "for the question “What &lt;changed&gt;?”" in html and "on 19 of the pairs" in html
    cells = "".join(f"<td>{value}</td>" for value in (87.6, 86.4, 85.3, 75.3, 71.3, 79.8))
    assert cells in html
    assert '<th scope="row">picture: photograph</th><td>65.4</td><td>23</td>' in html
    assert '<th scope="row">way back: zoom out</th><td>54.3</td><td>29</td>' in html
    assert "own question" not in page(metrics={"own": published_result()}, albums={})


def test_the_page_shows_how_fast_each_phase_was() -> None:
    lines = [{"step": step, "loss": 1.0, "pairs_per_s": 17.0 + step, "padding_share": 0.125, "seconds": 1.0}
             for step in range(3)]
    html = page(curves={"tune": lines})
    for cell in ("<th>pairs per second</th>", "<td>18</td>", "<th>padding avoided</th>", "<td>12.5 %</td>"):
        assert cell in html
    assert "MFU" not in html


def test_the_number_of_steps_is_one_more_than_the_number_of_the_last_step() -> None:
    html = page(curves={"tune": [{"step": step, "loss": 1.0} for step in range(1250)]})
    assert "in 1 phase: tune (1,250 steps)" in html and "0 steps" not in html.replace("1,250 steps", "")


def test_tables_list_sources_in_the_order_of_the_benchmarks_and_numbers_have_thousands_separators() -> None:
    counts = {"add": 1234}
    card = {"num_pairs": {"train": {"edits": counts, "scenes": counts}}, "num_quarantined": 0,
            "leaks": {"images": 0, "groups": 0, "near_bits": 3,
                      "near_train_images": {"edits": {"test": 1111, "gate": 7, "val": 5}, "scenes": {"val": 3}}}}
    html = page(card=card, audit={"benchmarks": {name: {"num_pairs": 1234} for name in ("edits", "scenes")}})
    data = " ".join(html.partition('id="data"')[2].split())
    assert "scenes (val 3), edits (val 5, gate 7, test 1,111)." in data
    assert re.findall(r"<th>(scenes|edits)</th>|<th scope=\"row\">(scenes|edits)</th>", data) == [
        ("", "scenes"), ("", "edits"), ("scenes", ""), ("edits", "")]
    assert data.count("<td>1,234</td>") == 4


def test_the_page_names_a_source_without_a_score() -> None:
    card = {"num_pairs": {"train": {"scenes": {"add": 7}, "mine": {"add": 5}}, "test": {"scenes": {"add": 3}}},
            "num_quarantined": 0, "leaks": {"images": 0, "groups": 0, "near_train_images": {}, "near_bits": 3}}
    sentence = "mine has no score, because the split test contains none of its pairs (train 5)"
    assert sentence in page(card=card) and "has no score" not in page()
