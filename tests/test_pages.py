"""Tests that open the pages of this project in a browser: the report, `data browse` and the validation page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import report_example
from browser import VIEWS, axe_violations, chromium_path, opened, too_wide
from PIL import Image

from onediff.config import Runtime
from onediff.data.browse import PAGE_CARDS, browse
from onediff.data.quality.checks import check_suite, judged, write_report
from onediff.data.quality.probe import probe_folders
from onediff.data.record import Record, write_shards
from onediff.eval.report.gallery import Album

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NUM_PAIRS = 2 * PAGE_CARDS + 5  # `data browse` shows these pairs on three pages.
SPLITS = ("train", "val", "test", "gate")
LONG_ID = "edits-" + 20 * "0123456789abcdef"  # a pair_id without spaces that is wider than a phone
FAULTY_PAGE = """<!doctype html><html lang="en"><head><title>A page with faults</title></head><body>
<p style="color: #ddd; background: #fff">This text has too little contrast.</p>
<div style="width: 3000px">This element is too wide.</div>
<div style="overflow-x: auto"><div style="width: 3000px">This wide element is in a box that scrolls.</div></div>
<script>console.error("a message"); fetch("http://127.0.0.1:9/").catch(() => {}); throw new Error("a fault")</script>
</body></html>"""


def record(number: int) -> Record:
    """Return a pair of two small images.

    Pair 1 has an image that cannot be read, pair 2 lacks an image, and every third pair lacks a caption.
    """
    images = []
    for shade in (number, 255 - number):
        file = io.BytesIO()
        Image.new("RGB", (53, 37), (shade, 0, 4 * number % 256)).save(file, "PNG")
        images.append(file.getvalue())
    before, after = images[0], {1: b"no image", 2: b""}.get(number, images[1])
    references = [f"cup {number} was moved to the left of the plate"] if number % 3 else []
    return Record(LONG_ID if number == 1 else f"p{number}", "edits", SPLITS[number % 4], f"g{number}", before, after,
                  references, "What changed?", "move", {})


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write each page to a file, and return the URL of each file."""
    folder = tmp_path_factory.mktemp("pages")
    write_shards([record(number) for number in range(NUM_PAIRS)], folder / "shards", "train", shard_pairs=NUM_PAIRS)
    tables = probe_folders({"edits": folder / "shards"}, max_megapixels=1, clip=None, runtime=Runtime())
    probe = judged(pd.concat([table.to_pandas() for table in tables], ignore_index=True).assign(suite="generated"))
    with pytest.raises(ValueError, match="generated pairs are bad"):
        write_report([check_suite("generated", probe, tolerance=0)], folder / "validation",
                     shard_folders=[folder / "shards"])
    captions = ["a red cube was added", "a blue cube was added", "a " + "very " * 30 + "long caption", LONG_ID]
    pairs = [report_example.pair(caption, f"p{number}") for number, caption in enumerate(captions)]
    scores = {"scenes": report_example.result(), "spot_the_diff/single": report_example.published_result()}
    report = folder / "report.html"
    report.write_text(report_example.page(metrics=scores, albums={"scenes": Album(shown=pairs, worst=pairs[1:])}),
                      encoding="utf-8")
    return {"report": report.as_uri(), "validation": (folder / "validation/index.html").as_uri(),
            "browse": browse(folder / "shards", folder / "browse", per_group=NUM_PAIRS).as_uri()}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["report", "browse", "validation"])
def test_a_page_is_accessible_fits_into_the_window_and_sends_no_request(
        chromium: Browser, urls: dict[str, str], name: str, view: str) -> None:
    with opened(chromium, urls[name], VIEWS[view]) as page:
        assert axe_violations(page) == []
        assert too_wide(page) == []


def test_each_fault_of_a_page_is_reported(chromium: Browser, tmp_path: Path) -> None:
    path = tmp_path / "faulty.html"
    path.write_text(FAULTY_PAGE, encoding="utf-8")
    with pytest.raises(AssertionError) as failure, opened(chromium, path.as_uri(), VIEWS["phone"]) as page:
        assert [line.split(":")[0] for line in axe_violations(page)] == ["color-contrast (serious)"]
        wide, scrolls = too_wide(page)
        assert "This element is too wide." in wide and scrolls == "the page scrolls sideways"
    for fault in ("console: a message", "error in a script: a fault",
                  "request to another address: http://127.0.0.1:9/"):
        assert fault in str(failure.value)


def test_a_chromium_that_is_a_snap_package_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium_path() is None
    for name, script in (("chromium", 'exec /snap/bin/chromium "$@"'), ("chromium-browser", "exec /usr/lib/browser")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert chromium_path() == str(tmp_path / "chromium-browser")


def shown(page: Page) -> list[int]:
    """Return the numbers of the pairs whose cards are visible on the browse page, from their captions."""
    captions = page.locator("article:visible li").all_text_contents()
    return [int(text.split()[1]) for text in captions if text.startswith("cup")]


def place(page: Page) -> str:
    """Return the number of the page as the upper pager of the browse page shows it."""
    return re.sub(",.*", "", page.locator(".pager .place").first.inner_text())


def test_a_click_and_the_keyboard_turn_the_pages_of_the_browse_page(chromium: Browser, urls: dict[str, str]) -> None:
    with opened(chromium, urls["browse"]) as page:
        assert place(page) == "Page 1 of 3" and page.locator("article:visible").count() == PAGE_CARDS
        assert page.get_by_role("button", name="Previous").first.is_disabled()
        first = shown(page)
        page.get_by_role("button", name="Next").last.click()
        second = shown(page)
        assert place(page) == "Page 2 of 3" and not set(first) & set(second)
        assert page.evaluate("scrollY") == 0
        page.locator("#search").focus()
        for key in ("Tab", "Tab", "Enter"):  # from the search to Previous, to Next
            page.keyboard.press(key)
        assert place(page) == "Page 3 of 3" and page.locator("article:visible").count() == NUM_PAIRS - 2 * PAGE_CARDS
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Space")
        assert place(page) == "Page 2 of 3" and shown(page) == second
        page.reload()
        assert place(page) == "Page 2 of 3" and shown(page) == second


def test_the_filters_of_the_browse_page_start_at_the_first_page(chromium: Browser, urls: dict[str, str]) -> None:
    with opened(chromium, urls["browse"] + "#page=3") as page:
        assert place(page) == "Page 3 of 3"
        page.get_by_label("split").select_option("val")
        assert place(page) == "Page 1 of 1"
        assert shown(page) == [number for number in range(1, NUM_PAIRS, 4) if number % 3]
        page.get_by_label("search in captions").fill("CUP 13")
        assert page.locator(".pager .place").first.inner_text() == "Page 1 of 1, 1 pair"
        assert shown(page) == [13] and page.locator("mark").all_text_contents() == ["cup", "13"]
        page.get_by_label("search in captions").fill("saucer")
        assert page.locator("article:visible").count() == 0 and place(page) == "No pair matches."


def test_the_filters_of_the_report_show_the_matching_pairs_only(chromium: Browser, urls: dict[str, str]) -> None:
    with opened(chromium, urls["report"]) as page:
        page.get_by_label("outcome").select_option("right")
        assert page.locator("#count").inner_text() == "1 pair"
        assert page.locator(".pair:visible .caption").inner_text() == "✓a red cube was added"
        region = page.locator(".pair:visible .region")
        assert not region.is_visible()
        page.get_by_label("show the changed region").focus()
        page.keyboard.press("Space")
        assert region.is_visible()
