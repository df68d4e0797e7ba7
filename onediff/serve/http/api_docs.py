"""The page `/docs`, which explains each address of the server. It needs no script and no other server, so it works
offline; FastAPI's own page loads its scripts from the internet.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
                                      "form-action 'none'; frame-ancestors 'none'",
           "X-Content-Type-Options": "nosniff"}


def add_docs(app: FastAPI) -> None:
    """Add the page `/docs`, made from the OpenAPI description of the application."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]),
                              trim_blocks=True, lstrip_blocks=True)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        html = environment.get_template("api_docs.html.j2").render(api=app.openapi())
        return HTMLResponse(html, headers=HEADERS)
