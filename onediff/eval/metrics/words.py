"""Captions to words, as pycocoevalcap makes them: Stanford's PTB tokenizer in lower case, without punctuation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from onediff.eval.metrics.java import Command, Program

_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))  # where the tokenizer begins a new line
_PUSH = "x" * 25_000 + " x x"  # longer than the three buffers of 8 KiB between its words and us
_REMEMBERED = 50_000  # captions; references come back at every validation

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
    texts = list(zip(lines, map(_context, lines, [*lines[1:], ""]), strict=True))
    known = {text: _tokens.get(text) for text in texts}
    fresh = [text for text, tokens in known.items() if tokens is None]
    found = {text: tokens for text, tokens in known.items() if tokens is not None}
    found.update(zip(fresh, _run(fresh), strict=True))
    _remember({text: found[text] for text in fresh})
    return [found[text] for text in texts]


def start() -> None:
    """Starts the tokenizer's Java, so that it is there when words are asked for."""
    _program.start()


def _context(line: str, after: str) -> str:
    return after if _open(line) else ""


def _open(line: str) -> bool:
    """Whether the tokenizer may look at the next line before it decides on this one."""
    return line.rstrip().endswith(".")


def _run(texts: list[Text]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines: list[str] = []
    places = []
    for (line, after), (following, _) in pairwise([*texts, ("", "")]):
        places.append(len(lines))
        lines += [line, after] if _open(line) and after != following else [line]
    said = _program.ask(lines) if lines else []
    dropped = frozenset(PUNCTUATIONS)
    return [" ".join(word for word in said[place].rstrip().split(" ") if word not in dropped) for place in places]


def _remember(tokens: dict[Text, str]) -> None:
    _tokens.update(tokens)
    for text in list(_tokens)[: max(0, len(_tokens) - _REMEMBERED)]:
        _tokens.pop(text, None)  # another thread may have been here


def _command() -> Command:
    from pycocoevalcap.tokenizer import ptbtokenizer

    return Command(("-XX:TieredStopAtLevel=1", "-Xmx512m", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
                    "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"),
                   Path(ptbtokenizer.__file__).parent, push=_PUSH)


_program = Program("the PTB tokenizer", _command)
