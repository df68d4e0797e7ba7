"""Tests that use the page of `onediff serve` in a browser, against the real server with a small untrained model."""

from __future__ import annotations

import base64
import io
import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from browser import VIEWS, View, axe_violations, opened, too_wide
from PIL import Image
from serving import RunningServer, running_server

from onediff.config import Serve
from onediff.model.captioner import Captioner
from onediff.serve.http.web_page import FOLDER

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CAPTIONS = "**/v1/captions"
KEY = "a-key-of-the-test"
CHANGED = {"caption": "the red cube was removed", "changed": True, "confidence": 0.874, "familiar": False,
           "regions": {"before": [[0.25, 0.25, 0.75, 0.75]], "after": []}, "heat_map": None,
           "model": {"version": "7", "digest": 64 * "a"}, "milliseconds": 214.0}
# Put files into a DataTransfer, and send it to the page as the browser does when the user drops or pastes files.
SEND = """([target, kind, files]) => {
  const data = new DataTransfer();
  for (const [name, content] of files)
    data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name, {type: "image/png"}));
  const options = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
  document.querySelector(target).dispatchEvent(
    kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options));
}"""
# Return how many pixels of a canvas are not transparent.
PAINTED = """canvas => canvas.hidden ? 0 : canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
  .data.filter((value, k) => k % 4 === 3 && value).length"""


@pytest.fixture
def url(server: RunningServer) -> str:
    return f"{server.url}/"


def picture(color: str, size: tuple[int, int] = (64, 48), form: str = "PNG") -> bytes:
    """Return an image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return file.getvalue()


def send(page: Page, kind: str, *names: str, target: str = "body") -> None:
    """Drop or paste pictures with these names and different colours. A name that ends in txt is not a picture."""
    files = [(name, base64.b64encode(b"text" if name.endswith("txt") else picture(color)).decode())
             for name, color in zip(names, ("red", "blue", "green"), strict=False)]
    page.evaluate(SEND, [target, kind, files])


def send_pair(page: Page) -> None:
    send(page, "drop", "2.png", "1.png")


def shown(page: Page) -> list[str]:
    """Return the descriptions of the two pictures that the page shows."""
    return [page.locator(f"#{side} img").get_attribute("alt") or "" for side in ("before", "after")]


def painted(page: Page) -> list[int]:
    """Return how many pixels of each picture have heat or boxes over them."""
    return [page.locator(f"#{side} canvas").evaluate(PAINTED) for side in ("before", "after")]


def answer_with(page: Page, status: int, body: Any) -> None:
    """Let all further requests for captions get this answer."""
    page.unroute(CAPTIONS)
    page.route(CAPTIONS, lambda route: route.fulfill(status=status, body=json.dumps(body)))


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_accessible_and_fits_into_the_window(chromium: Browser, url: str, view: str) -> None:
    with opened(chromium, url, VIEWS[view]) as page:
        assert axe_violations(page) == [] and too_wide(page) == []
        assert not page.get_by_label("API key").is_visible()
        answer_with(page, 200, CHANGED | {"caption": "the " + "very " * 30 + "long" * 30 + " caption"})
        send_pair(page)
        page.locator("#caption").wait_for()
        page.locator("#entries button").wait_for()
        assert too_wide(page) == []
        page.get_by_text("Slider", exact=True).click()
        send(page, "drop", "notes.txt")
        page.get_by_role("alert").wait_for()
        assert axe_violations(page) == [] and too_wide(page) == []


def test_the_labels_of_a_picture_do_not_overlap_at_400_percent_zoom(chromium: Browser, url: str) -> None:
    with opened(chromium, url, View(320, 256)) as page:
        answer_with(page, 200, CHANGED)
        send_pair(page)
        page.locator("#caption").wait_for()
        assert too_wide(page) == []
        name, act = (page.locator(f"#before label {part}").bounding_box() for part in ("b", ".act"))
        assert name and act
        assert name["x"] + name["width"] <= act["x"] or name["y"] + name["height"] <= act["y"]


def test_without_javascript_the_page_says_what_to_do(chromium: Browser, url: str) -> None:
    context = chromium.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto(url)
        message = page.locator("noscript p")  # Playwright's search for texts leaves out <noscript>.
        assert message.is_visible() and message.inner_text().startswith("JavaScript is switched off")
        assert not page.locator("#stage").is_visible() and not page.locator("#examples").is_visible()
    finally:
        context.close()


def test_the_page_works_without_the_store_of_the_browser(chromium: Browser, url: str) -> None:
    """A browser that blocks cookies throws this error."""
    with opened(chromium, url) as page:
        page.add_init_script("Object.defineProperty(window, 'sessionStorage', "
                             "{get() { throw new DOMException('denied', 'SecurityError'); }})")
        page.reload()
        answer_with(page, 200, CHANGED)
        send_pair(page)
        page.locator("#caption").wait_for()
        page.locator("#entries button").wait_for()


def test_dropped_pictures_get_the_caption_of_the_server_and_a_heat_map(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        with page.expect_response(CAPTIONS) as response:
            send_pair(page)
        answer = response.value.json()
        caption = page.get_by_role("status").locator("#caption")
        caption.wait_for()
        assert caption.inner_text().lower() == answer["caption"].lower() != ""
        assert shown(page) == ["before: 1.png", "after: 2.png"]
        assert page.locator("#confidence").inner_text() == f"{round(100 * answer['confidence'])}%"
        assert page.locator("#model").inner_text() == "version 1, 11111111"
        assert not page.locator("#warning").is_visible()  # This model cannot say whether a pair is unfamiliar.
        assert not page.get_by_label("Boxes").is_visible()  # This model marks no regions.
        assert min(painted(page)) > 0
        page.get_by_label("Heat map").uncheck()
        assert painted(page) == [0, 0]


def test_pasted_pictures_fill_the_empty_slots(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        send(page, "paste", "first.png")
        page.get_by_alt_text("before: first.png").wait_for()
        assert not page.locator("#tools").is_visible()
        with page.expect_response(CAPTIONS):
            send(page, "paste", "second.png")
        page.get_by_alt_text("after: second.png").wait_for()
        with page.expect_response(CAPTIONS):
            send(page, "drop", "third.png", target="#before .frame")
        page.locator("#caption").wait_for()
        assert shown(page) == ["before: third.png", "after: second.png"]


def test_files_are_chosen_with_the_button_of_a_picture(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        files = [{"name": f"{name}.png", "mimeType": "image/png", "buffer": picture("red")}
                 for name in ("after", "before")]
        with page.expect_file_chooser() as chooser:
            page.locator("#after label").click()
        with page.expect_response(CAPTIONS):
            chooser.value.set_files(files)
        page.locator("#caption").wait_for()
        assert shown(page) == ["before: before.png", "after: after.png"]
        with page.expect_file_chooser() as chooser:
            page.locator("#before").get_by_text("Replace").click()
        with page.expect_response(CAPTIONS):
            chooser.value.set_files([{"name": "new.png", "mimeType": "image/png", "buffer": picture("red")}])
        assert shown(page) == ["before: new.png", "after: after.png"]


def test_swap_asks_again_and_the_history_brings_a_pair_back(chromium: Browser, url: str) -> None:
    requests: list[str] = []
    with opened(chromium, url) as page:
        page.on("request", lambda request: requests.append(request.url) if "captions" in request.url else None)
        answer_with(page, 200, CHANGED)
        send_pair(page)
        page.get_by_text(CHANGED["caption"]).first.wait_for()
        answer_with(page, 200, CHANGED | {"caption": "a red cube was added"})
        page.get_by_role("button", name="Swap").click()
        entries = page.locator("#entries button")
        entries.nth(1).wait_for()
        assert shown(page) == ["before: 2.png", "after: 1.png"] and len(requests) == 2
        assert entries.locator(".words").all_text_contents() == ["a red cube was added", CHANGED["caption"]]
        page.reload()
        entries.nth(1).click()
        page.locator("#caption").wait_for()
        assert page.locator("#caption").inner_text().lower() == CHANGED["caption"]
        assert shown(page) == ["before: 1.png", "after: 2.png"] and len(requests) == 2
        page.get_by_role("button", name="Clear").click()
        assert entries.count() == 0 and not page.locator("#history").is_visible()


def test_two_tabs_have_separate_pairs_and_histories(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as first:
        answer_with(first, 200, CHANGED)
        send_pair(first)
        first.locator("#entries button").wait_for()
        second = first.context.new_page()
        second.goto(url)
        assert shown(second) == ["", ""] and not second.locator("#history").is_visible()
        answer_with(second, 200, CHANGED | {"caption": "a red cube was added"})
        send(second, "drop", "b.png", "a.png")
        second.locator("#entries button").wait_for()
        first.reload()
        assert first.locator("#entries .words").all_text_contents() == [CHANGED["caption"]]
        assert second.locator("#entries .words").all_text_contents() == ["a red cube was added"]
        assert shown(second) == ["before: a.png", "after: b.png"]


def test_an_unfamiliar_pair_has_a_warning_and_regions_have_boxes(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        answer_with(page, 200, CHANGED)
        send_pair(page)
        page.get_by_text("Unfamiliar pictures.").wait_for()
        assert not page.get_by_label("Heat map").is_visible()
        before, after = painted(page)
        assert before > 0 and after == 0
        page.get_by_label("Boxes").uncheck()
        assert painted(page) == [0, 0]


def test_everything_works_with_the_keyboard_only(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        def tab_to(selector: str) -> None:
            for _ in range(20):
                if page.locator(selector).evaluate("element => element === document.activeElement"):
                    return
                page.keyboard.press("Tab")
            raise AssertionError(f"Tab does not reach {selector}")

        tab_to("[data-example=recoloured]")
        page.keyboard.press("Enter")
        page.locator("#caption").wait_for()
        page.locator("h1").click()  # Continue at the start of the page.
        tab_to("[value=side]")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.id") == "slider"
        right_edge = page.locator(".divider").bounding_box()
        page.keyboard.press("End")
        moved = page.locator(".divider").bounding_box()
        assert right_edge and moved and moved["x"] > right_edge["x"] + 100
        tab_to("#heat")
        page.keyboard.press("Space")
        assert painted(page) == [0, 0]
        page.keyboard.press("Shift+Tab")
        with page.expect_response(CAPTIONS):
            page.keyboard.press("Enter")
        assert shown(page) == ["before: example, after", "after: example, before"]


def test_the_last_of_two_examples_wins(chromium: Browser, url: str) -> None:
    held: list[Route] = []
    with opened(chromium, url) as page:
        page.route("**/added_*.jpg", lambda route: held.append(route) if "fetch" in route.request.resource_type
                   else route.continue_())
        page.get_by_role("button", name="An object is added").click()
        with page.expect_response(CAPTIONS):
            page.get_by_role("button", name="Only camera and light move").click()
        page.locator("#caption").wait_for()
        first = page.locator("#after img").get_attribute("src")
        assert len(held) == 2
        for route in held:
            with page.expect_event("requestfinished"):
                route.continue_()
        page.wait_for_timeout(300)  # The page must not do anything with the late files.
        assert page.locator("#after img").get_attribute("src") == first
        assert page.locator("#entries li").count() == 1


def test_an_error_is_told_in_plain_words(chromium: Browser, url: str) -> None:
    texts = {422: "The server cannot use these pictures. Before: corrupt image; replace the file.",
             429: "The server is busy. Wait a few seconds, then try again.",
             500: "The server failed. Its log says why (status 500)."}
    with opened(chromium, url, expected_faults="console: Failed to load resource.*") as page:
        alert = page.get_by_role("alert")
        again = alert.get_by_role("button", name="Try again")
        for status, text in texts.items():
            answer_with(page, status, {"error": {"message": "before: corrupt image; replace the file"}})
            send_pair(page)
            page.get_by_text(text.split(".")[0]).wait_for()
            assert " ".join(alert.locator("p").inner_text().split()) == text
            assert again.is_visible() == (status != 422)
        page.unroute(CAPTIONS)
        page.route(CAPTIONS, lambda route: route.abort())
        again.click()
        page.get_by_text("The server does not answer.").wait_for()
        answer_with(page, 200, CHANGED)
        again.click()
        page.locator("#caption").wait_for()
        assert not alert.is_visible()


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_smaller_copies_are_sent_if_the_pictures_are_too_large(chromium: Browser, served_captioner: Captioner,
                                                               form: str, tmp_path: Path) -> None:
    """The PNG files have too many pixels for this server, the BMP files too many bytes."""
    files = [tmp_path / f"{number}.{form.lower()}" for number in (1, 2)]
    for file in files:
        file.write_bytes(picture("red", (1100, 1000), form))
    with (running_server(served_captioner, Serve(megapixels=1.0, body_mb=1.0)) as server,
          opened(chromium, f"{server.url}/", expected_faults="console: Failed to load resource.* 413 .*") as page):
        page.locator("#before-file").set_input_files(files)
        page.get_by_text("The pictures are too large for this server, so it got smaller copies.").wait_for()
        assert page.locator("#caption").is_visible()


def test_a_file_that_is_no_picture_is_refused_and_the_pair_stays(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        answer_with(page, 200, CHANGED)
        send_pair(page)
        page.locator("#caption").wait_for()
        send(page, "drop", "notes.txt")
        page.get_by_text("“notes.txt” cannot be opened.").wait_for()
        assert shown(page) == ["before: 1.png", "after: 2.png"]


def test_a_slow_server_can_be_given_up(chromium: Browser, url: str) -> None:
    with opened(chromium, url) as page:
        page.clock.install()
        page.route(CAPTIONS, lambda route: None)  # This server never answers.
        send_pair(page)
        page.get_by_text("Looking for the change …").wait_for()
        assert not page.get_by_role("button", name="Stop waiting").is_visible()
        page.clock.fast_forward(5000)
        page.get_by_text("Still looking. The server is slow or busy.").wait_for()
        page.get_by_role("button", name="Stop waiting").click()
        page.get_by_text("You stopped waiting.").wait_for()
        answer_with(page, 200, CHANGED)
        page.get_by_role("button", name="Try again").click()
        page.locator("#caption").wait_for()


def test_the_page_asks_for_the_api_key(chromium: Browser, served_captioner: Captioner) -> None:
    with running_server(served_captioner, Serve(), api_key=KEY) as server, \
            opened(chromium, f"{server.url}/", expected_faults="console: Failed to load resource.* 401 .*") as page:
        field = page.get_by_label("API key")
        assert field.is_visible()
        send_pair(page)
        page.get_by_text("The server asks for an API key.").wait_for()
        for key in ("“wrong”", "wrong", KEY):  # A browser cannot send the first one in a header.
            field.fill(key)
            field.press("Enter")
            page.locator("#caption" if key == KEY else "text=does not accept this API key").wait_for()
        page.reload()
        with page.expect_response(CAPTIONS) as response:
            send_pair(page)
        assert response.value.status == 200


def test_every_answer_of_the_page_forbids_foreign_content(url: str) -> None:
    for path in ("", "page/page.js", "page/style.css", "page/examples/added_after.jpg"):
        headers = httpx.get(url + path).raise_for_status().headers
        policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
    assert httpx.get(f"{url}page/../web_page.py").status_code == 404


def test_the_examples_are_what_the_generator_renders() -> None:
    script = runpy.run_path(str(Path(__file__).parents[3] / "docs/page_examples.py"))
    files = sorted(path.name for path in (FOLDER / "examples").glob("*.jpg"))
    assert files == sorted(f"{name}_{side}.jpg" for name in script["PAIRS"] for side in ("before", "after"))
    rendered = dict(zip(("before", "after"), script["example"](script["PAIRS"]["added"]), strict=True))
    for side, image in rendered.items():
        stored = Image.open(FOLDER / f"examples/added_{side}.jpg")
        assert np.abs(np.asarray(stored, np.float64) - np.asarray(image, np.float64)).mean() < 2, side
