"""The web page of `onediff serve`: static files that onediff contains, so the page works without internet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Scope

FOLDER = Path(__file__).with_name("page")
# The browser runs and shows only files of this server, the pictures that the user opens (blob:), and copies of earlier
# pictures (data:).
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                               "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-cache",  # The browser asks whether a file changed, so no page mixes files of two releases.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageFiles(StaticFiles):
    """The static files of the page, with the headers of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI, *, needs_key: bool) -> None:
    """Add the page at `/` and its files below `/page`. With `needs_key`, the page asks the user for the API key."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    if needs_key:
        html = html.replace('data-key="none"', 'data-key="needed"', 1)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(html, headers=HEADERS)

    app.mount("/page", PageFiles(directory=FOLDER), name="page")
