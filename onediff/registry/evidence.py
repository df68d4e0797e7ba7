"""Evidence that score files belong to a model folder: the digests of all files, so that scores cannot be exchanged.

    pipeline_evidence(model)     # results of the stages tune, caption and score, with the digests in dvc.lock
    evidence_of(model, root)     # captions and scores that were created in another folder, outside the pipeline

Registering a model and replacing its scores require an `Evidence`. Score files are read strictly: missing keys and
values outside their range raise an error.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onediff import paths
from onediff.eval.metrics.catalog import FIGURE_RANGES, PAIR_METRICS, REQUIRED
from onediff.git import committed
from onediff.model.digest import ModelDigests, model_digests
from onediff.paths import DVC_LOCK
from onediff.repro.lock import Stage, md5_of, parse_dvc_lock, read_dvc_lock

MODEL, DIFFCAP, CAPTIONS, SCORED = map(str, (paths.TRAINED, paths.DIFFCAP, paths.CAPTIONS, paths.SCORED))
TABLES = {"test": str(paths.METRICS), "gate": str(paths.GATE)}
_OUTS_OF_SCORE = (SCORED, *TABLES.values())
ROUNDING = 1e-5  # Scores that differ by at most this number are equal, because score files have six decimal places.
_CURE = "'dvc repro' scores again; if the message stays, the stage 'score' has a fault"


@dataclass(frozen=True)
class Evidence:
    """Evidence that score files belong to a model: the digests of the model folder, its captions and their scores.

    `model` has the SHA-256 digests of the folder `model_dir`, and `model_md5` is its md5. `files` maps the paths of
    the captions, of the scores of each image pair and of the score tables, relative to `root`, to their md5. Each md5
    is the one that DVC would write into dvc.lock.
    """

    model_dir: Path
    root: Path
    model: ModelDigests
    model_md5: str
    files: Mapping[str, str]

    @property
    def scored(self) -> Path:
        """Return the folder with the scores of each image pair."""
        return self.root / SCORED

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return the score tables as {"test": {benchmark: scores}, "gate": {benchmark: scores}}, after checking them.

        Raises ValueError if a score file has changed since its md5 was computed, or contains an invalid score.
        """
        if md5_of(self.scored) != self.files[SCORED]:
            raise ValueError(f"{self.scored} must not change while it is being read, but it did; run the command again")
        tables = {}
        for split, path in TABLES.items():
            content = (self.root / path).read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != self.files[path]:
                raise ValueError(f"{self.root / path} must not change while it is being read, but it did; run the "
                                 "command again")
            tables[split] = read_scores(str(self.root / path), content)
            pairs = self.scored / f"{split}.json"
            if not pairs.exists():
                raise FileNotFoundError(f"{pairs} does not exist: run 'dvc repro' to create it")
            read_pair_scores(str(pairs), pairs.read_bytes(), tables[split])
        return tables

    def as_tag(self) -> str:
        """Return the md5 of the model folder, the captions and each score file as a JSON text, for an MLflow tag."""
        pairs = {f"{SCORED}/{path.name}": md5_of(path) for path in sorted(self.scored.glob("*.json"))}
        return json.dumps({"model": self.model_md5, **self.files, **pairs}, sort_keys=True)


def evidence_of(model_dir: Path, root: Path) -> Evidence:
    """Return the `Evidence` for a model folder and for the captions and scores in `root` that this model produced."""
    files = {}
    for path in (CAPTIONS, *_OUTS_OF_SCORE):
        if not (root / path).exists():
            raise FileNotFoundError(f"{root / path} does not exist: run 'dvc repro' to create it, or 'dvc pull {path}' "
                                    "to download it from a remote")
        files[path] = md5_of(root / path)
    return Evidence(model_dir, root, model_digests(model_dir), md5_of(model_dir), files)


def pipeline_evidence(model_dir: Path, *, root: Path = Path()) -> Evidence:
    """Check that the pipeline's scores in `root` belong to the model in `model_dir`, and return the `Evidence`.

    The digests in dvc.lock must show that stage `tune` wrote the model folder, that `caption` read it, that `score`
    read the output of `caption`, that all three stages read the same data/diffcap, and that no file has changed since.
    If the dvc.lock in the git commit has the same captions, it must also have the same scores. Raises FileNotFoundError
    for missing files, and ValueError with one line for each digest that differs.
    """
    stages = read_dvc_lock(root / DVC_LOCK)
    missing = [name for name in ("tune", "caption", "score") if name not in stages]
    if missing:
        raise ValueError(f"{root / DVC_LOCK}: must contain stage {missing[0]}, which records how the model was trained "
                         "and scored, but does not: run 'dvc repro'")
    evidence = evidence_of(model_dir, root)
    tune, caption, score = (stages[name] for name in ("tune", "caption", "score"))
    rules = [(str(model_dir), "the model folder that stage caption read", caption.deps.get(MODEL), evidence.model_md5),
             (f"{DVC_LOCK}: {MODEL} that stage caption read", "the output of stage tune", tune.outs.get(MODEL),
              caption.deps.get(MODEL)),
             (str(root / CAPTIONS), "the output of stage caption", caption.outs.get(CAPTIONS),
              evidence.files[CAPTIONS]),
             (f"{DVC_LOCK}: {CAPTIONS} that stage score read", "the output of stage caption",
              caption.outs.get(CAPTIONS), score.deps.get(CAPTIONS)),
             *((f"{DVC_LOCK}: {DIFFCAP} that stage {name} read", "the data that stage tune read",
                tune.deps.get(DIFFCAP), stages[name].deps.get(DIFFCAP)) for name in ("caption", "score")),
             *((str(root / path), "the output of stage score", score.outs.get(path), evidence.files[path])
               for path in _OUTS_OF_SCORE)]
    wrong = [f"{where}: must be {rule}, md5 {expected or 'none'} in {DVC_LOCK}, got {got or 'none'}; run 'dvc repro' "
             "to make them agree" for where, rule, expected, got in rules if expected is None or expected != got]
    wrong += _unlike_commit(score, root)
    if wrong:
        raise ValueError("\n".join(wrong))
    return evidence


def _unlike_commit(score: Stage, root: Path) -> list[str]:
    """Return a list with an error line if the dvc.lock in the git commit has other scores for the same inputs, or [].

    Scoring the same captions with the same data and code always gives the same scores. Different scores therefore
    mean that somebody edited the score files, either before the commit or after it.
    """
    content = committed(DVC_LOCK, root)
    in_commit = parse_dvc_lock(content, DVC_LOCK).get("score") if content else None
    if in_commit is None or (in_commit.deps, in_commit.params) != (score.deps, score.params):
        return []
    wrong = [path for path in _OUTS_OF_SCORE if in_commit.outs.get(path) != score.outs.get(path)]
    return [f"{root / DVC_LOCK}: {path} must be what the commit's {DVC_LOCK} has for the same captions, md5 "
            f"{in_commit.outs.get(path)}, got {score.outs.get(path)}; run 'git checkout {DVC_LOCK}' and 'dvc "
            "repro' to score again" for path in wrong[:1]]


def read_scores(where: str, content: bytes) -> dict[str, Any]:
    """Parse the score table metrics.json or gate.json, and return it as a dict from each benchmark to its scores.

    `content` is the content of the file, and `where` its path for error messages. Raises ValueError with one line for
    each fault: invalid JSON, no benchmark, a missing key, or a score outside its range.
    """
    tables = _read_mapping(where, content)
    faults: list[str] = []
    for benchmark, table in tables.items():
        missing = _missing(table, REQUIRED)
        faults += [f"{benchmark}: {missing}"] if missing else _wrong_figures(benchmark, "", table)
        if not missing and table["num_pairs"] == 0:
            faults.append(f"{benchmark}.num_pairs: must be at least 1, got 0")
    _raise(where, faults)
    return tables


def read_pair_scores(where: str, content: bytes, tables: Mapping[str, Any]) -> None:
    """Check that the scores of each image pair, in scored/<split>.json, agree with the score tables of this split.

    Both files must have the same benchmarks and numbers of image pairs. Each score in the tables must be the mean of
    the scores of the image pairs. Raises ValueError with one line for each fault.
    """
    pairs = _read_mapping(where, content)
    faults = [f"{name}: must be a benchmark in both this file and the score table of its split"
              for name in sorted(pairs.keys() ^ tables.keys())]
    for name in pairs.keys() & tables.keys():
        faults += [f"{name}{fault}" for fault in _wrong_pairs(pairs[name], tables[name])]
    _raise(where, sorted(faults))


def in_range(name: str, value: object) -> bool:
    """Return True if `value` is a number, and not a bool, in the valid range of the metric `name`."""
    low, high = FIGURE_RANGES.get(name, (-sys.float_info.max, sys.float_info.max))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _read_mapping(where: str, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors.
        raise ValueError(f"{where}: must be valid JSON, got: {error}; {_CURE}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{where}: must be a mapping with at least one benchmark, got "
                         f"{'an empty one' if values == {} else type(values).__name__}; {_CURE}")
    return values


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in items]
    if len(names) != len(set(names)):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"each key of a JSON object must occur once, but '{duplicate}' occurs twice")
    return dict(items)


def _no_number(name: str) -> float:
    raise ValueError(f"numbers must be finite in JSON, got {name}")


def _missing(table: Any, keys: Sequence[str]) -> str:
    missing = [key for key in keys if not isinstance(table, dict) or key not in table]
    return f"must have {', '.join(missing)}" if missing else ""


def _wrong_figures(path: str, name: str, value: Any) -> Iterator[str]:
    """Yield one message for each invalid number in `value`: one number, or nested dicts and lists of numbers.

    `path` is the position of `value` in the score file, such as scenes.CIDEr. `name` is the metric of `value`, which
    decides the valid range.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            # The keys in "change_type_accuracy_by_type" are types of change, so the metric is in the name before _by_.
            figure, by, _ = name.partition("_by_")
            yield from _wrong_figures(f"{path}.{key}", figure if by and figure in FIGURE_RANGES else key, item)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _wrong_figures(f"{path}[{number}]", name, item)
    elif name == "num_pairs":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{path}: must be a whole number from 0, got {_short(value)}"
    elif (name in FIGURE_RANGES or not isinstance(value, str)) and not in_range(name, value):
        low, high = FIGURE_RANGES.get(name, (math.nan, math.nan))
        rule = f"a number from {low:g} to {high:g}" if name in FIGURE_RANGES else "a finite number or a text"
        yield f"{path}: must be {rule}, got {_short(value)}"


def _wrong_pairs(pairs: Any, table: Mapping[str, Any]) -> Iterator[str]:
    if missing := _missing(pairs, ("protocol", "references", "pair_id", "group_id", *PAIR_METRICS)):
        yield f": {missing}"
        return
    for key in ("protocol", "references"):
        if pairs[key] != table[key]:
            yield f".{key}: must be {table[key]!r} as in the scores of its split, got {_short(pairs[key])}"
    for key in ("pair_id", "group_id", *PAIR_METRICS):
        if not isinstance(pairs[key], list) or len(pairs[key]) != table["num_pairs"]:
            yield f".{key}: must be a list of num_pairs {table['num_pairs']} items, got {_short(pairs[key])}"
        elif key not in PAIR_METRICS:
            if not all(isinstance(item, str) for item in pairs[key]):
                yield f".{key}: must contain strings only"
            elif key == "pair_id" and len(set(pairs[key])) != len(pairs[key]):
                yield ".pair_id: must contain each pair once"
        elif faults := list(_wrong_figures(f".{key}", key, pairs[key])):
            yield faults[0]
        elif abs(math.fsum(pairs[key]) / len(pairs[key]) - table[key]) > ROUNDING:
            yield (f".{key}: the mean of the pairs must be the score of the split, {table[key]:g}, got "
                   f"{math.fsum(pairs[key]) / len(pairs[key]):g}")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to convert an integer with thousands of digits to text.
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _raise(where: str, faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(f"{where}: {fault}; {_CURE}" for fault in faults[:20]))
