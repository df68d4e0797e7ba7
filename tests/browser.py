"""A headless Chromium for tests of web pages, and the checks that every page of this project must pass."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

COMMANDS = ("chromium", "google-chrome", "chromium-browser")
NO_CHROMIUM = ("Chromium must be installed for the tests of web pages, but PATH has none of the commands "
               f"{', '.join(COMMANDS)} (a snap package does not count, because it cannot read the files of tests): "
               "install it, for example with 'apt-get install chromium' on Debian")
TIMEOUT_MS = 20_000
# Return each element whose right edge is outside the window. Elements in a box that scrolls or clips do not count.
TOO_WIDE = """() => {
  const boxed = element => {
    for (let box = element.parentElement; box && box !== document.body; box = box.parentElement)
      if (getComputedStyle(box).overflowX !== "visible") return true;
    return false;
  };
  const wide = [...document.body.querySelectorAll("*")].filter(element =>
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !boxed(element));
  const lines = wide.map(element => element.outerHTML.slice(0, 120));
  if (document.documentElement.scrollWidth > innerWidth) lines.push("the page scrolls sideways");
  return lines;
}"""


@dataclass(frozen=True)
class View:
    """The size of the window, in CSS pixels, and the colour scheme that the user prefers."""

    width: int
    height: int
    colours: Literal["light", "dark"] = "light"


VIEWS = {"wide": View(1400, 900), "phone": View(390, 844), "dark": View(1400, 900, "dark")}


def chromium_path() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None if there is none.

    Snap packages do not count: they cannot open files in /tmp, where tests write their pages.
    """
    for path in filter(None, map(shutil.which, COMMANDS)):
        program = Path(path).resolve()
        with program.open("rb") as file:
            is_snap = program.name == "snap" or b"/snap/" in file.read(4096)  # Ubuntu has a script that starts a snap.
        if not is_snap:
            return path
    return None


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Yield a headless Chromium. Tests are skipped if no Chromium is installed.

    The browser is closed after each test file, because asyncio.run() fails in this process while Playwright runs.
    """
    path = chromium_path()
    if path is None:
        pytest.skip(NO_CHROMIUM)
    from playwright.sync_api import sync_playwright

    # `make test` runs several test files at once. The lock makes sure that only one Chromium uses memory at a time.
    with (tmp_path_factory.getbasetemp().parent / "chromium.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with sync_playwright() as playwright:
            # Chromium refuses to run as root with a sandbox.
            browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
            yield browser
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, view: View = VIEWS["wide"], *, expected_faults: str = "") -> Iterator[Page]:
    """Open a page in a new window without cookies, and yield the page.

    At the end, check that the page logged no error to the console and sent no request to another address. Faults that
    the regular expression `expected_faults` describes are allowed.
    """
    faults: list[str] = []
    context = browser.new_context(viewport={"width": view.width, "height": view.height}, color_scheme=view.colours)
    try:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("console", lambda message: faults.append(f"console: {message.text}")
                if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(f"error in a script: {error}"))
        page.on("request", lambda request: None if _belongs_to(url, request.url)
                else faults.append(f"request to another address: {request.url}"))
        page.goto(url)
        yield page
        unexpected = [fault for fault in faults if not re.fullmatch(expected_faults, fault, re.DOTALL)]
        assert not unexpected, "\n".join(unexpected)
    finally:
        context.close()


def axe_violations(page: Page) -> list[str]:
    """Return the serious and critical violations that axe-core reports, one line for each rule and element.

    All <details> of the page are opened first, because axe-core does not check hidden elements.
    """
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    violations = Axe().run(page).response["violations"]
    return [f"{violation['id']} ({violation['impact']}): {node['html'][:160]}: {node['failureSummary']}"
            for violation in violations if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]]


def too_wide(page: Page) -> list[str]:
    """Return the start of the HTML of each element that is cut off at the right edge of the window.

    Elements inside a box that scrolls by itself, such as a wide table, are allowed.
    """
    return list(page.evaluate(TOO_WIDE))


def _belongs_to(url: str, requested: str) -> bool:
    """Return whether a request stays within the page: the file itself, or the server that the page comes from."""
    page, other = urlsplit(url), urlsplit(requested)
    if other.scheme in ("data", "blob"):
        return True
    if page.scheme == "file":
        return (other.scheme, other.path) == ("file", page.path)
    return (other.scheme, other.netloc) == (page.scheme, page.netloc)
