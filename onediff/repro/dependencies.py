"""Write the code files and packages that each stage depends on into dvc.yaml, and package versions into packages.yaml.

    make deps      # run it after you changed imports; until then tests/repro/test_dependencies.py fails

A stage depends on all modules that it imports, directly or through other modules, also inside functions; imports for
type checking do not count. A change of one of these files makes the stage stale. This module also declares the
dependencies that no import shows, such as templates. The items of a matrix stage share one list of dependencies. Code
that only one item uses must therefore be in the folder of this item.
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

# Modules that cannot change the output of a stage, each with the reason. dvc.yaml does not list them as dependencies.
NO_RESULT = {
    "onediff": "sets how OpenMP threads wait for each other",
    "onediff.config": "checks the values that DVC tracks as params; it has no default values (test_params.py)",
    "onediff.library_logs": "sets log levels",
    "onediff.paths": "defines paths; dvc.yaml also lists each path that a stage reads or writes",
    "onediff.interrupts": "stops a process early; a resumed run equals an uninterrupted one (test_killed.py)",
    "onediff.tracking": "writes to MLflow; no stage reads the run ids in data/runs",
    "onediff.stages.command": "handles arguments and signals, and checks the inputs before the stage starts",
    "onediff.repro.lock": "reads dvc.lock and DVC's cache",
    "onediff.train.launch.dispatch": "starts the training processes, which run the code of the stage",
    "onediff.train.launch.nodes": "builds the command line and the environment of the training processes",
    "onediff.train.launch.ranks": "starts and stops the training processes",
    "onediff.train.launch.slurm": "starts and stops the training processes as a Slurm job",
    "onediff.train.status": "records the progress of a run and how it ended",
    "onediff.train.cost": "counts FLOPs for the training curve; a corrected count does not change the model",
}

# FILES maps a module to the files that it opens, relative to the folder of the module.
FILES = {
    "onediff.data.quality.diffcap": ["card.md.j2"],
    "onediff.data.quality.checks_page": ["checks.html.j2"],
    "onediff.eval.report.peers": ["published.yaml"],
    "onediff.eval.report.page": ["report.css.j2", "report.html.j2", "report.js.j2"],
    "onediff.stages.instruct": ["../data/writer/prompts/v1/edit.md"],
    "onediff.stages.write": ["../data/writer/prompts/v1/differences_text.md",
                             "../data/writer/prompts/v1/differences_vision.md"],
}
# Templates and prompts that no DVC stage uses. A test checks that each template is listed here or in FILES. The files
# in onediff/serve are not listed, because no stage imports this package.
FILES_OF_NO_STAGE = {"py.typed", "data/browse.html.j2", "data/writer/prompts/v1/judgement.md",
                     "train/launch/slurm.sh.j2"}

# ITEMS maps a matrix stage of dvc.yaml to the folder that contains one Python package for each item of the matrix.
ITEMS = {"synthesize": "onediff/data/synthesis"}

# Python packages that cannot change the outputs of a DVC stage, each with the reason.
PACKAGES_WITHOUT_RESULT = {
    "openai": "sends requests to the writer; all answers are stored in data/answers",
    "psutil": "inspects processes",
    "ray": "distributes work over machines; the output bytes do not depend on it",
    "rich": "prints tables",
    "ruamel-yaml": "reads YAML",
    "threadpoolctl": "limits threads",
    "tqdm": "shows progress",
}
# DISTRIBUTIONS maps modules to their packages, for modules that the metadata of the installed packages does not list.
DISTRIBUTIONS = {"bmesh": "bpy", "mathutils": "bpy", "pillow_heif": "pillow-heif", "ruamel": "ruamel-yaml"}
# USED_BY_PACKAGES maps a package that OneDiff imports to other packages that compute parts of its results.
USED_BY_PACKAGES = {
    "scikit-image": ["scipy"],
    "scikit-learn": ["scipy"],
    "transformers": ["safetensors", "tokenizers"],
}
# Maps a module to the packages whose files it reads without an import: these packages contain photographs.
USED_BY_MODULES = {"onediff.data.synthesis.edits.photographs": ["matplotlib", "scikit-image", "scikit-learn"]}


def write(root: Path = ROOT) -> None:
    """Update the dependencies in dvc.yaml and the versions in packages.yaml, both in the folder `root`.

    Comments and all other content of the two files stay unchanged.
    """
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 1000  # With a smaller width, ruamel.yaml wraps long lines and leaves spaces at their ends.
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
    # Package versions come from requirements.lock. A package that is missing there keeps its version in packages.yaml.
    text = (root / PACKAGES).read_text(encoding="utf-8")
    pins = [line for line in (root / "requirements.lock").read_text(encoding="utf-8").splitlines() if "==" in line]
    versions = YAML(typ="safe").load(text) | dict(pin.split("==") for pin in pins)
    head = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    lines = [f'{name}: "{versions[name]}"\n' for name in sorted(used)]
    (root / PACKAGES).write_text("".join([*head, *lines]), encoding="utf-8")


def _replace(items: CommentedSeq, new: list[Any]) -> None:
    """Replace the items of a YAML list, and keep each comment beside its item.

    ruamel.yaml stores a comment under the index of its item, and this index changes when items are added or removed.
    """
    comments = {str(items[number]): comment for number, comment in items.ca.items.items()}
    items[:] = new
    items.ca.items.clear()
    items.ca.items.update({number: comments[str(item)] for number, item in enumerate(new) if str(item) in comments})


def dependencies(name: str, command: str) -> tuple[list[str], list[str]]:
    """Return two lists for a stage of dvc.yaml: the files below onediff/ and the packages that the stage depends on.

    `name` is the name of the stage, and `command` is the value of its key `cmd`.
    """
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
    """Return the names of a module and of all modules and packages that it imports, directly or through other modules.

    Modules in NO_RESULT and `avoided` are left out, and their imports are not followed.
    """
    closed, seen, waiting = {*NO_RESULT, *avoided}, set[str](), [module]
    while waiting:
        current = waiting.pop()
        if current not in seen and current not in closed:
            seen.add(current)
            waiting += graph().find_modules_directly_imported_by(current)
    return seen


@cache
def graph() -> grimp.ImportGraph:
    """Return the graph of all imports in the package `onediff`, without imports that are only for type checking."""
    return grimp.build_graph("onediff", include_external_packages=True, exclude_type_checking_imports=True,
                             cache_dir=None)


def files_of(modules: Iterable[str]) -> list[str]:
    """Return the paths of these modules and of the files that they open, relative to the project's folder.

    The __init__.py of each package that contains one of the modules is included if it contains code.
    """
    files: set[Path] = set()
    for module in modules:
        if module.split(".")[0] == "onediff":
            packages = [module[:index] for index, letter in enumerate(module) if letter == "."]
            files |= {_file_of(name) for name in (module, *packages)
                      if name not in NO_RESULT and _holds_code(_file_of(name))}
            files |= {(_file_of(module).parent / name).resolve() for name in FILES.get(module, ())}
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def _file_of(module: str) -> Path:
    """Return the path of the file that Python runs when this module or package is imported."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _holds_code(path: Path) -> bool:
    """Return True if a Python file contains code, and False if it contains only docstrings and comments."""
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
               for node in ast.parse(path.read_text(encoding="utf-8")).body)


def packages_of(modules: Iterable[str]) -> list[str]:
    """Return the names of the Python packages that can change the results of these modules.

    These are the packages that the modules import, and the packages in USED_BY_PACKAGES and USED_BY_MODULES. Names are
    spelled as in requirements.lock, such as scikit-image. Packages in PACKAGES_WITHOUT_RESULT are left out.
    """
    modules = set(modules)
    distributions = _installed_distributions() | DISTRIBUTIONS
    external = {name for name in modules if name.split(".")[0] != "onediff"} - sys.stdlib_module_names
    packages = {distributions[name] for name in external}
    packages |= {name for module in modules for name in USED_BY_MODULES.get(module, ())}
    packages |= {other for name in packages for other in USED_BY_PACKAGES.get(name, ())}
    return sorted(packages - PACKAGES_WITHOUT_RESULT.keys())


@cache
def _installed_distributions() -> dict[str, str]:
    """Return a dict from each importable module to the package that contains it: {"skimage": "scikit-image", ...}."""
    return {module: re.sub(r"[-_.]+", "-", names[0]).lower() for module, names in packages_distributions().items()}


if __name__ == "__main__":
    write()
