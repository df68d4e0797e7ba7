"""Tokenize predictions and references like pycocoevalcap: Stanford's PTB tokenizer, lower case, without punctuation."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from onediff.eval.metrics.java import Command, Program

_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))  # maps each line separator to a space
_PUSH = "x" * 25_000 + " x x"  # padding line, longer than the tokenizer's three output buffers of 8 KiB together
_REMEMBERED = 50_000  # largest number of captions whose tokens are cached

Predictions = dict[str, str]
References = dict[str, list[str]]
Pair = tuple[str, list[str]]  # the tokens of a prediction, and the tokens of each reference
Text = tuple[str, str]  # a caption and the next caption; the next is "" if it cannot change the tokens of the first

_tokens: dict[Text, str] = {}


def clean(caption: str) -> str:
    """Return the caption as one line in which words are separated by single spaces."""
    return " ".join(caption.replace("\0", " ").split())


def tokenize(captions: Iterable[str]) -> list[str]:
    """Return the tokens of each caption as one string with spaces between the tokens. Results are cached.

    As in pycocoevalcap, the tokenizer reads all captions as one text with one caption per line. Therefore, a caption
    can change the tokens of the previous caption: whether "a." at the end of a line keeps its period depends on the
    first word of the next line. A line separator inside a caption is treated as a space.
    """
    lines = [caption.translate(_BREAKS) for caption in captions]
    texts = [(line, after if _needs_next(line) else "") for line, after in pairwise([*lines, ""])]
    known = {text: tokens for text in texts if (tokens := _tokens.get(text)) is not None}
    fresh = [text for text in dict.fromkeys(texts) if text not in known]
    computed = dict(zip(fresh, _run(fresh), strict=True))
    _tokens.update(computed)
    for text in list(_tokens)[: max(0, len(_tokens) - _REMEMBERED)]:
        _tokens.pop(text, None)  # Another thread may already have removed this cached entry.
    known |= computed
    return [known[text] for text in texts]


def tokenized(predictions: Predictions, references: References) -> list[Pair]:
    """Return the tokens of the prediction and of the references of each pair, in the order of `references`.

    The tokenizer reads all references as one text, and all predictions as another text, as in pycocoevalcap.
    """
    reference_tokens = iter(tokenize(text for texts in references.values() for text in texts))
    prediction_tokens = tokenize(predictions[key] for key in references)
    return [(tokens, [next(reference_tokens) for _ in texts])
            for tokens, texts in zip(prediction_tokens, references.values(), strict=True)]


def check_keys(predictions: Predictions, references: References, *, where: str = "") -> None:
    """Raise ValueError unless predictions and references have the same pair_ids and each pair has a reference.

    The message starts with `where`, such as "predictions.jsonl: ".
    """
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        raise ValueError(f"{where}predictions and references must have the same pair_ids, but "
                         f"{_some(missing)} are missing from the predictions and {_some(extra)} are not among the "
                         "references; give two files of the same pairs")
    if not references:
        raise ValueError("there must be at least one pair with references to score predictions, got none")
    bare = [key for key, texts in references.items() if not texts]
    if bare:
        raise ValueError(f"each pair must have at least one reference, got {_some(bare)} without references; "
                         "add a reference or remove the pair from both files")


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} ({shown})" if keys else "0"


def start() -> None:
    """Start the Java process of the tokenizer in advance, so that `tokenize` does not have to wait for it."""
    _program.start()


def _needs_next(line: str) -> bool:
    """Return whether the next line can change the tokens of this line: only if this line ends with a period."""
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
