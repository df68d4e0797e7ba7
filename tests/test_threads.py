"""OpenMP reads OMP_WAIT_POLICY when torch is loaded, so onediff, which sets it, must be imported before torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOAD_TORCH = {"torch", "transformers", "deepspeed", "diffusers", "accelerate", "peft"}
OURS = {"onediff", "flows", "benchmarks"}


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "passive 1000"), ({"OMP_WAIT_POLICY": "active"}, "active None"), ({"OMP_WAIT_POLICY": ""}, " None"),
    ({"GOMP_SPINCOUNT": "7"}, "passive 7")])
def test_the_policy_is_set_unless_the_user_has_set_it(given: dict[str, str], expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = "import onediff, os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
                          env=environment | given)
    assert done.stdout == f"{expected}\n"


def _packages(node: ast.stmt) -> set[str]:
    """Return the packages that a statement imports when its module is imported, without imports in functions."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    if isinstance(node, (ast.If, ast.Try, ast.With)) and "TYPE_CHECKING" not in ast.dump(node):
        return set().union(*(_packages(child) for child in node.body))
    return set()


def _imports_torch_first(code: str) -> bool:
    """Return whether the import of a module, or a function in it, may load torch before onediff."""
    tree = ast.parse(code)
    seen: set[str] = set()
    for node in tree.body:
        packages = _packages(node)
        if packages & LOAD_TORCH and not (seen | packages) & OURS:
            return True
        seen |= packages
    inner = set().union(*(_packages(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))))
    return bool(inner & LOAD_TORCH) and not seen & OURS


@pytest.mark.parametrize(("code", "expected"), [
    ("import torch\nimport onediff", True), ("from onediff import paths\nimport torch", False),
    ("def f():\n    import torch", True), ("import onediff\ndef f():\n    from torch import nn", False),
    ("if True:\n    import transformers\nimport onediff", True)])
def test_an_import_of_torch_before_onediff_is_detected(code: str, expected: bool) -> None:
    assert _imports_torch_first(code) is expected


def test_no_process_can_load_torch_before_onediff() -> None:
    """Modules of flows and benchmarks may import torch first, because the `__init__.py` there imports onediff."""
    for package in ("flows", "benchmarks"):
        module = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        assert "onediff" in set().union(*map(_packages, module.body))
    scripts = [ROOT / package / "__init__.py" for package in ("onediff", "flows", "benchmarks")]
    assert [str(path) for path in scripts if _imports_torch_first(path.read_text(encoding="utf-8"))] == []
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    assert "onediff" in set().union(*map(_packages, ast.parse(conftest).body)) and not _imports_torch_first(conftest)
