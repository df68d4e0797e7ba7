from __future__ import annotations

from onediff.data.synthesis.phrases import INSTRUCTIONS
from onediff.eval.protocols import PROTOCOLS
from onediff.eval.questions import GENERATED, PARAPHRASES, sample
from onediff.inputs.prompt import COUPLED_INSTRUCTION, DEFAULT_INSTRUCTION


def test_training_never_asks_one_of_the_ten_paraphrases() -> None:
    trained = {question for questions in INSTRUCTIONS.values() for question in questions}
    assert len(set(PARAPHRASES)) == 10
    assert trained.isdisjoint(PARAPHRASES) and not {DEFAULT_INSTRUCTION, COUPLED_INSTRUCTION} & {*PARAPHRASES}


def test_the_generated_benchmarks_are_those_with_a_grammar() -> None:
    assert {*GENERATED} == {key for key, protocol in PROTOCOLS.items() if protocol.grammar}


def test_a_sample_is_random_and_contains_a_pair_together_with_its_swapped_pair() -> None:
    rows = [{"pair_id": f"p{number}{letter}", "provenance": {"swap_of": f"p{number}c"} if letter == "s" else {}}
            for number in range(50) for letter in "csd"]
    chosen = sample(rows, 31)
    assert 31 <= len(chosen) <= 32 and chosen == sample(rows, 31) != sample(rows, 31, seed=1)
    assert {key[:-1] for key in chosen if key[-1] == "c"} == {key[:-1] for key in chosen if key[-1] == "s"}
    assert sample(rows, 0) == set() and sample(rows, 999) == {row["pair_id"] for row in rows}
    assert sample(rows[1::3], 999) == {row["pair_id"] for row in rows[1::3]}  # The pair of `swap_of` may be missing.
