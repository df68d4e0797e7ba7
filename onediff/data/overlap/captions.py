"""Finds the captions of a benchmark that occur in the texts of a training set, and decides which of them show a leak.

A caption is equal if, without case and punctuation, it is a complete text of the training set, or a line or sentence of
one, or a part between colon and semicolon. Simple captions such as "nothing has changed" repeat by chance. Therefore
all equal captions are counted, but only rare captions show a leak. A caption is rare if it has at least MIN_WORDS
words, and at least the share OWN of its word trigrams occur in no other pair of the benchmark and in at most COMMON
different texts of the training set. A rare caption is near if a single text contains at least the share CONTAINED of
its trigrams.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

MIN_WORDS, OWN, CONTAINED, COMMON = 8, 0.5, 0.8, 10
# A caption that is near to more texts than this has only common trigrams, so it cannot be rare.
MAX_TEXTS = 2 * COMMON
RULE = {"min_words": MIN_WORDS, "own_trigrams": OWN, "contained_trigrams": CONTAINED, "common_texts": COMMON}
_WORD = re.compile(r"\w+")
_APOSTROPHES = re.compile("['\u2019`]")
_ENDS = re.compile(r"[.!?;:]+(?:\s+|$)|\n+")

Trigrams = frozenset[tuple[str, str, str]]


@dataclass(frozen=True)
class TrainingText:
    """A text of a training set, prepared for comparison.

    `raw` is the original text, `plain` the words without case and punctuation, `parts` the pieces of the text that can
    be equal to a caption, and `trigrams` all sequences of three words.
    """

    raw: str
    plain: str
    parts: frozenset[str]
    trigrams: Trigrams


@dataclass(frozen=True)
class CaptionMatch:
    """A caption of the benchmark that occurs in a text of the training set.

    `pairs` are the pairs with this caption, `contained` is the share of the caption's trigrams in the text, `train` the
    first training row with the text, and `times` the number of times that the text occurs.
    """

    caption: str
    pairs: frozenset[str]
    rare: bool
    equal: bool
    contained: float
    train: str
    train_text: str
    times: int


@dataclass(eq=False)
class _Caption:
    """A caption of the benchmark, with all matching training texts that have been added so far."""

    text: str
    num_words: int
    trigrams: Trigrams
    pairs: set[str] = field(default_factory=set)
    own: Trigrams = frozenset()  # trigrams that occur in no other pair; left empty if the caption cannot be rare
    # maps a training text to its match; empty if `own` is empty
    matches: dict[str, CaptionMatch] = field(default_factory=dict)
    equal: CaptionMatch | None = None  # the match with the first training text that is equal to the caption

    def may_be_rare(self, num_own: int) -> bool:
        """Return whether the caption is long enough to be rare and `num_own` rare trigrams are enough."""
        return self.num_words >= MIN_WORDS and num_own >= OWN * len(self.trigrams)

    def add_match(self, text: TrainingText, train: str, *, equal: bool, contained: float) -> None:
        """Record that this benchmark caption occurs in a text of the training row `train`."""
        new = CaptionMatch(self.text, frozenset(self.pairs), False, equal, contained, train, text.raw, 0)
        if equal:
            match = self.equal or new
            self.equal = replace(match, times=match.times + 1)
        if self.own and (text.plain in self.matches or len(self.matches) < MAX_TEXTS):
            match = self.matches.get(text.plain, new)
            self.matches[text.plain] = replace(match, times=match.times + 1)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case and without punctuation; "isn't" is one word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_APOSTROPHES.sub("", plain).replace("_", " "))


def prepared(text: str) -> TrainingText:
    """Prepare a text of a training set for comparison; the parts are the complete text, and every line and sentence."""
    text_words = words(text)
    plain = " ".join(text_words)
    parts = (" ".join(words(part)) for part in _ENDS.split(text))
    return TrainingText(text, plain, frozenset([plain, *parts]) - {""}, _trigrams(text_words))


def _trigrams(words: list[str]) -> Trigrams:
    return frozenset(zip(words, words[1:], words[2:], strict=False))


class CaptionIndex:
    """The captions of one benchmark, with which the texts of a training set are compared one after the other.

    The texts are not stored, so the memory depends only on the size of the benchmark.
    """

    def __init__(self, captions: Iterable[tuple[str, str]]) -> None:
        """Build the index from tuples (pair_id, caption); captions without a word are ignored."""
        self._captions: dict[str, _Caption] = {}
        pairs_with: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        for pair_id, text in captions:
            if caption_words := words(text):
                new = _Caption(text, len(caption_words), _trigrams(caption_words))
                caption = self._captions.setdefault(" ".join(caption_words), new)
                caption.pairs.add(pair_id)
                for trigram in caption.trigrams:
                    pairs_with[trigram].add(pair_id)
        self._by_own: dict[tuple[str, str, str], list[_Caption]] = defaultdict(list)
        # Maps a trigram to the hashes of at most COMMON + 1 different training texts that contain this trigram.
        self._texts_with: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        for caption in self._captions.values():
            own = frozenset(trigram for trigram in caption.trigrams if len(pairs_with[trigram]) == 1)
            if caption.may_be_rare(len(own)):
                caption.own = own
                # Since OWN > 1 - CONTAINED, every text that is near this caption contains one of the rare trigrams.
                for trigram in own:
                    self._by_own[trigram].append(caption)

    def add_text(self, text: TrainingText, train: str) -> set[str]:
        """Compare one training text with all captions, and return the pairs whose caption is equal or near.

        `train` is the name of the training row. The returned pairs include those whose caption is not rare.
        """
        candidates: set[_Caption] = set()
        for trigram in text.trigrams & self._by_own.keys():
            candidates.update(self._by_own[trigram])
            if len(self._texts_with[trigram]) <= COMMON:
                self._texts_with[trigram].add(hash(text.plain))
        contained = {self._captions[part]: 1.0 for part in text.parts & self._captions.keys()}
        equal = set(contained)
        shares = {caption: len(caption.trigrams & text.trigrams) / len(caption.trigrams)
                  for caption in candidates - equal}
        contained |= {caption: share for caption, share in shares.items() if share >= CONTAINED}
        for caption, share in contained.items():
            caption.add_match(text, train, equal=caption in equal, contained=share)
        return set().union(*(caption.pairs for caption in contained))

    def matches(self) -> Iterator[CaptionMatch]:
        """Yield all matches of each rare caption, and only the first equal match of every other caption.

        Call this method after all training texts were added, because the texts decide which captions are rare.
        """
        for caption in self._captions.values():
            num_seldom = sum(len(self._texts_with.get(trigram, ())) <= COMMON for trigram in caption.own)
            if caption.may_be_rare(num_seldom):
                yield from (replace(match, rare=True) for match in caption.matches.values())
            elif caption.equal:
                yield caption.equal

    def pairs(self) -> dict[str, set[str]]:
        """Return the pairs of the benchmark whose captions match training texts, as {measure: set of pair_ids}.

        The measure equal_caption contains the pairs with an equal caption, and rare_caption the pairs with an equal
        caption that is rare. near_caption contains the other pairs with a near caption that is rare.
        """
        equal = [match for match in self.matches() if match.equal]
        rare = _pairs(match for match in equal if match.rare)
        return {"equal_caption": _pairs(equal), "rare_caption": rare,
                "near_caption": _pairs(match for match in self.matches() if match.rare) - rare}


def _pairs(matches: Iterable[CaptionMatch]) -> set[str]:
    return {pair_id for match in matches for pair_id in match.pairs}
