from __future__ import annotations

import numpy as np

from onediff.eval.analysis.grammar import parse, parse_edit
from onediff.inputs.prompt import DEFAULT_INSTRUCTION, FENCE
from onediff.train.pretrain import dialogue as chat


def test_every_chat_sentence_can_be_parsed_by_the_caption_grammar() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        _, caption = chat.sentence(rng)
        assert parse(caption).change_type or parse_edit(caption).change_type, caption


def test_half_of_the_chat_questions_are_the_default_question() -> None:
    rng = np.random.default_rng(0)
    questions = [chat.sentence(rng)[0] for _ in range(500)]
    assert 0.4 < sum(question.endswith(DEFAULT_INSTRUCTION) for question in questions) / 500 < 0.75


def test_the_words_before_a_question_are_the_attributes_that_the_caption_states() -> None:
    rng, num_checked = np.random.default_rng(0), 0
    for _ in range(300):
        question, caption = chat.sentence(rng)
        if "\n" not in question:
            continue
        given, claim = f" {question.splitlines()[0]} ", parse(caption)
        if claim.change_type is None:
            claim = parse_edit(caption)
        stated = [claim.change_type, claim.color, claim.shape, claim.size, claim.material,
                  (claim.new or claim.direction or "").removeprefix("to the ")]
        assert all(f" {word.replace('_', ' ')} " in given for word in stated if word), (question, caption)
        num_checked += 1
    assert num_checked > 150


def test_rows_without_images_have_no_image_placeholders() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt = chat.text_row(rng, ["a red cube", "a blue sphere"])
        assert prompt.num_images == 0
        assert FENCE not in prompt.question
