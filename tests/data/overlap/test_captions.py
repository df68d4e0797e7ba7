from __future__ import annotations

import random

import pytest

from onediff.data.overlap.captions import COMMON, CONTAINED, MIN_WORDS, OWN, CaptionIndex, CaptionMatch, prepared, words

RARE = "the man with the striped umbrella has walked away from the fountain"
WORDS = ("man", "dog", "car", "left", "gone", "red", "tree", "moved", "the", "near")


def passed(captions: list[tuple[str, str]], texts: list[str]) -> tuple[CaptionIndex, list[CaptionMatch]]:
    index = CaptionIndex(captions)
    for number, text in enumerate(texts):
        index.add_text(prepared(text), f"row-{number}")
    return index, list(index.matches())


def grams(text: str) -> set[tuple[str, ...]]:
    listed = words(text)
    return {tuple(listed[k : k + 3]) for k in range(len(listed) - 2)}


def slow_pairs(captions: list[tuple[str, str]], texts: list[str]) -> dict[str, set[str]]:
    """By comparing every caption with every text, as the rule is written."""
    pairs: dict[str, set[str]] = {"equal_caption": set(), "rare_caption": set(), "near_caption": set()}
    different = {" ".join(words(text)) for text in texts}
    for pair_id, caption in captions:
        plain = " ".join(words(caption))
        own = [gram for gram in grams(caption)
               if not any(gram in grams(other) for name, other in captions if name not in holders(captions, plain))
               and len(holders(captions, plain)) == 1 and sum(gram in grams(text) for text in different) <= COMMON]
        rare = len(plain.split()) >= MIN_WORDS and len(own) >= OWN * len(grams(caption))
        equal = plain in different
        near = any(len(grams(caption) & grams(text)) >= CONTAINED * len(grams(caption)) for text in different)
        if equal:
            pairs["equal_caption"].add(pair_id)
        if rare and (equal or near):
            pairs["rare_caption" if equal else "near_caption"].add(pair_id)
    pairs["near_caption"] -= pairs["rare_caption"]
    return pairs


def holders(captions: list[tuple[str, str]], plain: str) -> set[str]:
    return {name for name, other in captions if " ".join(words(other)) == plain}


@pytest.mark.parametrize("seed", range(3))
def test_the_index_matches_the_pairs_that_comparing_all_captions_and_texts_matches(seed: int) -> None:
    draw = random.Random(seed)

    def sentence(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    captions = [(f"p{k}", sentence(1, 13)) for k in range(60)]
    texts = [sentence(1, 20) for _ in range(120)] + [text for _, text in draw.sample(captions, 9)]
    texts += [f"{sentence(2, 5)} {text} {sentence(2, 5)}" for _, text in draw.sample(captions, 9)]
    texts += [" ".join(text.split()[:-1]) for _, text in draw.sample(captions, 9)]
    index, _ = passed(captions, texts)
    assert index.pairs() == slow_pairs(captions, texts)
    assert all(index.pairs().values())


@pytest.mark.parametrize("text", [RARE.upper() + "!", f"No. {RARE.capitalize()}. Nothing else.", f"1)\n{RARE}\n2)"])
def test_case_punctuation_and_surrounding_sentences_do_not_hide_a_caption(text: str) -> None:
    index, (match,) = passed([("a", RARE)], [text])
    assert match.equal and match.rare and match.train_text == text
    assert index.pairs()["rare_caption"] == {"a"}


def test_a_caption_inside_a_longer_sentence_is_near() -> None:
    _, (match,) = passed([("a", RARE)], [f"I can see that {RARE} while it rains"])
    assert (match.equal, match.rare, match.contained) == (False, True, 1.0)


def test_short_captions_are_counted_but_not_rare() -> None:
    index, (match,) = passed([("a", "nothing has changed"), ("b", "Nothing has changed.")], ["nothing has changed"] * 3)
    assert (match.pairs, match.rare, match.times) == ({"a", "b"}, False, 3)
    assert index.pairs() == {"equal_caption": {"a", "b"}, "rare_caption": set(), "near_caption": set()}


def test_a_template_caption_is_not_rare_but_a_caption_in_many_copies_of_one_text_is() -> None:
    template = "the big shiny {} that stood behind the small ball was taken away"
    things = [f"thing{k}" for k in range(4 * COMMON)]
    index, (match,) = passed([("a", template.format("cube"))], [template.format(thing) for thing in ("cube", *things)])
    assert not match.rare and index.pairs()["equal_caption"] == {"a"}
    index, (match,) = passed([("a", RARE)], [RARE] * (4 * COMMON))
    assert match.rare and match.times == 4 * COMMON


def test_a_caption_of_two_pairs_of_the_benchmark_is_not_rare() -> None:
    _, (match,) = passed([("a", RARE), ("b", RARE)], [RARE])
    assert not match.rare


def test_empty_captions_and_texts_match_nothing() -> None:
    assert passed([("a", ""), ("b", " ?! ")], ["", "..."])[1] == []
