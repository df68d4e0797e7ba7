"""METEOR 1.5 for English (Denkowski and Lavie, WMT 2014).

METEOR's Java program counts the matching words of each pair. This module computes the scores from these counts.

Shapes:  n pairs, R rows of counts or of sums of counts.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onediff.eval.metrics.java import Command, Program
from onediff.eval.metrics.ngrams import Numbers
from onediff.eval.metrics.words import Pair

# METEOR's parameters for English. STAGES has the weights of exact, stem, synonym and paraphrase matches.
ALPHA, BETA, GAMMA, DELTA, STAGES = 0.85, 0.2, 0.6, 0.75, (1.0, 0.6, 0.8, 0.6)
COUNTS = 23  # how many counts METEOR's Java program prints for each pair
MAX_COPIES = 4  # largest number of Java processes; each needs half a GiB of memory and six seconds of CPU time to start
LINES_PER_COPY = 2_500  # With fewer lines per Java process, starting another process takes more time than it saves.


class Meteor:
    """Scorer that keeps METEOR's Java program running between calls, and starts more processes for many lines."""

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self.program = Program("METEOR", _command, timeout_s=timeout_s)
        self._num_lines = 0

    def score(self, pairs: Sequence[Pair]) -> tuple[float, list[float], Numbers]:
        """Return METEOR of all pairs together, METEOR of each pair, and 23 counts for each pair, (n pairs, 23).

        The scores lie between 0 and 1. Raises ValueError if the Java program fails.
        """
        # Like pycocoevalcap, we remove the separator "|||" from the prediction, but not from the references.
        lines = [" ||| ".join(("SCORE", *references, prediction.replace("|||", "").replace("  ", " ")))
                 for prediction, references in pairs]
        fresh = list(dict.fromkeys(lines))
        self._num_lines += len(fresh)
        copies = min(MAX_COPIES, len(os.sched_getaffinity(0)), self._num_lines // LINES_PER_COPY)
        self.program.start(max(1, copies))
        answers = dict(zip(fresh, self.program.ask(fresh), strict=True))
        strange = next((answer for answer in answers.values() if answer.count(" ") != COUNTS - 1), None)
        if strange is not None:
            raise ValueError(f"METEOR: the Java program must print {COUNTS} counts for each pair, got "
                             f"{strange[:200]!r}; reinstall pycocoevalcap")
        counts = np.array(" ".join(answers[line] for line in lines).split(), dtype=float).reshape(-1, COUNTS)
        return float(meteor(sums(counts).sum(0, keepdims=True))[0]), meteor(sums(counts)).tolist(), counts


def sums(counts: Numbers) -> Numbers:
    """Return the counts of each pair in the form in which METEOR adds them up for a corpus score, (n pairs, 23).

    If all words of a pair match in one chunk (one run of adjacent words), the number of chunks is set to 0, as in
    METEOR's own code.
    """
    rows = counts.copy()
    rows[(rows[:, 21:23] == rows[:, :2]).all(1) & (rows[:, 20] == 1), 20] = 0
    return rows


def meteor(sums: Numbers) -> Numbers:
    """Return the METEOR score, 0 to 1, for each of R rows of 23 counts. A row may be a sum over several pairs."""
    # Each array has two columns: the number in the prediction and in the reference.
    length, function = sums[:, :2], sums[:, 2:4]
    content, functional = (sums[:, 4:20].reshape(-1, 4, 2, 2)[:, :, part] for part in (0, 1))  # (R, 4 stages, 2 sides)
    stages = np.array(STAGES)[:, None]
    matched = (stages * (DELTA * content + (1 - DELTA) * functional)).sum(1)  # (R, 2)
    weight = DELTA * (length - function) + (1 - DELTA) * function
    precision, recall = _ratio(matched, weight).T
    mean = _ratio(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    broken = _ratio(sums[:, 20], sums[:, 21:23].mean(1))  # number of chunks divided by number of matched words
    return np.asarray(mean * (1 - GAMMA * broken**BETA))


def _ratio(over: Numbers, under: Numbers) -> Numbers:
    return np.divide(over, under, out=np.zeros_like(over), where=under != 0)


def _command() -> Command:
    from pycocoevalcap.meteor import meteor

    # Without -a, METEOR does not find its paraphrase table if the path of METEOR has a space or a non-ASCII letter.
    # METEOR encodes the full path of the table twice; with -a, we give a path relative to the working directory.
    return Command(("-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm", "-a",
                    "data/paraphrase-en.gz"), Path(meteor.__file__).parent, hello="SCORE ||| a ||| a")
