"""Which files hold the scores of which model folder, with the digest of each, so that scores cannot be exchanged.

    pipeline_evidence(model)     # what stages tune, caption and score made: every digest is the one in dvc.lock
    evidence_of(model, root)     # what was just captioned and scored beside the pipeline

Only with an `Evidence` can a model be registered or get new scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onediff.model.digest import ModelDigests, model_digests
from onediff.registry.commits import committed_text
from onediff.registry.score_files import read_pair_scores, read_scores
from onediff.repro.lock import LOCK, Stage, md5_of, parse_dvc_lock, read_dvc_lock

MODEL, DIFFCAP, CAPTIONS, SCORED = "data/models/tune", "data/diffcap", "data/captions", "data/scored"
TABLES = {"test": "data/metrics.json", "gate": "data/gate.json"}
_MADE_BY_SCORE = (SCORED, *TABLES.values())
_CURE = "'dvc repro' makes them agree"


@dataclass(frozen=True)
class Evidence:
    """`root`: the folder in which `files` are. `model`, `model_md5`: digests of the model folder that was captioned.
    `files`: path -> the md5 by which DVC knows captions, scores of pairs and tables of scores.
    """

    root: Path
    model: ModelDigests
    model_md5: str
    files: Mapping[str, str]

    @property
    def scored(self) -> Path:
        """The folder with what each pair scored."""
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
    return Evidence(root, model_digests(model_dir), md5_of(model_dir), {path: _present(root, path) for path in (
        CAPTIONS, *_MADE_BY_SCORE)})


def pipeline_evidence(model_dir: Path, *, root: Path = Path()) -> Evidence:
    """The scores of the pipeline in `root`, if they are those of this model folder.

    By the digests in dvc.lock: stage `tune` left these bytes, stage `caption` read them, `score` read what `caption`
    left, all three read the same DiffCap, and every file is still as its stage left it. In a git repository the scores
    are also those of the commit, where that had the same captions. Raises FileNotFoundError for what is missing, else
    ValueError with all that does not agree.
    """
    stages = read_dvc_lock(root / LOCK)
    missing = [name for name in ("tune", "caption", "score") if name not in stages]
    if missing:
        raise ValueError(f"{root / LOCK}: must hold stage {missing[0]}, which records how the model was trained "
                         "and scored: 'dvc repro' runs it")
    evidence = evidence_of(model_dir, root)
    tune, caption, score = (stages[name] for name in ("tune", "caption", "score"))
    wrong = [_must_be(str(model_dir), "the model folder that stage caption read", caption.deps.get(MODEL),
                      evidence.model_md5),
             _must_be(f"{LOCK}: {MODEL} that stage caption read", "what stage tune left", tune.outs.get(MODEL),
                      caption.deps.get(MODEL)),
             _must_be(str(root / CAPTIONS), "what stage caption left", caption.outs.get(CAPTIONS),
                      evidence.files[CAPTIONS]),
             _must_be(f"{LOCK}: {CAPTIONS} that stage score read", "what stage caption left",
                      caption.outs.get(CAPTIONS), score.deps.get(CAPTIONS)),
             *(_must_be(f"{LOCK}: {DIFFCAP} that stage {name} read", "what stage tune read", tune.deps.get(DIFFCAP),
                        stage.deps.get(DIFFCAP)) for name, stage in (("caption", caption), ("score", score))),
             *(_must_be(str(root / path), "what stage score left", score.outs.get(path), evidence.files[path])
               for path in _MADE_BY_SCORE), _unlike_commit(score, root)]
    if any(wrong):
        raise ValueError("\n".join(filter(None, wrong)))
    return evidence


def _present(root: Path, path: str) -> str:
    if not (root / path).exists():
        raise FileNotFoundError(f"{root / path} not found: 'dvc repro' makes it, 'dvc pull {path}' brings it from a "
                                "remote")
    return md5_of(root / path)


def _must_be(where: str, rule: str, wanted: str | None, got: str | None) -> str:
    """One line if the digests differ, else nothing."""
    if wanted is not None and wanted == got:
        return ""
    return f"{where}: must be {rule}, md5 {wanted or 'none'} in {LOCK}, got {got or 'none'}; {_CURE}"


def _unlike_commit(score: Stage, root: Path) -> str:
    """One line if the committed dvc.lock has other scores for the same captions, data and code; empty if git has no
    dvc.lock. Scoring is deterministic, so a difference means that one of the two was edited.
    """
    content = committed_text(LOCK, root)
    committed = parse_dvc_lock(content, LOCK).get("score") if content else None
    if committed is None or (committed.deps, committed.params) != (score.deps, score.params):
        return ""
    wrong = [path for path in _MADE_BY_SCORE if committed.outs.get(path) != score.outs.get(path)]
    return (f"{root / LOCK}: {wrong[0]} must be what the commit's {LOCK} has for the same captions, md5 "
            f"{committed.outs.get(wrong[0])}, got {score.outs.get(wrong[0])}; 'git checkout {LOCK}' and 'dvc repro' "
            "score again") if wrong else ""
