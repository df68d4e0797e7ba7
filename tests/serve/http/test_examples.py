"""Tests of docs/serving.md: its examples run as they are written, and its tables agree with the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import RunningServer, image_file

from onediff.config import Serve
from onediff.inputs.images import open_image
from onediff.serve.http.app import REFUSALS

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = [(language, code) for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
            if ADDRESS in code]
COMMANDS = {"bash": ["bash", "-eu", "-o", "pipefail"], "python": [sys.executable], "javascript": ["node"]}
ENDINGS = {"bash": ".sh", "python": ".py", "javascript": ".mjs"}


def section(title: str) -> str:
    """Return the text below a heading of the page."""
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, list[str]]:
    """Return the rows of the Markdown tables in a text: the first cell without backticks, and the other cells."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()
             if line.startswith("| ")]
    return {first.strip("`| "): [cell.strip("| ") for cell in rest] for first, *rest in cells}


def test_the_page_has_examples_in_each_language() -> None:
    assert sorted(language for language, _ in EXAMPLES) == ["bash"] * 2 + ["javascript"] * 2 + ["python"] * 3


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=[f"{language}-{number}" for number, (language, _) in
                                                             enumerate(EXAMPLES)])
def test_an_example_prints_the_caption(server: RunningServer, client: httpx.Client, tmp_path: Path, language: str,
                                       code: str) -> None:
    program = COMMANDS[language][0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed, so the examples in {language} were NOT run")
    files = {name: image_file(seed) for name, seed in (("before", 3), ("after", 5))}
    for name, content in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    script = tmp_path / f"example{ENDINGS[language]}"
    script.write_text(code.replace(ADDRESS, server.url), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    done = subprocess.run([*COMMANDS[language], str(script)], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    caption = client.post("/v1/captions", files=files).json()["caption"]
    assert caption and caption in done.stdout


def test_the_example_without_a_server_prints_the_caption(
        untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(untrained, "data/models/tune")
    Path("before.png").write_bytes(image_file(3))
    Path("after.png").write_bytes(image_file(5))
    (code,) = re.findall(r"^```python\n(.*?)^```$", section("In Python"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/serving.md", "exec"), names)  # A new process would load torch again, which takes seconds.
    # A captioner that is loaded again has other addresses in memory, so its sums can be rounded in another way.
    caption = names["captioner"].caption([(open_image("before.png"), open_image("after.png"))])
    assert capsys.readouterr().out.strip() == str(caption)


def test_the_table_of_limits_has_each_setting_with_its_default() -> None:
    listed = {key: float(cells[0]) for key, cells in rows(section("Errors and limits")).items()
              if re.fullmatch(r"[\d.]+", cells[0])}
    assert listed == Serve().model_dump()


def test_the_table_of_errors_has_each_status() -> None:
    listed = {int(key) for key in rows(section("Errors and limits")) if key.isdecimal()}
    assert listed - {404, 405} == set(REFUSALS)


def test_the_table_of_metrics_has_what_the_server_measures(client: httpx.Client) -> None:
    listed = {name for name in rows(section("Operation")) if name.startswith("onediff_")}
    measured = set(re.findall(r"^# TYPE (\w+)", client.get("/metrics").text, re.MULTILINE))
    assert listed == {name for name in measured if not name.endswith("_created")}
