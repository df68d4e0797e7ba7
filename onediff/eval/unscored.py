"""Names the sources that have no score, so that nobody looks for one."""

from collections.abc import Mapping
from typing import Any

from onediff.data.record import GENERAL


def unscored(card: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each source of image pairs that has no pair in the split `test`.

    `card` is data/diffcap/card.json. General instruction data is left out, because it is never scored.
    """
    splits: Mapping[str, Mapping[str, Mapping[str, int]]] = card["num_pairs"]
    kinds: dict[str, set[str]] = {}
    for sources in splits.values():
        for source, counts in sources.items():
            kinds.setdefault(source, set()).update(counts)
    sentences = []
    for source in sorted(kinds):
        if source not in splits.get("test", {}) and kinds[source] != {GENERAL}:
            numbers = ", ".join(f"{split} {sum(sources[source].values()):,}" for split, sources in splits.items()
                                if source in sources)
            sentences.append(f"{source} has no score, because the split test contains none of its pairs ({numbers}); "
                             "in a table of your own, set the column split to test for some pairs")
    return sentences
