"""The ten paraphrases of the default question, and the pairs that are captioned with them.

A generalist is asked one question and is not told which dataset a pair comes from. Every benchmark is therefore
captioned and scored with one question (`caption.benchmark_question`). Generated benchmarks are also captioned with the
question in each record, and a sample of their pairs with ten paraphrases that training never uses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The benchmarks whose captions a grammar can read, whatever the question was (a test compares with PROTOCOLS).
GENERATED = ("scenes", "scenes_far", "edits")

# A test asserts that no training question (phrases.INSTRUCTIONS) is among these.
PARAPHRASES = (
    "How do these two pictures differ from each other?",
    "Tell me what happened between the first photo and the second one.",
    "Compare the pictures and name the difference.",
    "I have two versions of a picture. What sets them apart?",
    "What is not the same any more in the later picture?",
    "Please say in one sentence what has changed.",
    "Look at both photos. What do you notice that is new or different?",
    "Explain how the first image became the second image.",
    "Spot the difference.",
    "Do you see a difference? Describe it.",
)


def sample(rows: Sequence[Mapping[str, Any]], count: int, *, seed: int = 0) -> set[str]:
    """Return the pair_ids of about `count` random rows; all rows if there are fewer.

    A pair and its swapped pair are drawn together, so the sample may have one more pair than `count`. The same rows and
    seed give the same pairs.
    """
    present = {row["pair_id"] for row in rows}
    pairs: dict[str, list[str]] = {}
    for row in rows:
        first = row["provenance"].get("swap_of")
        pairs.setdefault(first if first in present else row["pair_id"], []).append(row["pair_id"])
    couples, drawn = list(pairs.values()), set[str]()
    for place in np.random.default_rng(seed).permutation(len(couples)):
        if len(drawn) >= count:
            break
        drawn.update(couples[place])
    return drawn
