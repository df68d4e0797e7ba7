"""Which files hold the scores of which model folder, with the digest of each, so that scores cannot be exchanged.

    pipeline_evidence(model)     # results of stages tune, caption and score: every digest is the one in dvc.lock
    evidence_of(model, root)     # captions and scores that were just made beside the pipeline

A model can be registered or get new scores only with an `Evidence`. Score files are read strictly: missing keys and
values outside their range are refused.
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
ROUNDING = 1e-5  # score files have six decimal places
_CURE = "'dvc repro' scores again; if the message stays, the stage 'score' has a fault"


@dataclass(frozen=True)
class Evidence:
    """A model folder with the scores of its captions. `root`: the folder in which `files` are. `model`, `model_md5`:
    digests of the model folder. `files`: path -> the md5 by which DVC knows captions, scores of pairs and score tables.
    """

    model_dir: Path
    root: Path
    model: ModelDigests
    model_md5: str
    files: Mapping[str, str]

    @property
    def scored(self) -> Path:
        """The folder with the scores of each pair."""
        return self.root / SCORED

    def tables(self) -> dict[str, dict[str, Any]]:
        """split -> benchmark -> scores. Raises ValueError if a file no longer has its digest, or holds a value that is
        not a valid score.
        """
        if md5_of(self.scored) != self.files[SCORED]:
            raise ValueError(f"{self.scored} was changed while it was read; start again")
        tables = {}
        for split, path in TABLES.items():
            content = (self.root / path).read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != self.files[path]:
                raise ValueError(f"{self.root / path} was changed while it was read; start again")
            tables[split] = read_scores(str(self.root / path), content)
            pairs = self.scored / f"{split}.json"
            if not pairs.exists():
                raise FileNotFoundError(f"{pairs} not found: 'dvc repro' makes it")
            read_pair_scores(str(pairs), pairs.read_bytes(), tables[split])
        return tables

    def as_tag(self) -> str:
        """The tag of a version: all digests as JSON, also those of the single files in data/scored."""
        pairs = {f"{SCORED}/{path.name}": md5_of(path) for path in sorted(self.scored.glob("*.json"))}
        return json.dumps({"model": self.model_md5, **self.files, **pairs}, sort_keys=True)


def evidence_of(model_dir: Path, root: Path) -> Evidence:
    """The digests of a model folder and of the captions and scores in `root` that were just made with it."""
    files = {}
    for path in (CAPTIONS, *_OUTS_OF_SCORE):
        if not (root / path).exists():
            raise FileNotFoundError(f"{root / path} not found: 'dvc repro' makes it, 'dvc pull {path}' brings it from "
                                    "a remote")
        files[path] = md5_of(root / path)
    return Evidence(model_dir, root, model_digests(model_dir), md5_of(model_dir), files)


def pipeline_evidence(model_dir: Path, *, root: Path = Path()) -> Evidence:
    """The scores of the pipeline in `root`, if they are those of this model folder.

    By the digests in dvc.lock: stage `tune` wrote these bytes, stage `caption` read them, `score` read what `caption`
    wrote, all three read the same DiffCap, and every file is still as its stage wrote it. In a git repository the
    scores are also those of the commit, if that has the same captions. Raises FileNotFoundError for what is missing,
    else ValueError with all that does not agree.
    """
    stages = read_dvc_lock(root / DVC_LOCK)
    missing = [name for name in ("tune", "caption", "score") if name not in stages]
    if missing:
        raise ValueError(f"{root / DVC_LOCK}: must hold stage {missing[0]}, which records how the model was trained "
                         "and scored: 'dvc repro' runs it")
    evidence = evidence_of(model_dir, root)
    tune, caption, score = (stages[name] for name in ("tune", "caption", "score"))
    rules = [(str(model_dir), "the model folder that stage caption read", caption.deps.get(MODEL), evidence.model_md5),
             (f"{DVC_LOCK}: {MODEL} that stage caption read", "what stage tune left", tune.outs.get(MODEL),
              caption.deps.get(MODEL)),
             (str(root / CAPTIONS), "what stage caption left", caption.outs.get(CAPTIONS), evidence.files[CAPTIONS]),
             (f"{DVC_LOCK}: {CAPTIONS} that stage score read", "what stage caption left", caption.outs.get(CAPTIONS),
              score.deps.get(CAPTIONS)),
             *((f"{DVC_LOCK}: {DIFFCAP} that stage {name} read", "what stage tune read", tune.deps.get(DIFFCAP),
                stages[name].deps.get(DIFFCAP)) for name in ("caption", "score")),
             *((str(root / path), "what stage score left", score.outs.get(path), evidence.files[path])
               for path in _OUTS_OF_SCORE)]
    wrong = [f"{where}: must be {rule}, md5 {expected or 'none'} in {DVC_LOCK}, got {got or 'none'}; 'dvc repro' makes "
             "them agree" for where, rule, expected, got in rules if expected is None or expected != got]
    wrong += _unlike_commit(score, root)
    if wrong:
        raise ValueError("\n".join(wrong))
    return evidence


def _unlike_commit(score: Stage, root: Path) -> list[str]:
    """One line if the committed dvc.lock has other scores for the same captions, data and code. Scoring is
    deterministic, so a difference means that one of the two was edited.
    """
    content = committed(DVC_LOCK, root)
    in_commit = parse_dvc_lock(content, DVC_LOCK).get("score") if content else None
    if in_commit is None or (in_commit.deps, in_commit.params) != (score.deps, score.params):
        return []
    wrong = [path for path in _OUTS_OF_SCORE if in_commit.outs.get(path) != score.outs.get(path)]
    return [f"{root / DVC_LOCK}: {path} must be what the commit's {DVC_LOCK} has for the same captions, md5 "
            f"{in_commit.outs.get(path)}, got {score.outs.get(path)}; 'git checkout {DVC_LOCK}' and 'dvc repro' "
            "score again" for path in wrong[:1]]


# --- score files -----------------------------------------------------------------------------------------------------


def read_scores(where: str, content: bytes) -> dict[str, Any]:
    """benchmark -> its table, of metrics.json or gate.json. `where`: the file, for messages.

    Raises ValueError with one line per fault: no JSON, no benchmark, a missing key, a figure outside its range.
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
    """Checks scored/<split>.json against the tables of the same split: the same benchmarks and numbers of pairs, and
    each corpus score is the mean of the pairs'. Raises ValueError with one line per fault.
    """
    pairs = _read_mapping(where, content)
    faults = [f"{name}: must be a benchmark in both this file and the scores of its split"
              for name in sorted(pairs.keys() ^ tables.keys())]
    for name in pairs.keys() & tables.keys():
        faults += [f"{name}{fault}" for fault in _wrong_pairs(pairs[name], tables[name])]
    _raise(where, sorted(faults))


def in_range(name: str, value: object) -> bool:
    """Whether the value is a number in the range of the figure of this name. True and strings are not numbers."""
    low, high = FIGURE_RANGES.get(name, (-sys.float_info.max, sys.float_info.max))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _read_mapping(where: str, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{where}: not valid JSON ({error}); {_CURE}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{where}: must be a mapping with at least one benchmark, got "
                         f"{'an empty one' if values == {} else type(values).__name__}; {_CURE}")
    return values


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in items]
    if len(names) != len(set(names)):
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return dict(items)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _missing(table: Any, keys: Sequence[str]) -> str:
    missing = [key for key in keys if not isinstance(table, dict) or key not in table]
    return f"must have {', '.join(missing)}" if missing else ""


def _wrong_figures(path: str, name: str, value: Any) -> Iterator[str]:
    """The faults of a value and of everything in it. `name`: the figure's, which decides the range."""
    if isinstance(value, dict):
        for key, item in value.items():
            # In "change_type_accuracy_by_type" the keys are types of change and the values are figures of this name.
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
                yield f".{key}: must hold texts"
            elif key == "pair_id" and len(set(pairs[key])) != len(pairs[key]):
                yield ".pair_id: must hold each pair once"
        elif faults := list(_wrong_figures(f".{key}", key, pairs[key])):
            yield faults[0]
        elif abs(math.fsum(pairs[key]) / len(pairs[key]) - table[key]) > ROUNDING:
            yield (f".{key}: the mean of the pairs must be the score of the split, {table[key]:g}, got "
                   f"{math.fsum(pairs[key]) / len(pairs[key]):g}")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _raise(where: str, faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(f"{where}: {fault}; {_CURE}" for fault in faults[:20]))
