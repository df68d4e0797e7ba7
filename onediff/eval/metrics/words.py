"""Predictions and references as words, by pycocoevalcap's tokenizer: Stanford's PTB in lower case, no punctuation."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from onediff.eval.metrics.java import Command, Program

_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))  # where the tokenizer begins a new line
_PUSH = "x" * 25_000 + " x x"  # longer than the three buffers of 8 KiB between its words and us
_REMEMBERED = 50_000  # captions; references come back at every validation

Predictions = dict[str, str]
References = dict[str, list[str]]
Pair = tuple[str, list[str]]  # tokens of a prediction and of its references
Text = tuple[str, str]  # a caption, and the next one where that may decide the tokens of this one

_tokens: dict[Text, str] = {}


def clean(caption: str) -> str:
    """One line, single spaces."""
    return " ".join(caption.replace("\0", " ").split())


def tokenize(captions: Iterable[str]) -> list[str]:
    """Each caption's tokens, joined by spaces; remembers them.

    The captions are one text, as for pycocoevalcap: whether "a." at the end of one keeps its period depends on how the
    next one begins. A line separator inside a caption counts as a space.
    """
    lines = [caption.translate(_BREAKS) for caption in captions]
    texts = [(line, after if _needs_next(line) else "") for line, after in pairwise([*lines, ""])]
    known = {text: tokens for text in texts if (tokens := _tokens.get(text)) is not None}
    fresh = [text for text in dict.fromkeys(texts) if text not in known]
    computed = dict(zip(fresh, _run(fresh), strict=True))
    _tokens.update(computed)
    for text in list(_tokens)[: max(0, len(_tokens) - _REMEMBERED)]:
        _tokens.pop(text, None)  # another thread may have removed it already
    known |= computed
    return [known[text] for text in texts]


def tokenized(predictions: Predictions, references: References) -> list[Pair]:
    """Tokens of each pair's prediction and references; all references are one text, all predictions another."""
    reference_tokens = iter(tokenize(text for texts in references.values() for text in texts))
    prediction_tokens = tokenize(predictions[key] for key in references)
    return [(tokens, [next(reference_tokens) for _ in texts])
            for tokens, texts in zip(prediction_tokens, references.values(), strict=True)]


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


def start() -> None:
    """Starts the tokenizer's Java, so that it has loaded when `tokenize` is called."""
    _program.start()


def _needs_next(line: str) -> bool:
    """Whether the tokenizer may read the next line before it decides on this one."""
    return line.rstrip().endswith(".")


def _run(texts: list[Text]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines: list[str] = []
    places = []
    for (line, after), (following, _) in pairwise([*texts, ("", "")]):
        places.append(len(lines))
        lines += [line, after] if _needs_next(line) and after != following else [line]
    tokens = _program.ask(lines) if lines else []
    dropped = frozenset(PUNCTUATIONS)
    return [" ".join(word for word in tokens[place].rstrip().split(" ") if word not in dropped) for place in places]


def _command() -> Command:
    from pycocoevalcap.tokenizer import ptbtokenizer

    return Command(("-XX:TieredStopAtLevel=1", "-Xmx512m", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
                    "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"),
                   Path(ptbtokenizer.__file__).parent, push=_PUSH)


_program = Program("the PTB tokenizer", _command)
