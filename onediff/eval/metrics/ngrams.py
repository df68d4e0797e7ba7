"""BLEU, ROUGE-L and CIDEr of tokenized captions, equal to pycocoevalcap's.

Shapes:  n pairs, S sentences (a pair's prediction and references), L n-grams of one order in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onediff.eval.metrics.words import Pair, Predictions, References, check_keys, tokenized

ORDERS = 4
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's, against division by 0
BETA = 1.2  # ROUGE-L: how much more recall counts
SIGMA = 6.0  # CIDEr: the difference in length that costs a third and more

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]


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
    """Of all `pairs`, a pair's prediction before its references. `pair` (S,); `is_prediction` (S,); `length` (S,):
    words; `orders`: n-grams of 1 to 4 words.
    """

    pairs: Sequence[Pair]
    pair: Places
    is_prediction: NDArray[np.bool_]
    length: Places
    orders: list[Grams]


def read(pairs: Sequence[Pair]) -> Sentences:
    """Counts the n-grams of all sentences, once for BLEU and CIDEr. Each n-gram is a shorter one and one word more."""
    texts = [text.split() for prediction, references in pairs for text in (prediction, *references)]
    sizes = np.array([1 + len(references) for _, references in pairs])
    length = np.array([len(words) for words in texts], dtype=np.int64)
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for text in texts for word in text], dtype=np.int64)
    is_prediction = np.zeros(len(texts), dtype=bool)
    is_prediction[np.cumsum(sizes) - sizes] = True
    sentence = np.repeat(np.arange(len(length)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(words))  # words to the sentence's end
    gram, start, num = words, np.arange(len(words)), len(number)
    orders = []
    for order in range(1, ORDERS + 1):
        if order > 1:
            fits = left[start] >= order
            start = start[fits]
            known, gram = np.unique(gram[fits] * len(number) + words[start + order - 1], return_inverse=True)
            num = len(known)
        entry, times = np.unique(sentence[start] * max(1, num) + gram, return_counts=True)
        orders.append(Grams(entry // max(1, num), entry % max(1, num), times, num))
    return Sentences(pairs, np.repeat(np.arange(len(pairs)), sizes), is_prediction, length, orders)


# --- BLEU ------------------------------------------------------------------------------------------------------------


def bleu_counts(sentences: Sentences) -> Numbers:
    """Of each pair (n, 10): its length, the closest reference's, n-grams predicted and those that match, 1 to 4."""
    length, pair = sentences.length[sentences.is_prediction], sentences.pair[~sentences.is_prediction]
    reference_length = sentences.length[~sentences.is_prediction]
    order = np.lexsort((reference_length, abs(reference_length - length[pair]), pair))  # of two as close, the shorter
    closest = reference_length[order][np.flatnonzero(np.diff(pair, prepend=-1))]  # the first of each pair
    predicted = np.maximum(0, length[:, None] - np.arange(ORDERS))
    matching = [_matching(sentences, grams) for grams in sentences.orders]
    return np.column_stack([length, closest, predicted, *matching]).astype(float)


def _matching(sentences: Sentences, grams: Grams) -> Places:
    """How many of each prediction's n-grams stand in its references, each as often as in one of them at most (n,)."""
    entry = sentences.pair[grams.sentence] * max(1, grams.num) + grams.gram
    predicted = sentences.is_prediction[grams.sentence]
    known, place = np.unique(entry[~predicted], return_inverse=True)
    most = np.zeros(len(known) + 1, dtype=np.int64)  # one more for n-grams of no reference
    np.maximum.at(most, place, grams.times[~predicted])
    limit = most[_positions(known, entry[predicted])]
    return np.bincount(sentences.pair[grams.sentence[predicted]], np.minimum(grams.times[predicted], limit),
                       minlength=int(sentences.is_prediction.sum())).astype(np.int64)


def _positions(known: Places, values: Places) -> Places:
    """The position of each value in the sorted array `known`, or len(known) where it is not in it."""
    place = np.searchsorted(known, values)
    inside = place < len(known)
    inside[inside] = known[place[inside]] == values[inside]
    return np.where(inside, place, len(known))


def bleu(sums: Numbers, order: int) -> Numbers:
    """sums (R, 10) of the counts of some pairs -> BLEU of one order, 0 to 1 (R,)."""
    predicted, matching = sums[:, 2 : 2 + order], sums[:, 6 : 6 + order]
    precision = ((matching + TINY) / (predicted + SMALL)).prod(1) ** (1 / order)
    ratio = (sums[:, 0] + TINY) / (sums[:, 1] + SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


# --- ROUGE-L ---------------------------------------------------------------------------------------------------------


def rouge(pairs: Sequence[Pair]) -> Numbers:
    """ROUGE-L of each pair, 0 to 1 (n,): the best precision and the best recall, be they of one reference or two."""
    scores = []
    for prediction, references in pairs:
        places: dict[str, int] = {}
        for place, word in enumerate(prediction.split(" ")):
            places[word] = places.get(word, 0) | 1 << place
        num, texts = prediction.count(" ") + 1, [text.split(" ") for text in references]
        common = [_common(places, num, words) for words in texts]
        precision = max(common) / num
        recall = max(length / len(words) for length, words in zip(common, texts, strict=True))
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if max(common) else 0.0)
    return np.array(scores)


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


def corpus_cider(predictions: Predictions, references: References) -> float:
    """Corpus CIDEr-D, 0 to 10 (papers print it times 100).

    Raises ValueError if the keys differ or no reference has a word. Vedantam et al., CVPR 2015.
    """
    check_keys(predictions, references)
    return float(cider(read(tokenized(predictions, references))).mean())


def cider(sentences: Sentences) -> Numbers:
    """CIDEr-D of each pair, 0 to 10 (n,), with the document frequencies of these pairs' references.

    Raises ValueError if no reference has a word. Vedantam et al., CVPR 2015.
    """
    is_prediction, pair = sentences.is_prediction, sentences.pair
    num = int(is_prediction.sum())
    if not sentences.length[~is_prediction].any():
        raise ValueError(f"CIDEr weighs words by the references that have them, and none of {num} pairs has a "
                         "reference with a word: give other references or leave CIDEr out")
    bigrams = np.maximum(0, sentences.length - 1)
    apart = (bigrams - bigrams[is_prediction][pair]).astype(float)
    close = np.exp(-(apart**2) / (2 * SIGMA**2))
    alike = sum(_alike(sentences, grams, num) for grams in sentences.orders) / ORDERS
    total = np.bincount(pair[~is_prediction], (close * alike)[~is_prediction], minlength=num)
    return np.asarray(10 * total / np.bincount(pair[~is_prediction], minlength=num))


def _alike(sentences: Sentences, grams: Grams, num: int) -> Numbers:
    """Cosine of each sentence and its pair's prediction, whose weights count up to the sentence's own (S,)."""
    predicted, pair = sentences.is_prediction[grams.sentence], sentences.pair[grams.sentence]
    documents = np.unique(pair[~predicted] * max(1, grams.num) + grams.gram[~predicted]) % max(1, grams.num)
    rarity = np.log(num) - np.log(np.maximum(1.0, np.bincount(documents, minlength=grams.num)))
    weight = grams.times * rarity[grams.gram]
    norm = np.sqrt(np.bincount(grams.sentence, weight**2, minlength=len(sentences.pair)))
    entry = pair * max(1, grams.num) + grams.gram
    limit = np.append(weight[predicted], 0.0)[_positions(entry[predicted], entry)]  # the prediction's weights of these
    common = np.bincount(grams.sentence, np.minimum(weight, limit) * weight, minlength=len(sentences.pair))
    both = norm * norm[sentences.is_prediction][sentences.pair]
    return np.divide(common, both, out=np.zeros(len(both)), where=both != 0)
