from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_checkpoints import LLAVA_TEMPLATE, MAKERS, idefics3, llava, qwen2_vl
from checkpoints import DECODER, save_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from onediff.baselines.chat import PROMPT, ChatCaptioner

QUESTIONS = ["What changed?", "What is different in the second image, if anything?", "How was it edited?"]


def image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PAIRS = [(image(0, 56, 56), image(1, 56, 56)), (image(2, 61, 43), image(3, 37, 59)),
         (image(4, 90, 31), image(5, 60, 60))]


@pytest.fixture(scope="module")
def captioner_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatCaptioner]:
    made: dict[str, ChatCaptioner] = {}

    def load(kind: str) -> ChatCaptioner:
        if kind not in made:
            made[kind] = ChatCaptioner.load(MAKERS[kind](tmp_path_factory.mktemp(kind)))
        return made[kind]

    return load


@pytest.mark.parametrize("kind", list(MAKERS))
def test_captions_of_a_batch_equal_those_of_single_pairs(kind: str,
                                                         captioner_of: Callable[[str], ChatCaptioner]) -> None:
    captioner = captioner_of(kind)
    captioner.model.double()  # In float32, padding changes logits slightly, which can exchange two almost equal tokens.
    together = captioner.caption(PAIRS, QUESTIONS, max_new_tokens=5)
    alone = [captioner.caption([pair], [asked], max_new_tokens=5)[0]
             for pair, asked in zip(PAIRS, QUESTIONS, strict=True)]
    captioner.model.float()
    assert together == alone
    assert len(set(together)) > 1 and all(together)  # A random model may give equal answers to two of the pairs.


@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_model_gets_both_images_in_the_given_order(kind: str, captioner_of: Callable[[str], ChatCaptioner]) -> None:
    captioner = captioner_of(kind)
    first, second = PAIRS[0]
    halves = [captioner.inputs([pair], QUESTIONS[:1])["pixel_values"].flatten(0, 1 if kind == "idefics3" else 0)
              for pair in ((first, second), (second, first))]
    half = len(halves[0]) // 2  # Both images have equal sizes, so each has half of the rows.
    torch.testing.assert_close(halves[0], torch.cat([halves[1][half:], halves[1][:half]]))
    assert not torch.equal(halves[0], halves[1])


@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_prompt_contains_the_question_and_follows_both_images(
        kind: str, captioner_of: Callable[[str], ChatCaptioner]) -> None:
    captioner = captioner_of(kind)
    text = captioner.conversation("What changed?")
    asked = PROMPT.replace("{question}", "What changed?")
    assert text.count(captioner.processor.image_token) == 2
    assert text.rindex(captioner.processor.image_token) < text.index(asked)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_question_with_a_control_token_of_the_model_is_refused(
        kind: str, captioner_of: Callable[[str], ChatCaptioner]) -> None:
    captioner = captioner_of(kind)
    mark = captioner.processor.image_token
    with pytest.raises(ValueError, match=rf"must not contain control tokens of the model, got {re.escape(mark)} in"):
        captioner.inputs(PAIRS[:1], [f"Where is the {mark} icon?"])


@pytest.mark.parametrize(("kind", "begins"), [("llava", 1), ("idefics3", 1), ("qwen2_vl", 0)])
def test_the_input_contains_at_most_one_begin_token(kind: str, begins: int,
                                                    captioner_of: Callable[[str], ChatCaptioner]) -> None:
    ids = captioner_of(kind).inputs(PAIRS, QUESTIONS)["input_ids"]
    assert (ids == 0).sum(1).tolist() == [begins] * len(PAIRS)


def test_decoding_takes_the_most_likely_token_at_each_step(captioner_of: Callable[[str], ChatCaptioner]) -> None:
    captioner = captioner_of("llava")
    batch = captioner.inputs(PAIRS[:1], QUESTIONS[:1])
    ids = batch.pop("input_ids")
    length, end = ids.shape[1], captioner.processor.tokenizer.eos_token_id
    for _ in range(5):
        token = captioner.model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        if token.item() == end:
            break
    expected = captioner.processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert captioner.caption(PAIRS[:1], QUESTIONS[:1], max_new_tokens=5) == [" ".join(expected.split())]


def test_the_sampling_settings_of_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    checkpoint = qwen2_vl(tmp_path)
    captions = ChatCaptioner.load(checkpoint).caption(PAIRS, QUESTIONS, max_new_tokens=5)
    settings = tmp_path / "generation_config.json"
    plain = {key: value for key, value in json.loads(settings.read_text()).items() if key.endswith("token_id")}
    settings.write_text(json.dumps(plain))
    assert ChatCaptioner.load(checkpoint).caption(PAIRS, QUESTIONS, max_new_tokens=5) == captions


def test_the_error_for_a_model_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing must be a folder .*hf download nobody") as caught:
        ChatCaptioner.load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_model_without_image_input_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**DECODER)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"must be a chat model that reads images, but config.json has"):
        ChatCaptioner.load(str(tmp_path))


def test_a_checkpoint_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    llava(tmp_path)
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(ValueError, match=r"must have a chat template"):
        ChatCaptioner.load(str(tmp_path))


def test_a_chat_template_that_inserts_only_one_image_is_refused(tmp_path: Path) -> None:
    llava(tmp_path)
    one = LLAVA_TEMPLATE.replace("'equalto', 'image') %}", "'equalto', 'image') | list | batch(1) | first %}", 1)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": one}))
    with pytest.raises(ValueError, match=r"chat template must insert 2 images, but inserts 1 \(as <image>\)"):
        ChatCaptioner.load(str(tmp_path))


def test_a_prompt_longer_than_the_context_is_refused(captioner_of: Callable[[str], ChatCaptioner]) -> None:
    with pytest.raises(ValueError, match=r"2 images, prompt and answer must fit into the context of 2048 tokens"):
        captioner_of("llava").caption(PAIRS[:1], QUESTIONS[:1], max_new_tokens=2000)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    llava(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"must be a folder with weights in safetensors format"):
        ChatCaptioner.load(str(tmp_path))


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    llava(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got 1 missing \(.*multi_modal_projector"):
        ChatCaptioner.load(str(tmp_path))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    llava(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')\n")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"--chat: .*OneDiff does not run code from checkpoints"):
        ChatCaptioner.load(str(tmp_path))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with torchvision, the processor can be loaded")
def test_the_error_for_a_processor_that_needs_a_missing_package_is_one_line(tmp_path: Path) -> None:
    idefics3(tmp_path)
    for file, key in (("config.json", "model_type"), ("preprocessor_config.json", "processor_class"),
                      ("processor_config.json", "processor_class")):
        values = json.loads((tmp_path / file).read_text())
        values[key] = "smolvlm" if key == "model_type" else "SmolVLMProcessor"
        (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"the processor could not be loaded .*torchvision") as caught:
        ChatCaptioner.load(str(tmp_path))
    assert "\n" not in str(caught.value)
