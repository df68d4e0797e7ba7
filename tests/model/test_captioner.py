from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from onediff.config import Config
from onediff.data.record import Record
from onediff.inputs.images import open_image
from onediff.model.assemble import build
from onediff.model.captioner import Captioner

INSTRUCTIONS = ["What changed between the two images?", "How was the image edited?", "Say it."]


@pytest.fixture(scope="module")
def captioner(micro: Config) -> Captioner:
    return Captioner(*build(micro.model, seed=5))


@pytest.fixture(scope="module")
def pairs(scene_pairs: list[Record]) -> list[tuple[Image.Image, Image.Image]]:
    return [(open_image(record.before), open_image(record.after)) for record in scene_pairs[:3]]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_confidence_is_the_geometric_mean_of_the_token_probabilities(captioner: Captioner, pairs: list,
                                                                     num_beams: int) -> None:
    """Compare the confidence with token probabilities from one forward pass over prompt and answer, without a cache."""
    for pair, instruction in zip(pairs, INSTRUCTIONS, strict=True):
        options = {"max_new_tokens": 12, "num_beams": num_beams}
        [(_, confidence)] = captioner.caption_with_confidence([pair], instructions=[instruction], **options)
        tokenizer = captioner.processor.tokenizer
        batch = captioner.processor([pair], [instruction])
        answer = captioner.model.generate(**batch, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                          eos_token_id=tokenizer.eos_token_id, **options)
        with torch.no_grad():
            prompt, _ = captioner.model.embed(batch["input_ids"], batch["image_counts"], images=batch["images"])
            embeds = torch.cat([prompt, captioner.model.language.get_input_embeddings()(answer)], 1)
            logits = captioner.model.language(inputs_embeds=embeds).logits[0, prompt.shape[1] - 1 : -1]
        logs = logits.log_softmax(-1)[range(answer.shape[1]), answer[0]]
        assert confidence == pytest.approx(math.exp(float(logs.mean())), rel=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_with_confidence_equal_captions_without(captioner: Captioner, pairs: list, num_beams: int) -> None:
    options = {"instructions": INSTRUCTIONS, "max_new_tokens": 12, "num_beams": num_beams}
    captions = captioner.caption_with_confidence(pairs, **options)
    assert [text for text, _ in captions] == captioner.caption(pairs, **options)
    assert all(0 < confidence <= 1 for _, confidence in captions)


def test_a_saved_and_loaded_model_writes_equal_captions(captioner: Captioner, pairs: list, tmp_path: Path) -> None:
    assert captioner.model.fusion is not None
    for part in (captioner.model, captioner.processor):
        part.save_pretrained(tmp_path)
    loaded = Captioner.load(tmp_path, device="cpu")
    (texts, values), (loaded_texts, loaded_values) = (
        zip(*each.caption_with_confidence(pairs, instructions=INSTRUCTIONS, max_new_tokens=12), strict=True)
        for each in (captioner, loaded))
    assert loaded_texts == texts and any(texts)
    assert loaded_values == pytest.approx(values, rel=1e-5)


def test_padding_after_a_short_caption_does_not_change_the_confidence(captioner: Captioner, pairs: list) -> None:
    together = captioner.caption_with_confidence(pairs, instructions=INSTRUCTIONS, max_new_tokens=20)
    single = [captioner.caption_with_confidence([pair], instructions=[instruction], max_new_tokens=20)[0]
             for pair, instruction in zip(pairs, INSTRUCTIONS, strict=True)]
    assert [text for text, _ in together] == [text for text, _ in single]
    assert [value for _, value in together] == pytest.approx([value for _, value in single], rel=1e-4)
