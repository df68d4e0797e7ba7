"""BLEU, ROUGE-L and CIDEr of tokenized captions, equal to pycocoevalcap's.

Shapes:  n pairs, S sentences (a pair's prediction and references), L n-grams of one order in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDERS = 4
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's, against division by 0
BETA = 1.2  # ROUGE-L: how much more recall counts
SIGMA = 6.0  # CIDEr: the difference in length that costs a third and more

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]
Pair = tuple[str, list[str]]  # tokens of a prediction and of its references


@dataclass(frozen=True)
class Grams:
    """How often (`times`) which n-gram of one order (`gram`, below `num`) stands in which sentence: one entry each, in
    the order of the sentences.
    """

    sentence: Places
    gram: Places
    times: Places
    num: int


@dataclass(frozen=True)
class Sentences:
    """Of all pairs, a pair's prediction before its references. `pair` (S,), `said` (S,): whether it is a prediction,
    `length` (S,): words; `orders`: n-grams of 1 to 4 words.
    """

    pair: Places
    said: NDArray[np.bool_]
    length: Places
    orders: list[Grams]


def read(pairs: Sequence[Pair]) -> Sentences:
    """Counts the n-grams of all sentences, once for BLEU and CIDEr."""
    texts = [text.split() for said, references in pairs for text in (said, *references)]
    sizes = np.array([1 + len(references) for _, references in pairs])
    length = np.array([len(words) for words in texts], dtype=np.int64)
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for text in texts for word in text], dtype=np.int64)
    said = np.zeros(len(texts), dtype=bool)
    said[np.cumsum(sizes) - sizes] = True
    return Sentences(np.repeat(np.arange(len(pairs)), sizes), said, length, _orders(words, length, len(number)))


def _orders(words: Places, length: Places, vocabulary: int) -> list[Grams]:
    """An n-gram is the one before it and a word more."""
    sentence = np.repeat(np.arange(len(length)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(words))  # words to the sentence's end
    gram, start, num = words, np.arange(len(words)), vocabulary
    orders = []
    for order in range(1, ORDERS + 1):
        if order > 1:
            kept = left[start] >= order
            start = start[kept]
            known, gram = np.unique(gram[kept] * vocabulary + words[start + order - 1], return_inverse=True)
            num = len(known)
        entry, times = np.unique(sentence[start] * max(1, num) + gram, return_counts=True)
        orders.append(Grams(entry // max(1, num), entry % max(1, num), times, num))
    return orders


# --- BLEU ------------------------------------------------------------------------------------------------------------


def bleu_counts(sentences: Sentences) -> Numbers:
    """Of each pair (n, 10): its length, the closest reference's, n-grams said and those that are right, 1 to 4."""
    length = sentences.length[sentences.said]
    said = np.maximum(0, length[:, None] - np.arange(ORDERS))
    right = [_right(sentences, grams) for grams in sentences.orders]
    return np.column_stack([length, _closest(sentences), said, *right]).astype(float)


def _closest(sentences: Sentences) -> Places:
    """The length of the reference whose length is closest, of two the shorter."""
    pair, length = sentences.pair[~sentences.said], sentences.length[~sentences.said]
    order = np.lexsort((length, abs(length - sentences.length[sentences.said][pair]), pair))
    return np.asarray(length[order][_firsts(pair)])


def _firsts(sorted_places: Places) -> Places:
    return np.flatnonzero(np.diff(sorted_places, prepend=-1))


def _right(sentences: Sentences, grams: Grams) -> Places:
    """How many of each prediction's n-grams stand in its references, each as often as in one of them at most (n,)."""
    entry = sentences.pair[grams.sentence] * max(1, grams.num) + grams.gram
    said = sentences.said[grams.sentence]
    there, place = np.unique(entry[~said], return_inverse=True)
    most = np.zeros(len(there) + 1, dtype=np.int64)  # one more for what stands in no reference
    np.maximum.at(most, place, grams.times[~said])
    found = _find(there, entry[said])
    return np.bincount(sentences.pair[grams.sentence[said]], np.minimum(grams.times[said], most[found]),
                       minlength=int(sentences.said.sum())).astype(np.int64)


def _find(there: Places, wanted: Places) -> Places:
    """Where each wanted value is in the sorted ones, or else their number."""
    place = np.searchsorted(there, wanted)
    inside = place < len(there)
    inside[inside] = there[place[inside]] == wanted[inside]
    return np.where(inside, place, len(there))


def bleu(sums: Numbers, order: int) -> Numbers:
    """sums (R, 10) of the counts of some pairs -> BLEU of one order, 0 to 1 (R,)."""
    said, right = sums[:, 2 : 2 + order], sums[:, 6 : 6 + order]
    precision = ((right + TINY) / (said + SMALL)).prod(1) ** (1 / order)
    ratio = (sums[:, 0] + TINY) / (sums[:, 1] + SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


# --- ROUGE-L ---------------------------------------------------------------------------------------------------------


def rouge(pairs: Sequence[Pair]) -> Numbers:
    """ROUGE-L of each pair, 0 to 1 (n,): the best precision and the best recall, be they of one reference or two."""
    return np.array([_rouge(said.split(" "), [text.split(" ") for text in references]) for said, references in pairs])


def _rouge(said: list[str], references: list[list[str]]) -> float:
    places: dict[str, int] = {}
    for place, word in enumerate(said):
        places[word] = places.get(word, 0) | 1 << place
    common = [_common(places, len(said), words) for words in references]
    precision = max(common) / len(said)
    recall = max(num / len(words) for num, words in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(places: dict[str, int], num: int, words: list[str]) -> int:
    """Length of the longest common subsequence of the `num` words at `places` and of others, a row of the table in one
    integer. Hyyrö, AWOCA 2004.
    """
    row = full = (1 << num) - 1
    for word in words:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return num - row.bit_count()


# --- CIDEr -----------------------------------------------------------------------------------------------------------


def cider(sentences: Sentences) -> Numbers:
    """CIDEr-D of each pair, 0 to 10 (n,), with the document frequencies of these pairs' references.

    Raises ValueError if no reference has a word. Vedantam et al., CVPR 2015.
    """
    said, pair = sentences.said, sentences.pair
    num = int(said.sum())
    if not sentences.length[~said].any():
        raise ValueError(f"CIDEr weighs words by the references that have them, and none of {num} pairs has a "
                         "reference with a word: give other references or leave CIDEr out")
    bigrams = np.maximum(0, sentences.length - 1)
    apart = (bigrams - bigrams[said][pair]).astype(float)
    close = np.exp(-(apart**2) / (2 * SIGMA**2))
    alike = sum(_alike(sentences, grams, num) for grams in sentences.orders) / ORDERS
    total = np.bincount(pair[~said], (close * alike)[~said], minlength=num)
    return np.asarray(10 * total / np.bincount(pair[~said], minlength=num))


def _alike(sentences: Sentences, grams: Grams, num: int) -> Numbers:
    """Cosine of each sentence and its pair's prediction, whose weights count up to the sentence's own (S,)."""
    is_said, pair = sentences.said[grams.sentence], sentences.pair[grams.sentence]
    documents = np.unique(pair[~is_said] * max(1, grams.num) + grams.gram[~is_said]) % max(1, grams.num)
    rarity = np.log(num) - np.log(np.maximum(1.0, np.bincount(documents, minlength=grams.num)))
    weight = grams.times * rarity[grams.gram]
    norm = np.sqrt(np.bincount(grams.sentence, weight**2, minlength=len(sentences.pair)))
    entry = pair * max(1, grams.num) + grams.gram
    theirs = np.append(weight[is_said], 0.0)[_find(entry[is_said], entry)]  # the prediction's weights of these n-grams
    common = np.bincount(grams.sentence, np.minimum(weight, theirs) * weight, minlength=len(sentences.pair))
    both = norm * norm[sentences.said][sentences.pair]
    return np.divide(common, both, out=np.zeros(len(both)), where=both != 0)
