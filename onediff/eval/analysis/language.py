"""What captions are like, whatever is true of them: length, variety, and how many were learned by heart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from onediff.eval.metrics.compute import clean


def language(captions: Iterable[str], train: Sequence[str]) -> dict[str, float]:
    """`words`: mean length; `vocabulary`: different words; `different`: share of captions that no other pair has had
    before; `distinct_1`, `distinct_2`: different words and word pairs to all of them (Li et al., NAACL 2016); `copied`:
    share of captions that stand word for word among the training captions, left out without these; `empty`: share.
    """
    texts = [clean(text).lower() for text in captions]
    said = [text.split() for text in texts]
    known = {clean(text).lower() for text in train}
    words = [word for line in said for word in line]
    couples = [couple for line in said for couple in pairwise(line)]
    return {"words": len(words) / len(texts), "vocabulary": len(set(words)), "different": len(set(texts)) / len(texts),
            "distinct_1": len(set(words)) / max(1, len(words)), "distinct_2": len(set(couples)) / max(1, len(couples)),
            "empty": texts.count("") / len(texts), **({"copied": _share(texts, known)} if known else {})}


def _share(texts: Sequence[str], known: set[str]) -> float:
    return sum(text in known for text in texts) / len(texts)
