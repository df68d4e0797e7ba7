"""Cost: the bound is never below what a tokenizer makes, and the cap is never passed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from onediff.config import Runtime, Writer
from onediff.data.writer.price import Budget, Tokens, bound, guess
from onediff.data.writer.request import Request, differences_from_captions, differences_from_images

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("caption", ["a red car on a street", "\u732b\u304c\u3044\u308b" * 20, "\U0001f408" * 30,
                                     "x" * 997])
def test_the_bound_holds_for_a_real_byte_level_tokenizer(writer: Writer, caption: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "presets/backbones/tiny/language/tokenizer.json"))
    asked = differences_from_captions("a", writer, before=caption, after=caption, edit=caption)
    assert len(tokenizer.encode(asked.system + asked.user).ids) <= bound(asked).input
    assert guess(asked).input < bound(asked).input
    assert bound(asked).output == writer.max_tokens


def test_images_cost_by_the_model(writer: Writer) -> None:
    def tokens(model: str, images: int) -> int:
        named = writer.model_copy(update={"model": model})
        asked = differences_from_images("a", named, before=b"x", after=b"y")
        return guess(Request(asked.name, asked.form, named, asked.system, asked.user, asked.images[:images])).input

    assert tokens("gpt-4o", 2) - tokens("gpt-4o", 0) == 2 * 255
    assert tokens("gpt-4o-mini-2024-07-18", 2) - tokens("gpt-4o-mini", 0) == 2 * 8500


def test_dollars_are_per_million(runtime: Runtime) -> None:
    assert Tokens(300_000, 20_000).usd(runtime) == pytest.approx(0.3 * 10 + 0.02 * 100)


@pytest.mark.parametrize("name", ["input", "output"])
def test_an_unknown_price_says_what_to_set(runtime: Runtime, name: str) -> None:
    unknown = runtime.model_copy(update={f"writer_usd_per_million_{name}": None})
    with pytest.raises(ValueError, match=rf"runtime.yaml: writer_usd_per_million_{name} is not set.*0 for an endpoint"):
        Tokens(1, 1).usd(unknown)


def test_the_budget_never_passes_its_cap() -> None:
    generator, budget, flying = random.Random(3), Budget(cap=1.0, spent=0.25), []
    for _ in range(500):
        most = generator.uniform(0.001, 0.1)
        if budget.reserve(most):
            flying.append(most)
        if flying and generator.random() < 0.6:
            reserved = flying.pop(0)
            budget.settle(reserved=reserved, spent=reserved * generator.random())
        assert budget.spent + sum(flying) <= 1.0 + 1e-9
    assert budget.spent > 0.9


def test_a_free_endpoint_needs_no_budget(ask_about: Callable[[int], Request]) -> None:
    free = Runtime(writer_usd_per_million_input=0.0, writer_usd_per_million_output=0.0)
    budget = Budget(cap=free.writer_max_usd, spent=0.0)
    assert all(budget.reserve(bound(ask_about(number)).usd(free)) for number in range(100))
