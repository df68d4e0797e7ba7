"""Which captions of a benchmark a training set holds, word for word or nearly, and which of them say something.

Template captions repeat naturally ("nothing has changed"), so all equal ones are counted, but only *rare* ones speak of
a leak. A caption is rare if it has MIN_WORDS words or more and at least half of its word trigrams are its own: in no
other pair of the benchmark, and in at most COMMON different texts of the training set (copies of one text count once).
Equal: without case, punctuation and spaces it is a whole text, line or sentence of the training set, or what stands
between : and ; in one. Near: a rare one, CONTAINED of whose trigrams stand in one text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

MIN_WORDS, OWN, CONTAINED, COMMON = 8, 0.5, 0.8, 10
KEPT = 2 * COMMON  # texts of a caption: one that is near to so many has no trigrams that are seldom, so it is not rare
RULE = {"min_words": MIN_WORDS, "own_trigrams": OWN, "contained_trigrams": CONTAINED, "common_texts": COMMON}
_WORD = re.compile(r"\w+")
_APOSTROPHES = re.compile("['\u2019`]")
_ENDS = re.compile(r"[.!?;:]+(?:\s+|$)|\n+")

Gram = tuple[str, str, str]


@dataclass(frozen=True)
class Text:
    """A text of a training set: what in it can be equal to a caption, and its trigrams."""

    raw: str
    whole: str
    units: frozenset[str]
    grams: frozenset[Gram]


@dataclass(frozen=True)
class Match:
    """A caption in a text of the training set: the first row that has the text, and how often that comes."""

    caption: str
    pairs: frozenset[str]
    rare: bool
    equal: bool
    contained: float
    train: str
    train_text: str
    times: int


@dataclass
class _Caption:
    text: str
    num_words: int
    grams: frozenset[Gram]
    pairs: set[str] = field(default_factory=set)
    own: frozenset[Gram] = frozenset()  # trigrams that no other pair has
    matches: dict[str, Match] = field(default_factory=dict)  # by text; KEPT at most, and none unless it may be rare
    equal: Match | None = None  # in the first text

    def may_be_rare(self, num_own: int) -> bool:
        return self.num_words >= MIN_WORDS and num_own >= OWN * len(self.grams)


def words(text: str) -> list[str]:
    """In one case, without punctuation; "isn't" is one word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_APOSTROPHES.sub("", plain).replace("_", " "))


def prepared(text: str) -> Text:
    """The text with its lines and sentences as units."""
    said = words(text)
    whole = " ".join(said)
    parts = (" ".join(words(part)) for part in _ENDS.split(text))
    return Text(text, whole, frozenset([whole, *parts]) - {""}, _grams(said))


class Captions:
    """The captions of one benchmark, before which the texts of a training set pass once. Memory is the benchmark's."""

    def __init__(self, captions: Iterable[tuple[str, str]]) -> None:
        """`captions`: (pair_id, caption); empty ones are none."""
        self._captions: dict[str, _Caption] = {}
        for pair_id, text in captions:
            said = words(text)
            if said:
                kept = self._captions.setdefault(" ".join(said), _Caption(text, len(said), _grams(said)))
                kept.pairs.add(pair_id)
        self._by_own: dict[Gram, list[_Caption]] = {}
        self._texts_with: dict[Gram, set[int]] = {}  # own trigram -> hashes of different texts, COMMON + 1 at most
        self._index()

    def look(self, text: Text, train: str) -> set[str]:
        """Notes what of the benchmark is in a text of row `train`; the pairs whose captions are, rare or not."""
        for gram in text.grams & self._texts_with.keys():
            if len(self._texts_with[gram]) <= COMMON:
                self._texts_with[gram].add(hash(text.whole))
        equal = [self._captions[unit] for unit in text.units & self._captions.keys()]
        found: set[str] = set()
        for caption in equal:
            found |= _noted(caption, text, train, equal=True, contained=1.0)
        near = {id(caption): caption for gram in text.grams & self._by_own.keys() for caption in self._by_own[gram]}
        for key in near.keys() - set(map(id, equal)):
            contained = len(near[key].grams & text.grams) / len(near[key].grams)
            if contained >= CONTAINED:
                found |= _noted(near[key], text, train, equal=False, contained=contained)
        return found

    def matches(self) -> Iterator[Match]:
        """Of each rare caption one for every text it is in; of each other one that is equal to some, the first."""
        for caption in self._captions.values():
            seldom = sum(len(self._texts_with.get(gram, ())) <= COMMON for gram in caption.own)
            if caption.may_be_rare(seldom):
                yield from (replace(match, rare=True) for match in caption.matches.values())
            elif caption.equal:
                yield caption.equal

    def pairs(self) -> dict[str, set[str]]:
        """equal_caption: pairs of which any caption was found; rare_caption, near_caption: whose rare ones were, as
        they are or, where none was, nearly.
        """
        found: dict[str, set[str]] = {"equal_caption": set(), "rare_caption": set(), "near_caption": set()}
        for match in self.matches():
            if match.equal:
                found["equal_caption"] |= match.pairs
            if match.rare:
                found["rare_caption" if match.equal else "near_caption"] |= match.pairs
        found["near_caption"] -= found["rare_caption"]
        return found

    def _index(self) -> None:
        owners: dict[Gram, set[str]] = {}
        for caption in self._captions.values():
            for gram in caption.grams:
                owners.setdefault(gram, set()).update(caption.pairs)
        for caption in self._captions.values():
            own = frozenset(gram for gram in caption.grams if len(owners[gram]) == 1)
            if caption.may_be_rare(len(own)):
                caption.own = own
                for gram in own:  # as OWN > 1 - CONTAINED, a text that it is near to has at least one of them
                    self._by_own.setdefault(gram, []).append(caption)
                    self._texts_with[gram] = set()


def _noted(caption: _Caption, text: Text, train: str, *, equal: bool, contained: float) -> set[str]:
    fresh = Match(caption.text, frozenset(caption.pairs), False, equal, contained, train, text.raw, 0)
    if equal:
        before = caption.equal or fresh
        caption.equal = replace(before, times=before.times + 1)
    if caption.own and (text.whole in caption.matches or len(caption.matches) < KEPT):
        before = caption.matches.get(text.whole, fresh)
        caption.matches[text.whole] = replace(before, times=before.times + 1)
    return caption.pairs


def _grams(said: list[str]) -> frozenset[Gram]:
    return frozenset(zip(said, said[1:], said[2:], strict=False))
