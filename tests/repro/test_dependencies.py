"""The dependencies in dvc.yaml equal the imports of each stage, and a change makes exactly the right stages stale."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from onediff.repro import dependencies
from onediff.repro.dependencies import FILES, FILES_OF_NO_STAGE, NO_RESULT, PACKAGES_WITHOUT_RESULT, ROOT

DVC_YAML = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
MATRIX = {"synthesize": "scenes", "read": "mine", "retrieve": "mine", "instruct": "mine", "diffuse": "mine",
          "write": "mine"}


def test_dvc_yaml_and_packages_yaml_equal_the_output_of_make_deps(tmp_path: Path) -> None:
    names = ("dvc.yaml", "packages.yaml", "requirements.lock")
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    dependencies.write(tmp_path)
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run 'make deps'"


@cache
def _imported_names(module: str) -> list[str]:
    """Return the names that a module imports outside of `if TYPE_CHECKING`, as a simple reference implementation."""
    names = []
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _modules_by_reading(module: str) -> set[str]:
    """Return the module and all modules of the project that it imports, directly or through other modules."""
    seen, waiting = set[str](), [module]
    while waiting:
        current = waiting.pop()
        path = ROOT / current.replace(".", "/")
        if current not in seen and current not in NO_RESULT and (path.is_dir() or path.with_suffix(".py").exists()):
            seen.add(current)
            waiting += [name for name in _imported_names(current) if name.startswith("onediff")]
    return seen


@pytest.mark.parametrize("stage", sorted(DVC_YAML.keys() - {"synthesize"}))
def test_every_module_that_a_stage_imports_is_a_dependency(stage: str) -> None:
    read = _modules_by_reading(f"onediff.stages.{stage}")
    assert {dep for dep in DVC_YAML[stage]["deps"] if dep.startswith("onediff/") and dep.endswith(".py")} \
        == {file for file in dependencies.files_of(read) if file.endswith(".py")}


@pytest.mark.parametrize(("item", "other"), [("scenes", "edits"), ("edits", "scenes")])
def test_a_generated_source_does_not_depend_on_the_code_of_another(item: str, other: str) -> None:
    deps = {dep.replace("${item.source}", item) for dep in DVC_YAML["synthesize"]["deps"]}
    code = dependencies.reached(f"onediff.data.synthesis.{item}.records")
    assert set(dependencies.files_of(code)) <= deps | set(_files(f"onediff/data/synthesis/{item}"))
    # DVC tracks the complete folder of the item, so each file in it must be used.
    assert set(_files(f"onediff/data/synthesis/{item}")) <= set(dependencies.files_of(code))
    assert not [dep for dep in deps if dep.startswith(f"onediff/data/synthesis/{other}")]


def _files(folder: str) -> list[str]:
    """Return the Python files below a folder that are not empty, relative to the project's folder."""
    return [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py") if path.stat().st_size]


def test_every_module_without_a_result_is_imported_by_a_stage_and_has_a_reason() -> None:
    graph = dependencies.graph()
    used = {module for stage in DVC_YAML for module in graph.find_upstream_modules(f"onediff.stages.{stage}")}
    assert {name for name in NO_RESULT if name not in used} == {"onediff"}  # Each stage imports this package.
    assert all(NO_RESULT.values()) and all(PACKAGES_WITHOUT_RESULT.values())


def test_no_stage_imports_another_stage() -> None:
    graph = dependencies.graph()
    shared = {"onediff.stages.command", "onediff.stages.training"}
    assert {(stage, module) for stage in DVC_YAML for module in graph.find_upstream_modules(f"onediff.stages.{stage}")
            if module.startswith("onediff.stages.")} - {(stage, name) for stage in DVC_YAML for name in shared} \
        == set()


def test_every_file_that_is_not_a_python_module_is_declared() -> None:
    others = {path.relative_to(ROOT / "onediff").as_posix() for path in (ROOT / "onediff").rglob("*")
              if path.is_file() and path.suffix not in (".py", ".pyc")
              and not path.is_relative_to(ROOT / "onediff/serve")}
    opened = {(ROOT / "onediff" / Path(*module.split(".")[1:-1]) / name).resolve() for module, names in FILES.items()
              for name in names}
    assert others == {path.relative_to(ROOT / "onediff").as_posix() for path in opened} | FILES_OF_NO_STAGE


@pytest.mark.parametrize("stage", sorted(DVC_YAML))
def test_code_is_listed_by_file_so_that_a_new_file_makes_nothing_stale(stage: str) -> None:
    folders = [dep for dep in DVC_YAML[stage]["deps"] if dep.startswith("onediff/") and (ROOT / dep).is_dir()]
    assert folders == []


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose stages only create their output files, so that DVC can run all stages quickly."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("onediff", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("packages.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("pairs", "written", "synthetic", "own/scenes", "own/edits", "pretrained"):
        (folder / "data" / name).mkdir(parents=True)
    (folder / "data/own/edits/photo.png").write_bytes(b"photo")
    params = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    YAML().dump(params, folder / "params.yaml")
    stages = json.loads(json.dumps(DVC_YAML))
    for stage in stages.values():
        outs = [out if isinstance(out, str) else next(iter(out)) for out in [*stage["outs"], *stage.get("metrics", [])]]
        stage["cmd"] = " && ".join(f"mkdir -p $(dirname {out}) && echo 1 > {out}" for out in outs)
    YAML().dump({"stages": stages}, folder / "dvc.yaml")
    for command in (["init", "-q", "--no-scm"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, check=True)
    assert _stale(folder) == set()
    return folder


BOTH = {"synthesize@scenes", "synthesize@edits"}
AFTER_DATA = {"align", "tune", "caption", "stress"}


@pytest.mark.parametrize(("paths", "stale"), [
    ("onediff/train/speed.py", {"align", "tune"}),
    ("onediff/stages/training.py", {"align", "tune"}),
    ("onediff/config/params.py onediff/tracking/runs.py onediff/train/cost.py onediff/train/new_module.py", set()),
    ("onediff/data/folders.py", {"probe", "validate", "build"}),
    ("onediff/eval/report/report.css.j2", {"report"}),
    ("onediff/data/synthesis/scenes/blender.py", {"synthesize@scenes"}),
    ("onediff/data/synthesis/edits/operations.py", {"synthesize@edits"}),
    ("data/own/edits/photo.png", {"synthesize@edits"}),
    ("presets/backbones/tiny/vision/model.safetensors", {"align"}),
    ("presets/backbones/mine/model.safetensors", {"align"}),
    ("data/pretrained/clip/model.safetensors", {"probe"}),
])
def test_a_changed_file_makes_the_stages_stale_that_use_it(project: Path, paths: str, stale: set[str]) -> None:
    files = [project / path for path in paths.split()]
    before = {file: file.read_bytes() for file in files if file.exists()}
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(before.get(file, b"") + b"\n# changed\n")
    try:
        assert _stale(project) == stale
    finally:
        for file in files:
            file.write_bytes(before[file]) if file in before else file.unlink()


@pytest.mark.parametrize(("package", "stale"), [
    ("torch", {"probe", "validate", "build", *AFTER_DATA}),
    ("scikit-image", BOTH),
])
def test_an_upgraded_package_makes_the_stages_stale_that_use_it(project: Path, package: str, stale: set[str]) -> None:
    path = project / "packages.yaml"
    before = path.read_text()
    changed = re.sub(rf'^{package}: ".*"$', f'{package}: "99.0"', before, flags=re.MULTILINE)
    assert changed != before
    path.write_text(changed)
    try:
        assert _stale(project) == stale
    finally:
        path.write_text(before)


def test_a_package_that_no_stage_uses_is_not_tracked() -> None:
    tracked = YAML(typ="safe").load((ROOT / "packages.yaml").read_text())
    assert not {"prefect", "mlflow", "dvc", "tqdm", "typer", "fastapi"} & tracked.keys()


def _stale(project: Path) -> set[str]:
    """Return the stages that DVC reports as changed."""
    from dvc.repo import Repo

    with contextlib.chdir(project), Repo() as repo:
        return set(repo.status())
