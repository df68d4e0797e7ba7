"""Tests that rows train a language model as if each row were alone, for the decoders that transformers has."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DeepseekV32Config,
    FalconH1Config,
    Gemma2Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from onediff.model.assemble import text_part
from onediff.model.exactness import UNSUPPORTED, embeddings, logits_of, row_logits, small_copy
from onediff.model.packing import RowLogits, packed_logits, padded_logits, single_logits, use_packing

PACKED = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "smollm3", "olmo3", "ministral3", "granite",
          "deepseek_v3", "mixtral")
# The default configurations of these models are incomplete, or belong to models that are no language models.
WITHOUT_DEFAULT = ("cohere_compass_text", "dbrx", "dots1", "emu3", "gemma4_assistant", "gemma4_unified_assistant",
                   "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "mllama", "musicgen",
                   "musicgen_melody", "nemotron", "qwen4_exp", "qwen4_exp_text", "reformer")
# Without `is_decoder` in their configuration, the tokens of these models read later tokens.
ENCODERS = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
            "xlm-roberta-xl", "xlnet")
# Other layers than attention mix tokens, or the attention has a part that packed attention lacks.
PADDED = (Lfm2Config(layer_types=["conv", "full_attention"] * 16), FalconH1Config(mamba_d_ssm=1536, mamba_n_heads=24),
          GraniteMoeHybridConfig(), Qwen3_5TextConfig(), MambaConfig(), Gemma2Config(), GptOssConfig())


def loss(logits: Tensor) -> float:
    """Return the loss of fixed random targets."""
    targets = torch.randint(logits.shape[1], (len(logits),), generator=torch.Generator().manual_seed(2))
    return float(cross_entropy(logits, targets))


def assert_rows_are_exact(config: PreTrainedConfig, method: RowLogits) -> None:
    """Compare the loss of rows together with the loss of the rows alone, in a small copy of the language model."""
    with torch.no_grad():
        language = small_copy(config)
        expected = loss(logits_of(single_logits, language, embeddings(language)))
        if method is packed_logits:
            use_packing(language)
        assert loss(logits_of(method, language, embeddings(language))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_rows_are_packed_if_only_attention_mixes_tokens(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    assert row_logits(config) is packed_logits
    assert_rows_are_exact(config, packed_logits)


@pytest.mark.parametrize("config", PADDED, ids=lambda config: config.model_type)
def test_rows_are_padded_if_packed_rows_would_give_another_loss(config: PreTrainedConfig) -> None:
    assert row_logits(config) is padded_logits
    assert_rows_are_exact(config, padded_logits)


def test_rows_are_read_one_after_the_other_if_nothing_else_is_exact() -> None:
    """In DeepSeek 3.2, the tokens that a query attends to also depend on padding tokens."""
    assert row_logits(DeepseekV32Config()) is single_logits


def test_the_measurement_changes_no_random_number_and_works_while_a_model_is_loaded() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.device("meta"), local_torch_dtype(torch.bfloat16), no_init_weights():
        assert row_logits(LlamaConfig(num_hidden_layers=3)) is packed_logits
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_the_rows_of_every_decoder_of_transformers_are_exact(name: str) -> None:
    if name in WITHOUT_DEFAULT:
        with pytest.raises((*UNSUPPORTED, StrictDataclassError)), torch.device("meta"):
            AutoModelForCausalLM.from_config(text_part(CONFIG_MAPPING[name]()))
        return
    config = text_part(CONFIG_MAPPING[name]())
    try:
        method = row_logits(config)
    except ValueError as error:
        assert "no token reads a later token" in str(error) and name in ENCODERS
        return
    assert name not in ENCODERS
    with torch.no_grad():
        language = small_copy(config)
        try:
            logits_of(single_logits, language, embeddings(language))
        except UNSUPPORTED:  # There is no small copy, or it lacks an input that its architecture needs.
            assert method is padded_logits
            return
    assert_rows_are_exact(config, method)
