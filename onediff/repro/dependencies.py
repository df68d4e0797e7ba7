"""Writes into dvc.yaml the code and the packages that each stage depends on, and into packages.yaml their versions.

    make deps      # after a change of imports; tests/repro/test_dependencies.py fails until then

The code is what the stage imports, at any depth and also inside functions, but not for type checking alone. Changing
it makes the stage stale. What no import shows is declared here. DVC has one list for all items of a matrix: code of one
item alone must lie in the folder of the item, and a dep of one item that lies elsewhere is a dep of all.
"""

import ast
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import grimp
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from onediff.paths import DVC_YAML
from onediff.repro.freshness import PACKAGES

ROOT = Path(__file__).resolve().parents[2]

# Modules that cannot change the outs of a stage, each with the reason; what they import does not count either.
NO_RESULT = {
    "onediff": "sets how the threads of OpenMP wait",
    "onediff.config": "checks values that DVC tracks as params; has no defaults and computes nothing (test_params.py)",
    "onediff.library_logs": "log levels",
    "onediff.paths": "names paths; dvc.yaml names those that a stage reads and writes, too",
    "onediff.interrupts": "ends a process early; a resumed run equals an uninterrupted one (test_killed.py)",
    "onediff.tracking": "writes to MLflow; the ids of runs are in data/runs, which no stage reads",
    "onediff.stages.command": "arguments, signals and checks before the stage",
    "onediff.repro.lock": "reads dvc.lock and DVC's cache",
    "onediff.train.launch.dispatch": "starts the ranks, which run the code of the stage",
    "onediff.train.launch.nodes": "the command line and the environment of the ranks",
    "onediff.train.launch.ranks": "starts and stops the ranks",
    "onediff.train.launch.slurm": "starts and stops the ranks",
    "onediff.train.status": "records how far a run is, and how it ended",
    "onediff.train.cost": "counts FLOPs for the curve; another count is no reason to train again",
}

# Files that a module opens: relative to its folder.
FILES = {
    "onediff.data.quality.diffcap": ["card.md.j2"],
    "onediff.data.quality.checks_page": ["checks.html.j2"],
    "onediff.eval.report.peers": ["published.yaml"],
    "onediff.eval.report.page": ["report.css.j2", "report.html.j2", "report.js.j2"],
    "onediff.stages.instruct": ["../data/writer/prompts/v1/edit.md"],
    "onediff.stages.write": ["../data/writer/prompts/v1/differences_text.md",
                             "../data/writer/prompts/v1/differences_vision.md"],
}
FILES_OF_NO_STAGE = {"data/browse.html.j2", "data/writer/prompts/v1/judgement.md", "serve/card.md.j2",
                     "train/launch/slurm.sh.j2"}

# Stage -> the folder that holds a package for each item of the stage's matrix.
ITEMS = {"synthesize": "onediff/data/synthesis"}

# Packages that cannot change the outs of a stage.
PACKAGES_WITHOUT_RESULT = {
    "openai": "carries questions to the writer; its answers are kept in data/answers",
    "psutil": "looks at processes",
    "ray": "spreads work over machines; the bytes stay the same",
    "rich": "prints tables",
    "ruamel-yaml": "reads YAML",
    "threadpoolctl": "limits threads",
    "tqdm": "shows progress",
}
DISTRIBUTIONS = {"bmesh": "bpy", "mathutils": "bpy", "ruamel": "ruamel-yaml"}  # modules that metadata cannot resolve
USED_BY_PACKAGES = {  # packages that compute for a package that we import
    "scikit-image": ["scipy"],
    "scikit-learn": ["scipy"],
    "transformers": ["safetensors", "tokenizers"],
}
USED_BY_MODULES = {"onediff.data.synthesis.edits.pictures": ["scikit-learn"]}  # two of the photographs


def write(root: Path = ROOT) -> None:
    """Rewrites dvc.yaml and packages.yaml. Comments and everything else stay."""
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 1000  # ruamel would leave spaces at the end of lines
    yaml.preserve_quotes = True
    content = yaml.load((root / DVC_YAML).read_text(encoding="utf-8"))
    used: set[str] = set()
    for name, stage in content["stages"].items():
        code, packages = dependencies(name, stage["cmd"])
        used |= set(packages)
        _replace(stage["deps"], [*code, *(dep for dep in stage["deps"] if not dep.startswith("onediff/"))])
        if "params" not in stage:
            stage.insert(list(stage).index("deps") + 1, "params", CommentedSeq())
        tracked = CommentedSeq(packages)
        tracked.fa.set_flow_style()
        params = [item for item in stage["params"] if not (isinstance(item, dict) and PACKAGES in item)]
        _replace(stage["params"], [*params, CommentedMap({PACKAGES: tracked})])
        stage["params"].fa.set_block_style()
    with (root / DVC_YAML).open("w", encoding="utf-8") as file:
        yaml.dump(content, file)
    # Versions are those of requirements.lock; a package that it does not hold keeps its version in packages.yaml.
    text = (root / PACKAGES).read_text(encoding="utf-8")
    pins = [line for line in (root / "requirements.lock").read_text(encoding="utf-8").splitlines() if "==" in line]
    versions = YAML(typ="safe").load(text) | dict(pin.split("==") for pin in pins)
    head = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    lines = [f'{name}: "{versions[name]}"\n' for name in sorted(used)]
    (root / PACKAGES).write_text("".join([*head, *lines]), encoding="utf-8")


def _replace(items: CommentedSeq, new: list[Any]) -> None:
    """A comment stays beside its item; ruamel keeps it by the item's number."""
    comments = {str(items[number]): comment for number, comment in items.ca.items.items()}
    items[:] = new
    items.ca.items.clear()
    items.ca.items.update({number: comments[str(item)] for number, item in enumerate(new) if str(item) in comments})


def dependencies(name: str, command: str) -> tuple[list[str], list[str]]:
    """The files below onediff/ and the packages that a stage of dvc.yaml depends on."""
    module = re.findall(r"-m (\S+)", command)[0]
    if name not in ITEMS:
        modules = reached(module)
        return files_of(modules), packages_of(modules)
    parent = ITEMS[name]
    items = {path.parent.name for path in (ROOT / parent).glob("*/__init__.py")}
    modules = set()
    for item in items:
        others = tuple(f"{parent}/{other}".replace("/", ".") for other in items - {item})
        modules |= reached(module, avoided={name for name in graph().modules if name.startswith(others)})
    folders = tuple(f"{parent}/{item}/" for item in items)
    files = [file for file in files_of(modules) if not file.startswith(folders)]
    return sorted([*files, f"{parent}/${{item.source}}"]), packages_of(modules)


def reached(module: str, *, avoided: Iterable[str] = ()) -> set[str]:
    """The module and what it imports at any depth, packages included, but through no module that has no result."""
    closed, seen, waiting = {*NO_RESULT, *avoided}, set[str](), [module]
    while waiting:
        current = waiting.pop()
        if current not in seen and current not in closed:
            seen.add(current)
            waiting += graph().find_modules_directly_imported_by(current)
    return seen


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("onediff", include_external_packages=True, exclude_type_checking_imports=True,
                             cache_dir=None)


def files_of(modules: Iterable[str]) -> list[str]:
    """The files of the modules and the files that they open. Packages count if their __init__.py holds code."""
    files: set[Path] = set()
    for module in modules:
        if module.split(".")[0] == "onediff":
            packages = [module[:place] for place, letter in enumerate(module) if letter == "."]
            files |= {_file_of(name) for name in (module, *packages)
                      if name not in NO_RESULT and _holds_code(_file_of(name))}
            files |= {(_file_of(module).parent / name).resolve() for name in FILES.get(module, ())}
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def _file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _holds_code(path: Path) -> bool:
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
               for node in ast.parse(path.read_text(encoding="utf-8")).body)


def packages_of(modules: Iterable[str]) -> list[str]:
    """The distributions that the modules import, and those that compute for them, as requirements.lock spells them."""
    modules = set(modules)
    distributions = _installed_distributions() | DISTRIBUTIONS
    others = {name for name in modules if name.split(".")[0] != "onediff"} - sys.stdlib_module_names
    packages = {distributions[name] for name in others}
    packages |= {name for module in modules for name in USED_BY_MODULES.get(module, ())}
    packages |= {other for name in packages for other in USED_BY_PACKAGES.get(name, ())}
    return sorted(packages - PACKAGES_WITHOUT_RESULT.keys())


@cache
def _installed_distributions() -> dict[str, str]:
    """Name of a module -> its distribution."""
    return {module: re.sub(r"[-_.]+", "-", names[0]).lower() for module, names in packages_distributions().items()}


if __name__ == "__main__":
    write()
