"""METEOR 1.5 for English: its Java program counts what matches, the score follows from the counts here.

Shapes:  n pairs, R rows of counts or of their sums.
Denkowski and Lavie, WMT 2014.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onediff.eval.metrics.java import Command, Program
from onediff.eval.metrics.ngrams import Numbers
from onediff.eval.metrics.words import Pair

ALPHA, BETA, GAMMA, DELTA, STAGES = 0.85, 0.2, 0.6, 0.75, (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
COUNTS = 23  # of each pair
MAX_COPIES = 4  # half a GiB and six processor seconds each
LINES_PER_COPY = 2_500  # after so many lines for each copy, loading one more pays


class Meteor:
    """A driver that keeps its Java for later calls, and starts another copy on another core for many lines."""

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self.program = Program("METEOR", _command, timeout_s=timeout_s)
        self._num_lines = 0

    def score(self, pairs: Sequence[Pair]) -> tuple[float, list[float], Numbers]:
        """Corpus and item scores, 0 to 1, and the counts (n, 23) of pairs. Raises ValueError if Java fails."""
        # As pycocoevalcap writes a line: it removes the separator from the prediction only.
        lines = [" ||| ".join(("SCORE", *references, prediction.replace("|||", "").replace("  ", " ")))
                 for prediction, references in pairs]
        fresh = list(dict.fromkeys(lines))
        self._num_lines += len(fresh)
        copies = min(MAX_COPIES, len(os.sched_getaffinity(0)), self._num_lines // LINES_PER_COPY)
        self.program.start(max(1, copies))
        answers = dict(zip(fresh, self.program.ask(fresh), strict=True))
        strange = next((answer for answer in answers.values() if answer.count(" ") != COUNTS - 1), None)
        if strange is not None:
            raise ValueError(f"METEOR: a pair must be answered by {COUNTS} counts, got {strange[:200]!r}")
        counts = np.array(" ".join(answers[line] for line in lines).split(), dtype=float).reshape(-1, COUNTS)
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


def _command() -> Command:
    from pycocoevalcap.meteor import meteor

    # Without -a the jar encodes its own path twice and finds no table below a folder whose name has a space or a
    # letter outside ASCII. Relative to the working folder, the path of the table has neither.
    return Command(("-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm", "-a",
                    "data/paraphrase-en.gz"), Path(meteor.__file__).parent, hello="SCORE ||| a ||| a")
