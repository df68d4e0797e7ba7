"""Tests of loading checkpoints: valid checkpoints are accepted, and all others are refused before training."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DECODER, TOWER, checkpoints, save_image_processor, save_tokenizer, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from onediff.config import Config
from onediff.model.assemble import build
from onediff.model.captioner import Captioner
from onediff.model.weights import load_strictly, load_trained

BERT: dict[str, Any] = {"vocab_size": 17, "hidden_size": 13, "num_hidden_layers": 2, "num_attention_heads": 1,
                        "intermediate_size": 52}


class Shell:
    """An object that runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.fixture
def language(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**DECODER)).save_pretrained(tmp_path / "language")
    save_tokenizer(tmp_path / "language", bos_token="<s>")
    return tmp_path / "language"


@pytest.fixture
def trained(micro: Config, tmp_path: Path) -> Path:
    """A model folder in the format that a training phase writes."""
    for part in build(settings(micro, *checkpoints(tmp_path, "clip", "llama")), seed=3):
        part.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def load(folder: Path) -> Any:
    return load_strictly(LlamaForCausalLM, folder, where="params.yaml: model.language")


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_pickle(folder: Path, *, extra: Any = None, **options: Any) -> None:
    """Replace the safetensors file by a pickle of the weights, as in old checkpoints.

    `extra` is an additional object in the pickle, and `options` are passed to `torch.save`.
    """
    weights = load_file(folder / "model.safetensors") | ({} if extra is None else {"extra": extra})
    torch.save(weights, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def test_a_complete_checkpoint_loads_with_and_without_shards(language: Path, tmp_path: Path) -> None:
    model = load(language)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = load(tmp_path / "sharded")
    assert all(torch.equal(weight, sharded.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_pickle_that_contains_only_tensors_loads(options: dict[str, Any], language: Path) -> None:
    model = load(language)
    as_pickle(language, **options)
    assert torch.equal(load(language).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(options: dict[str, Any], language: Path,
                                                                 tmp_path: Path) -> None:
    as_pickle(language, extra=Shell(f"touch {tmp_path / 'ran'}"), **options)
    with pytest.raises(ValueError, match=r"model.language: .* this pickle calls (posix|os).system; no code .* was run; "
                                         "get this model as safetensors"):
        load(language)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_with_code_in_the_oldest_format_is_refused_and_the_code_does_not_run(language: Path,
                                                                                      tmp_path: Path) -> None:
    (language / "model.safetensors").unlink()
    content = {"lm_head.weight": Shell(f"touch {tmp_path / 'ran'}")}
    (language / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="a weight file must contain only tensors"):
        load(language)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_with_code_that_a_safetensors_index_lists_is_refused(language: Path, tmp_path: Path) -> None:
    names = list(load_file(language / "model.safetensors"))
    as_pickle(language, extra=Shell(f"touch {tmp_path / 'ran'}"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (language / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"this pickle calls (posix|os).system"):
        load(language)
    assert not (tmp_path / "ran").exists()


def test_python_code_in_a_checkpoint_folder_does_not_run(language: Path, tmp_path: Path) -> None:
    (language / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(language, model_type="own", auto_map={"AutoConfig": "modeling_own.Config",
                                                        "AutoModelForCausalLM": "modeling_own.Model"})
    with pytest.raises(ValueError, match=r"must be part of transformers, because OneDiff does not run code"):
        load_trained(language)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda weights: weights.pop("lm_head.weight"), r"1 missing \(lm_head.weight\); use a config.json and weights"),
    (lambda weights: weights.update({"h.0.attn": torch.zeros(3)}), r"1 additional \(h.0.attn\); use a config.json and"),
    (lambda weights: weights.update({"lm_head.weight": torch.zeros(5, 34)}),
     r"1 of another shape \(lm_head.weight \[5, 34\] instead of \[263, 34\]\); use a config.json and weights"),
    (lambda weights: [weights.pop(name) for name in list(weights)] and weights.update({"wte": torch.zeros(3)}),
     r"21 missing \(lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ...\), 1 addi"),
])
def test_a_checkpoint_whose_weights_do_not_match_config_json_is_refused(
        change: Callable[[dict[str, Tensor]], None], message: str, language: Path) -> None:
    change_weights(language, change)
    with pytest.raises(ValueError, match=r"model.language: .* exactly the weights of the LlamaForCausalLM .*"
                                         + message):
        load(language)


def test_the_error_for_a_missing_shard_contains_its_name(language: Path, tmp_path: Path) -> None:
    load(language).save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"must contain \d+ weight files, but 1 are missing \({shard.name}\)"):
        load(tmp_path / "sharded")


def test_a_folder_without_weights_and_an_invalid_index_are_refused(language: Path) -> None:
    (language / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must contain weights \(model.safetensors or .*\), but it has none"):
        load(language)
    (language / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index.json must contain the key weight_map, .*; download the file again"):
        load(language)


@pytest.mark.parametrize("format", ["safetensors", "pickle"])
def test_a_truncated_weight_file_is_refused(format: str, language: Path) -> None:
    if format == "pickle":
        as_pickle(language)
    file = language / ("model.safetensors" if format == "safetensors" else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-999])
    with pytest.raises(ValueError, match=r"model.language: .* (incomplete or damaged|must contain only tensors)"):
        load(language)


def test_a_tokenizer_with_more_ids_than_embedding_rows_is_refused(micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    LlamaForCausalLM(LlamaConfig(**DECODER | {"vocab_size": 251})).save_pretrained(language)
    with pytest.raises(ValueError, match=r"token ids must be below 251, .* but the tokenizer has ids up to 257"):
        build(settings(micro, vision, language), seed=3)


def test_the_embedding_table_needs_no_rows_for_placeholders(micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    LlamaForCausalLM(LlamaConfig(**DECODER | {"vocab_size": 258})).save_pretrained(language)
    model, processor = build(settings(micro, vision, language), seed=3)
    assert (processor.image_token_id, model.config.delta_token_id) == (258, 259)


@pytest.mark.parametrize(("marks", "message"), [
    ({"pad_token": "<image>"}, r"the id of the placeholder <image>, but id 258 also belongs to pad_token"),
    ({"unk_token": "<delta>"}, r"the id of the placeholder <delta>, but id 258 also belongs to unk_token"),
])
def test_a_placeholder_that_shares_its_id_with_another_token_is_refused(marks: dict[str, str], message: str,
                                                                        micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    save_tokenizer(Path(language), bos_token="<s>", **marks)
    with pytest.raises(ValueError, match=r"params.yaml: model.language: .* " + message):
        build(settings(micro, vision, language), seed=3)


def test_a_trained_model_loads_only_with_the_tokenizer_of_its_training(trained: Path) -> None:
    assert load_trained(trained)[0].config.image_token_id == 258
    change_config(trained, image_token_id=7)
    with pytest.raises(ValueError, match=r"<image> must have id 7, as in config.json, but it has id 258"):
        load_trained(trained)


def test_an_incomplete_trained_model_and_a_model_of_another_type_are_refused(trained: Path, language: Path) -> None:
    with pytest.raises(ValueError, match=r"must contain a OneDiff model, but the model_type in config.json is 'llama'"):
        load_trained(language)
    change_weights(trained, lambda weights: weights.pop("delta.tokens"))
    with pytest.raises(ValueError, match=r"1 missing \(delta.tokens\)"):
        Captioner.load(trained)
    (trained / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must contain weights"):
        Captioner.load(trained)
    (trained / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json, so the folder is incomplete"):
        load_trained(trained)


def test_tied_output_embeddings_do_not_count_as_missing_weights(micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "qwen2")
    Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True)).save_pretrained(language)
    assert "lm_head.weight" not in load_file(Path(language) / "model.safetensors")
    for part in build(settings(micro, vision, language), seed=3):
        part.save_pretrained(tmp_path / "out")
    loaded = load_trained(tmp_path / "out")[0].language
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_bert_checkpoint_may_contain_heads_that_onediff_does_not_use(kind: Any, micro: Config,
                                                                       tmp_path: Path) -> None:
    bert = kind(BertConfig(**BERT))
    bert.save_pretrained(tmp_path / "bert")
    delta = {"init": str(tmp_path / "bert")}
    model, _ = build(settings(micro, *checkpoints(tmp_path, "clip", "llama"), delta=delta), seed=3)
    layers = getattr(bert, "bert", bert).encoder.layer
    assert torch.equal(model.delta.layers[1].up.weight, layers[1].intermediate.dense.weight)


def test_a_vision_tower_may_contain_a_projection_that_onediff_does_not_use(micro: Config, tmp_path: Path) -> None:
    _, language = checkpoints(tmp_path, "siglip", "llama")
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER, projection_dim=7))
    tower.save_pretrained(tmp_path / "tower")
    save_image_processor(tmp_path / "tower")
    model, _ = build(settings(micro, str(tmp_path / "tower"), language), seed=3)
    assert torch.equal(model.vision.tower.post_layernorm.weight, tower.vision_model.post_layernorm.weight)


def test_a_vision_tower_whose_last_layer_is_missing_is_refused(micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    change_weights(Path(vision), lambda weights: [weights.pop(name) for name in list(weights)
                                                  if name.startswith("vision_model.encoder.layers.2")])
    with pytest.raises(ValueError, match=r"model.vision.path: .* 16 missing \(vision_model.encoder.layers.2"):
        build(settings(micro, vision, language), seed=3)


def test_a_vision_tower_as_decoder_and_a_decoder_as_vision_tower_are_refused(micro: Config, tmp_path: Path) -> None:
    vision, language = checkpoints(tmp_path, "clip", "llama")
    with pytest.raises(ValueError, match=r"model.language must be a decoder-only .*, a LLaVA, .*, but .* is a 'clip'"):
        build(settings(micro, vision, vision), seed=3)
    with pytest.raises(ValueError, match=r"model.vision.path must be a CLIP or SigLIP vision tower, but .* 'llama'"):
        build(settings(micro, language, language), seed=3)
