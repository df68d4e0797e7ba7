"""BLEU, ROUGE-L and CIDEr of tokenized captions, equal to the scores of pycocoevalcap.

Shapes:  n pairs, S sentences (the predictions and references of all pairs), L entries of `Grams` for one n-gram order,
         R rows of sums of counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onediff.eval.metrics.words import Pair, Predictions, References, check_keys, tokenized

ORDERS = 4
SMALL, TINY = 1e-9, 1e-15  # the constants with which pycocoevalcap avoids division by 0
BETA = 1.2  # weight of recall against precision in ROUGE-L
SIGMA = 6.0  # CIDEr-D: standard deviation of the Gaussian penalty for a difference in length, in words

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Grams:
    """The n-grams of one order in all sentences, as a sparse table sorted by sentence.

    Entry i says that n-gram number `gram[i]` occurs `times[i]` times in sentence `sentence[i]`, all of shape (L,).
    `num` is the number of distinct n-grams.
    """

    sentence: Places
    gram: Places
    times: Places
    num: int


@dataclass(frozen=True)
class Sentences:
    """The sentences of all `pairs` with their n-grams. The prediction of a pair comes before its references.

    `pair` (S,): number of the pair. `is_prediction` (S,): False for a reference. `length` (S,): number of words.
    `orders`: the n-grams of 1, 2, 3 and 4 words.
    """

    pairs: Sequence[Pair]
    pair: Places
    is_prediction: NDArray[np.bool_]
    length: Places
    orders: list[Grams]


def read(pairs: Sequence[Pair]) -> Sentences:
    """Count the n-grams of all sentences for BLEU and CIDEr.

    An n-gram of n words is numbered by the number of the n-gram of its first n-1 words and by its last word.
    """
    texts = [text.split() for prediction, references in pairs for text in (prediction, *references)]
    sizes = np.array([1 + len(references) for _, references in pairs])
    length = np.array([len(words) for words in texts], dtype=np.int64)
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for text in texts for word in text], dtype=np.int64)
    is_prediction = np.zeros(len(texts), dtype=bool)
    is_prediction[np.cumsum(sizes) - sizes] = True
    sentence = np.repeat(np.arange(len(length)), length)
    # for each word, the number of words from this word to the end of the sentence
    left = np.repeat(np.cumsum(length), length) - np.arange(len(words))
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


def bleu_counts(sentences: Sentences) -> Numbers:
    """Return the counts for BLEU of each pair, (n, 10).

    The columns are: number of words of the prediction, number of words of the reference with the closest length,
    number of n-grams in the prediction for n = 1 to 4, and number of matching n-grams for n = 1 to 4.
    """
    length, pair = sentences.length[sentences.is_prediction], sentences.pair[~sentences.is_prediction]
    reference_length = sentences.length[~sentences.is_prediction]
    # If two references have the same distance in length to the prediction, the shorter reference comes first.
    order = np.lexsort((reference_length, abs(reference_length - length[pair]), pair))
    closest = reference_length[order][np.flatnonzero(np.diff(pair, prepend=-1))]  # first reference of each pair
    predicted = np.maximum(0, length[:, None] - np.arange(ORDERS))
    matching = [_matching(sentences, grams) for grams in sentences.orders]
    return np.column_stack([length, closest, predicted, *matching]).astype(float)


def _matching(sentences: Sentences, grams: Grams) -> Places:
    """Return how many n-grams of each prediction occur in its references, (n,).

    As usual in BLEU, an n-gram is counted at most as often as it occurs in the single reference that has it most often.
    """
    entry = sentences.pair[grams.sentence] * max(1, grams.num) + grams.gram
    predicted = sentences.is_prediction[grams.sentence]
    known, place = np.unique(entry[~predicted], return_inverse=True)
    most = np.zeros(len(known) + 1, dtype=np.int64)  # The last element stays 0, for n-grams that no reference contains.
    np.maximum.at(most, place, grams.times[~predicted])
    limit = most[_positions(known, entry[predicted])]
    return np.bincount(sentences.pair[grams.sentence[predicted]], np.minimum(grams.times[predicted], limit),
                       minlength=int(sentences.is_prediction.sum())).astype(np.int64)


def _positions(known: Places, values: Places) -> Places:
    """Return the position of each value in the sorted array `known`, or len(known) for a value not contained in it."""
    place = np.searchsorted(known, values)
    inside = place < len(known)
    inside[inside] = known[place[inside]] == values[inside]
    return np.where(inside, place, len(known))


def bleu(sums: Numbers, order: int) -> Numbers:
    """Return BLEU of one order, 0 to 1 (R,), for sums of the counts of `bleu_counts` over pairs, (R, 10)."""
    predicted, matching = sums[:, 2 : 2 + order], sums[:, 6 : 6 + order]
    precision = ((matching + TINY) / (predicted + SMALL)).prod(1) ** (1 / order)
    ratio = (sums[:, 0] + TINY) / (sums[:, 1] + SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


def rouge(pairs: Sequence[Pair]) -> Numbers:
    """Return ROUGE-L of each pair, 0 to 1 (n,).

    As in pycocoevalcap, the best precision and the best recall are combined, even if they belong to different
    references. Lin, ACL workshop 2004.
    """
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
    """Return the length of the longest common subsequence of two sentences.

    The first sentence has `num` words, and `places` maps each of its words to the bit mask of the word's positions.
    The second sentence is `words`. Each row of the dynamic-programming table is one integer. Hyyrö, AWOCA 2004.
    """
    row = full = (1 << num) - 1
    for word in words:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return num - row.bit_count()


def corpus_cider(predictions: Predictions, references: References) -> float:
    """Return CIDEr-D of the corpus, 0 to 10 (papers print it times 100).

    Raises ValueError if the keys differ or if all references are empty. Vedantam et al., CVPR 2015.
    """
    check_keys(predictions, references)
    return float(cider(read(tokenized(predictions, references))).mean())


def cider(sentences: Sentences) -> Numbers:
    """Return CIDEr-D of each pair, 0 to 10 (n,). Document frequencies are counted on the references of all pairs given.

    Raises ValueError if all references are empty. Vedantam et al., CVPR 2015.
    """
    is_prediction, pair = sentences.is_prediction, sentences.pair
    num = int(is_prediction.sum())
    if not sentences.length[~is_prediction].any():
        raise ValueError(f"CIDEr needs at least one reference with a word, but all references of {num} pairs are "
                         "empty; give other references or score without CIDEr")
    bigrams = np.maximum(0, sentences.length - 1)
    apart = (bigrams - bigrams[is_prediction][pair]).astype(float)
    close = np.exp(-(apart**2) / (2 * SIGMA**2))
    alike = sum(_alike(sentences, grams, num) for grams in sentences.orders) / ORDERS
    total = np.bincount(pair[~is_prediction], (close * alike)[~is_prediction], minlength=num)
    return np.asarray(10 * total / np.bincount(pair[~is_prediction], minlength=num))


def _alike(sentences: Sentences, grams: Grams, num: int) -> Numbers:
    """Return the cosine similarity of each sentence to the prediction of its pair, by TF-IDF weights of n-grams, (S,).

    As CIDEr-D requires, the weight of an n-gram in the prediction is clipped to its weight in the sentence.
    """
    predicted, pair = sentences.is_prediction[grams.sentence], sentences.pair[grams.sentence]
    documents = np.unique(pair[~predicted] * max(1, grams.num) + grams.gram[~predicted]) % max(1, grams.num)
    rarity = np.log(num) - np.log(np.maximum(1.0, np.bincount(documents, minlength=grams.num)))
    weight = grams.times * rarity[grams.gram]
    norm = np.sqrt(np.bincount(grams.sentence, weight**2, minlength=len(sentences.pair)))
    entry = pair * max(1, grams.num) + grams.gram
    limit = np.append(weight[predicted], 0.0)[_positions(entry[predicted], entry)]  # weight in the pair's prediction
    common = np.bincount(grams.sentence, np.minimum(weight, limit) * weight, minlength=len(sentences.pair))
    both = norm * norm[sentences.is_prediction][sentences.pair]
    return np.divide(common, both, out=np.zeros(len(both)), where=both != 0)
