"""Which captions of a benchmark a training set holds, word for word or nearly, and which of them are informative.

Template captions repeat naturally ("nothing has changed"), so all equal ones are counted, but only *rare* ones indicate
a leak. A caption is rare if it has MIN_WORDS words or more and at least half of its word trigrams are its own: in no
other pair of the benchmark, and in at most COMMON different texts of the training set (copies of one text count once).
Equal: without case, punctuation and spaces it is a complete text, line or sentence of the training set, or the part
between : and ; in one. Near: a rare one, CONTAINED of whose trigrams are in one text.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

MIN_WORDS, OWN, CONTAINED, COMMON = 8, 0.5, 0.8, 10
MAX_TEXTS = 2 * COMMON  # per caption: one that is near to so many texts has no seldom trigrams, so it is not rare
RULE = {"min_words": MIN_WORDS, "own_trigrams": OWN, "contained_trigrams": CONTAINED, "common_texts": COMMON}
_WORD = re.compile(r"\w+")
_APOSTROPHES = re.compile("['\u2019`]")
_ENDS = re.compile(r"[.!?;:]+(?:\s+|$)|\n+")

Trigrams = frozenset[tuple[str, str, str]]


@dataclass(frozen=True)
class TrainingText:
    """A text of a training set: its parts that can be equal to a caption, and its trigrams."""

    raw: str
    plain: str
    parts: frozenset[str]
    trigrams: Trigrams


@dataclass(frozen=True)
class CaptionMatch:
    """A caption in a text of the training set: the first row that has the text, and how often the text occurs."""

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
    text: str
    num_words: int
    trigrams: Trigrams
    pairs: set[str] = field(default_factory=set)
    own: Trigrams = frozenset()  # trigrams that no other pair has
    matches: dict[str, CaptionMatch] = field(default_factory=dict)  # by text; at most MAX_TEXTS, and only if maybe rare
    equal: CaptionMatch | None = None  # in the first text

    def may_be_rare(self, num_own: int) -> bool:
        return self.num_words >= MIN_WORDS and num_own >= OWN * len(self.trigrams)

    def add_match(self, text: TrainingText, train: str, *, equal: bool, contained: float) -> None:
        new = CaptionMatch(self.text, frozenset(self.pairs), False, equal, contained, train, text.raw, 0)
        if equal:
            match = self.equal or new
            self.equal = replace(match, times=match.times + 1)
        if self.own and (text.plain in self.matches or len(self.matches) < MAX_TEXTS):
            match = self.matches.get(text.plain, new)
            self.matches[text.plain] = replace(match, times=match.times + 1)


def words(text: str) -> list[str]:
    """In one case, without punctuation; "isn't" is one word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_APOSTROPHES.sub("", plain).replace("_", " "))


def prepared(text: str) -> TrainingText:
    """The text with its lines and sentences as parts."""
    text_words = words(text)
    plain = " ".join(text_words)
    parts = (" ".join(words(part)) for part in _ENDS.split(text))
    return TrainingText(text, plain, frozenset([plain, *parts]) - {""}, _trigrams(text_words))


def _trigrams(words: list[str]) -> Trigrams:
    return frozenset(zip(words, words[1:], words[2:], strict=False))


class CaptionIndex:
    """The captions of one benchmark. The texts of a training set are added once; memory depends on the benchmark only.
    """

    def __init__(self, captions: Iterable[tuple[str, str]]) -> None:
        """`captions`: (pair_id, caption); empty ones are ignored."""
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
        # Hashes of the different texts with a trigram, COMMON + 1 at most.
        self._texts_with: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        for caption in self._captions.values():
            own = frozenset(trigram for trigram in caption.trigrams if len(pairs_with[trigram]) == 1)
            if caption.may_be_rare(len(own)):
                caption.own = own
                for trigram in own:  # as OWN > 1 - CONTAINED, a text that it is near to has at least one of them
                    self._by_own[trigram].append(caption)

    def add_text(self, text: TrainingText, train: str) -> set[str]:
        """Adds a text of row `train` of the training set. Returns the pairs whose captions are in it, rare or not."""
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
        """For a rare caption one match per text that holds it; for another caption the first equal text, if any."""
        for caption in self._captions.values():
            num_seldom = sum(len(self._texts_with.get(trigram, ())) <= COMMON for trigram in caption.own)
            if caption.may_be_rare(num_seldom):
                yield from (replace(match, rare=True) for match in caption.matches.values())
            elif caption.equal:
                yield caption.equal

    def pairs(self) -> dict[str, set[str]]:
        """equal_caption: pairs with a caption that is equal to a text; rare_caption: with a rare one that is equal;
        near_caption: with a rare one that is near, and none that is equal.
        """
        equal = [match for match in self.matches() if match.equal]
        rare = _pairs(match for match in equal if match.rare)
        return {"equal_caption": _pairs(equal), "rare_caption": rare,
                "near_caption": _pairs(match for match in self.matches() if match.rare) - rare}


def _pairs(matches: Iterable[CaptionMatch]) -> set[str]:
    return {pair_id for match in matches for pair_id in match.pairs}
