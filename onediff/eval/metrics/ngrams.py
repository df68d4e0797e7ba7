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
SMALL, TINY = 1e-9, 1e-15  # constants that pycocoevalcap adds in BLEU to avoid division by 0
BETA = 1.2  # weight of recall relative to precision in ROUGE-L
SIGMA = 6.0  # standard deviation, in words, of CIDEr-D's Gaussian penalty for a difference in length

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Grams:
    """The n-grams of one order (number of words n) in all sentences, as a sparse table sorted by sentence.

    The table has L entries. Entry i says that the n-gram with number `gram[i]` occurs `times[i]` times in the sentence
    with number `sentence[i]`. `num` is the number of distinct n-grams.
    """

    sentence: Places
    gram: Places
    times: Places
    num: int


@dataclass(frozen=True)
class Sentences:
    """The sentences of all `pairs` with their n-grams. The prediction of a pair comes before its references.

    Each array has one element for each of the S sentences. `pair`: position of the sentence's pair in `pairs`.
    `is_prediction`: True for a prediction, False for a reference. `length`: number of words. The list `orders` has the
    tables of the n-grams of 1, 2, 3 and 4 words.
    """

    pairs: Sequence[Pair]
    pair: Places
    is_prediction: NDArray[np.bool_]
    length: Places
    orders: list[Grams]


def read(pairs: Sequence[Pair]) -> Sentences:
    """Count the n-grams of 1 to 4 words in all predictions and references, for BLEU and CIDEr.

    The number of an n-gram is computed from the number of its first n-1 words and the number of its last word.
    """
    texts = [text.split() for prediction, references in pairs for text in (prediction, *references)]
    sizes = np.array([1 + len(references) for _, references in pairs])
    length = np.array([len(words) for words in texts], dtype=np.int64)
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for text in texts for word in text], dtype=np.int64)
    is_prediction = np.zeros(len(texts), dtype=bool)
    is_prediction[np.cumsum(sizes) - sizes] = True
    sentence = np.repeat(np.arange(len(length)), length)
    # `left` is the number of words from each word to the end of its sentence.
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
    """Return ten counts of each pair for BLEU, (n pairs, 10).

    The columns are: number of words in the prediction; number of words in the reference with the closest length; number
    of n-grams in the prediction, for n = 1 to 4; number of n-grams in the prediction that match a reference, for n = 1
    to 4.
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
    """Return for each prediction how many of its n-grams occur in the references of the pair, (n pairs,).

    As usual in BLEU, an n-gram is counted at most as often as it occurs in the single reference that has it most often.
    """
    entry = sentences.pair[grams.sentence] * max(1, grams.num) + grams.gram
    predicted = sentences.is_prediction[grams.sentence]
    known, place = np.unique(entry[~predicted], return_inverse=True)
    most = np.zeros(len(known) + 1, dtype=np.int64)  # The last element stays 0 for n-grams that no reference contains.
    np.maximum.at(most, place, grams.times[~predicted])
    limit = most[_positions(known, entry[predicted])]
    return np.bincount(sentences.pair[grams.sentence[predicted]], np.minimum(grams.times[predicted], limit),
                       minlength=int(sentences.is_prediction.sum())).astype(np.int64)


def _positions(known: Places, values: Places) -> Places:
    """Return the position of each value in the sorted array `known`, or len(known) if `known` lacks the value."""
    place = np.searchsorted(known, values)
    inside = place < len(known)
    inside[inside] = known[place[inside]] == values[inside]
    return np.where(inside, place, len(known))


def bleu(sums: Numbers, order: int) -> Numbers:
    """Return BLEU with n-grams of up to `order` words, 0 to 1, for each of R rows of counts, (R,).

    A row has the ten counts that `bleu_counts` returns for a pair, or their sums over several pairs.
    """
    predicted, matching = sums[:, 2 : 2 + order], sums[:, 6 : 6 + order]
    precision = ((matching + TINY) / (predicted + SMALL)).prod(1) ** (1 / order)
    ratio = (sums[:, 0] + TINY) / (sums[:, 1] + SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


def rouge(pairs: Sequence[Pair]) -> Numbers:
    """Return ROUGE-L of each pair, 0 to 1, (n pairs,). Lin, ACL workshop 2004.

    As in pycocoevalcap, the best precision and the best recall over all references of a pair are combined, even if they
    belong to different references.
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
    """Return the length in words of the longest common subsequence of two sentences.

    `num` is the number of words of the first sentence, and `places` maps each word of this sentence to the bit mask of
    its positions. `words` is the second sentence. Each row of the dynamic-programming table is stored as the bits of
    one integer. Hyyrö, AWOCA 2004.
    """
    row = full = (1 << num) - 1
    for word in words:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return num - row.bit_count()


def corpus_cider(predictions: Predictions, references: References) -> float:
    """Return CIDEr-D of all pairs together, 0 to 10 (papers print it times 100). Vedantam et al., CVPR 2015.

    Raises ValueError if predictions and references have different pair_ids, or if all references are empty.
    """
    check_keys(predictions, references)
    return float(cider(read(tokenized(predictions, references))).mean())


def cider(sentences: Sentences) -> Numbers:
    """Return CIDEr-D of each pair, 0 to 10, (n pairs,). Vedantam et al., CVPR 2015.

    The document frequencies are counted on the references of all these pairs. Raises ValueError if all references are
    empty.
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
    """Return the similarity, 0 to 1, of each of the S sentences to the prediction of the sentence's pair, (S,).

    It is the cosine similarity of the TF-IDF weights of n-grams. As CIDEr-D requires, the weight of an n-gram in the
    prediction is reduced to its weight in the sentence if that weight is smaller.
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
