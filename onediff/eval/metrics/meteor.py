"""METEOR 1.5 for English: its Java program counts what matches, the score follows from the counts here.

Shapes:  n pairs, R rows of counts or of their sums.
Denkowski and Lavie, WMT 2014.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from onediff.eval.metrics.java import Command, Program

ALPHA, BETA, GAMMA, DELTA, STAGES = 0.85, 0.2, 0.6, 0.75, (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
COUNTS = 23  # of each pair
MOST_COPIES = 4  # half a GiB and six processor seconds each
PAYS = 2_500  # lines asked of each copy, after which one more is worth its loading

Numbers = NDArray[np.float64]
Pair = tuple[str, list[str]]  # tokens of a prediction and of its references


class Meteor:
    """A driver that keeps its Java for later calls, and starts another copy on another core when much is asked."""

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self.program = Program("METEOR", _command, timeout_s=timeout_s)
        self._cores = min(MOST_COPIES, len(os.sched_getaffinity(0)))
        self._asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.close()

    def start(self) -> None:
        """Begins to load the tables, which takes some seconds, and returns at once."""
        self.program.start()

    def score(self, pairs: Sequence[Pair]) -> tuple[float, list[float], Numbers]:
        """Corpus and item scores, 0 to 1, and the counts (n, 23) of pairs. Raises ValueError if Java fails."""
        lines = [_line(*pair) for pair in pairs]
        fresh = list(dict.fromkeys(lines))
        self._asked += len(fresh)
        self.program.start(max(1, min(self._cores, self._asked // PAYS)))
        answers = dict(zip(fresh, self.program.ask(fresh), strict=True))
        counts = _counts([answers[line] for line in lines])
        return float(meteor(sums(counts).sum(0, keepdims=True))[0]), meteor(sums(counts)).tolist(), counts


def sums(counts: Numbers) -> Numbers:
    """What each pair adds to the sums that decide a score (n, 23): no chunk where all words match in one."""
    rows = counts.copy()
    rows[(rows[:, 21:23] == rows[:, :2]).all(1) & (rows[:, 20] == 1), 20] = 0
    return rows


def meteor(sums: Numbers) -> Numbers:
    """sums (R, 23) -> scores (R,)."""
    length, function = sums[:, :2], sums[:, 2:4]  # of the prediction, of the reference
    content, functional = (sums[:, 4:20].reshape(-1, 4, 2, 2)[:, :, part] for part in (0, 1))  # (R, 4 stages, 2 sides)
    stages = np.array(STAGES)[:, None]
    matched = (stages * (DELTA * content + (1 - DELTA) * functional)).sum(1)  # (R, 2)
    weight = DELTA * (length - function) + (1 - DELTA) * function
    precision, recall = _ratio(matched, weight).T
    mean = _ratio(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    broken = _ratio(sums[:, 20], sums[:, 21:23].mean(1))  # chunks to words
    return np.asarray(mean * (1 - GAMMA * broken**BETA))


def _ratio(over: Numbers, under: Numbers) -> Numbers:
    return np.divide(over, under, out=np.zeros_like(over), where=under != 0)


def _line(prediction: str, references: list[str]) -> str:
    """As pycocoevalcap writes it, which takes the separator out of the prediction only."""
    return " ||| ".join(("SCORE", *references, prediction.replace("|||", "").replace("  ", " ")))


def _counts(answers: list[str]) -> Numbers:
    strange = next((answer for answer in answers if answer.count(" ") != COUNTS - 1), None)
    if strange is not None:
        raise ValueError(f"METEOR: a pair must be answered by {COUNTS} counts, got {strange[:200]!r}")
    return np.array(" ".join(answers).split(), dtype=float).reshape(-1, COUNTS)


def _command() -> Command:
    from pycocoevalcap.meteor import meteor

    # Without -a the jar encodes its own path twice and finds no table below a folder whose name has a space or a
    # letter outside ASCII. Relative to the working folder, the path of the table has neither.
    return Command(("-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm", "-a",
                    "data/paraphrase-en.gz"), Path(meteor.__file__).parent, hello="SCORE ||| a ||| a")
