"""Rules of the project that no type checker enforces: its layout, who may import which tool, and what git tracks."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = ROOT / "presets/backbones/tiny"
OWNERS = {
    "mlflow": {"onediff/serve/pyfunc.py", *(f"onediff/tracking/{name}.py" for name in ("connection", "runs")), *(
        f"onediff/registry/{name}.py" for name in ("artifacts", "audit_trail", "retention", "store", "versions"))},
    "great_expectations": {"onediff/data/quality/checks.py"},
    "deepspeed": {"onediff/train/engine.py"},
    "dvc": set(),
}


def _sources() -> list[Path]:
    """Return all Python files of onediff and flows."""
    return [path for folder in ("onediff", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, also inside functions."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("name", ["flows", "onediff", "data", "mlflow", "tests", "presets", ".ci/run", "Makefile",
                                  "dvc.yaml", "params.yaml", "packages.yaml", "prefect.yaml", "deploy",
                                  "pyproject.toml", "requirements.lock", "README.md", "LICENSE", "runtime.example.yaml",
                                  ".dvcignore", "data/README.md"])
def test_the_top_level_contains(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_only_the_owner_of_a_tool_imports_it(package: str) -> None:
    users = {str(path.relative_to(ROOT)) for path in _sources() if package in _imports(path)}
    assert users == OWNERS[package]


def test_only_one_module_opens_images_of_users() -> None:
    users = {str(path.relative_to(ROOT)) for path in _sources() if "Image.open(" in path.read_text(encoding="utf-8")}
    generators = {f"onediff/data/synthesis/{name}.py" for name in ("edits/records", "scenes/blender")}
    assert users == {"onediff/inputs/repair.py", *generators}, "the generators open only images that they have made"


def test_the_folder_mlflow_contains_no_python_file() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))


@pytest.mark.parametrize("path", ["data/README.md", "data/metrics.json", "data/gate.json", "data/stress.json",
                                  "onediff/data/record.py",
                                  "presets/backbones/tiny/vision/model.safetensors", "dvc.lock"])
def test_git_does_not_ignore(path: str) -> None:
    _need_git()
    answer = subprocess.run(["git", "check-ignore", "-v", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 1, answer.stdout


@pytest.mark.parametrize("path", [".onediff/mlflow.db", "runtime.yaml", ".venv/bin/python", "flows/__pycache__/a.pyc"])
def test_git_ignores(path: str) -> None:
    _need_git()
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0


def _need_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")


@pytest.mark.parametrize("module", ["onediff", "onediff.cli.main"])
def test_an_import_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "mlflow", "great_expectations", "deepspeed", "pandas", "numpy", "prefect"}
    assert not heavy & set(done.stdout.split())


def _stages() -> dict[str, tuple[str, list[str]]]:
    """Return the module and the dependencies of each stage in dvc.yaml."""
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: (re.findall(r"-m (\S+)", stage["cmd"])[0], stage["deps"]) for name, stage in stages.items()}


def test_every_dependency_in_dvc_yaml_exists_or_is_the_output_of_a_stage() -> None:
    loaded = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    listed = [out for stage in loaded.values() for out in (*stage.get("outs", []), *stage.get("metrics", []))]
    outs = {out if isinstance(out, str) else next(iter(out)) for out in listed}
    deps = {dep for _, needed in _stages().values() for dep in needed}
    provided_by_users = {"data/raw/${item.source}"}
    files = [dep.replace("${item.source}", "scenes") for dep in sorted(deps - outs - provided_by_users)]
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", ["pairs/coco", "written/coco", "answers/coco/write.jsonl", "instructed/coco.jsonl"])
def test_git_ignores_images_and_answers_even_if_the_first_run_fails(path: str) -> None:
    _need_git()
    assert subprocess.run(["git", "check-ignore", "-q", f"data/{path}"], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("folder", ["data/pairs", "data/written", "data/synthetic", "data/pretrained",
                                    "data/own/scenes", "data/own/edits"])
def test_a_folder_that_a_stage_depends_on_exists_before_any_source_exists(folder: str) -> None:
    _need_git()
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [f"{folder}/.gitignore"]


def test_git_ignores_raw_data_but_not_the_dvc_files_that_track_it() -> None:
    _need_git()
    paths = ["data/raw/coco/1.jpg", "data/raw/coco.dvc", "data/raw/a/b.zip", "data/raw/a/b.zip.dvc"]
    answer = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stdout.split() == ["data/raw/coco/1.jpg", "data/raw/a/b.zip"]


def test_no_stage_depends_on_the_run_ids_of_mlflow() -> None:
    assert not [name for name, (_, deps) in _stages().items() if any(dep.startswith("data/runs") for dep in deps)]


def test_the_committed_backbones_contain_only_a_vision_tower_and_a_language_model() -> None:
    from safetensors import safe_open

    for part, prefixes in {"vision": ("vision_model.", "embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."),
                           "language": ("model.", "lm_head.")}.items():
        with safe_open(BACKBONES / part / "model.safetensors", "pt") as weights:
            keys = list(weights.keys())
        assert keys and not [key for key in keys if not key.startswith(prefixes)]
        assert not [key for key in keys if re.search("delta|projector|cross", key)]
        named = json.loads((BACKBONES / part / "config.json").read_text())["architectures"]
        assert named == [{"vision": "CLIPVisionModel", "language": "LlamaForCausalLM"}[part]]


def test_the_committed_backbones_are_small() -> None:
    assert sum(path.stat().st_size for path in BACKBONES.rglob("*") if path.is_file()) <= 12 * 2**20


def test_requirements_lock_contains_no_local_build_of_torch_and_no_index() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.]+", pin) for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)


def test_requirements_lock_contains_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~ ]", item, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-") for item in wanted}
    locked = {line.split("==")[0].replace(".", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert names <= locked


def test_requirements_lock_leaves_out_the_extra_heic_because_its_wheel_contains_gpl_code() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [item.split(">=")[0] for item in extras["heic"]] == ["pillow-heif"]
    assert "heif" not in (ROOT / "requirements.lock").read_text()
    assert "--extra heic" not in (ROOT / "Makefile").read_text()


def test_pyproject_toml_declares_every_imported_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {_normal(re.split(r"[<>=!~ \[]", item, maxsplit=1)[0]) for items in lists for item in items}
    declared |= {"bpy"}  # Only `make blender` installs bpy, because its dependencies conflict with those of onediff.
    imported = set().union(*(_imports(path) for path in _sources())) - sys.stdlib_module_names - {"onediff", "flows"}
    other_names = {"bmesh": "bpy", "mathutils": "bpy", "pillow_heif": "pillow-heif",
                   "ruamel": "ruamel-yaml"}
    distributions = packages_distributions()
    owners = {name: {other_names.get(name, name), *map(_normal, distributions.get(name, []))} for name in imported}
    assert [name for name, candidates in owners.items() if not candidates & declared] == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.lower())
