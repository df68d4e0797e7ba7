"""Opens the project's HTML pages in Chromium, as a person would, and looks for faults that only a browser shows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: sudo apt-get install chromium")
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
WINDOWS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": WIDE}, "narrow": {"viewport": NARROW}, "dark": {"viewport": WIDE, "color_scheme": "dark"}}
# The elements that reach beyond the right edge of the window, although they are not inside a box that scrolls.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(element => {
    for (let box = element; box !== document.body; box = box.parentElement)
        if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
    return element.getBoundingClientRect().right > innerWidth + 1;
}).map(element => element.outerHTML.slice(0, 90))"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium without a window. Playwright needs no browser of its own for that."""
    with sync_playwright() as playwright:
        # The sandbox of Chromium does not work for the user root, as which tests run in containers.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path, window: str = "wide") -> Iterator[tuple[Page, list[str]]]:
    """Open the page; the list receives every error of a script and every request that leaves the page."""
    faults: list[str] = []
    page = browser.new_page(**WINDOWS[window])
    try:
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:"))
                else faults.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        yield page, faults
    finally:
        page.close()


def faults_of(path: Path) -> list[str]:
    """Return the faults of a page in a wide, a narrow and a dark window: errors, requests, overflow, accessibility."""
    from axe_playwright_python.sync_playwright import Axe

    found = []
    with chromium() as browser:
        for window in WINDOWS:
            with opened(browser, path, window) as (page, faults):
                faults += [f"too wide: {element}" for element in page.evaluate(TOO_WIDE)]
                violations = Axe().run(page).response["violations"]
                faults += [f"axe: {rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in violations
                           if rule["impact"] in ("serious", "critical")]
                found += [f"{window}: {fault}" for fault in faults]
    return found
