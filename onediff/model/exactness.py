"""Finds out, on a small random copy of a language model, how the rows of a batch may be given to it.

Rows may be packed into one sequence only if nothing but attention mixes tokens, and if packing.py can restrict this
attention to one row. Recurrent layers and convolutions mix the tokens of neighbouring rows, and so may code that is not
known here. Therefore a measurement decides, and not a list of architectures. It takes a fraction of a second.

Shapes:  T tokens of all rows together, S tokens of one row, D width and V vocabulary of the language model.
"""

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from onediff.model.packing import RowLogits, packed_logits, padded_logits, single_logits, use_packing

LENGTHS = (13, 5, 11)  # tokens of the rows of the measurement
LIMIT = 4  # windows, chunks and other limits on the length in the copy, in tokens: shorter than each row
TOLERANCE = 1e-4  # the largest difference that is rounding; the function `difference` defines the unit
LEAK = 1e-2  # the smallest difference that shows that a token reads a later token
SPREAD = 0.15  # standard deviation of the weights, for which attention is neither uniform nor on a single token
NUM_FREQUENCIES = 8  # of the rotary embedding in the copy
SEED = 5
# The largest sizes in the copy, by the names of settings; the first pattern that matches a complete name counts. Any
# other integer that exceeds the rows may be a limit on the length, so it becomes LIMIT.
SIZES = tuple((re.compile(pattern), size) for pattern, size in (
    (r".*vocab_size.*", 97),
    (r".*max_position.*|n_positions|n_ctx|.*max_seq_len.*|model_max_length|.*max_target_positions|context_length", 64),
    (r"hidden_size|n_embd|d_model|word_embed_proj_dim|(input_|output_)?embedding_size", 64),
    (r".*intermediate.*|.*ffn.*size|.*ffn_dim|.*feed_forward_size|n_inner|dim_ff|dff", 32),
    (r"(num|n)_(attention_)?heads?|(num_)?((en|de)coder_)?attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads", 2),
    (r"qk_head_dim", 32),
    (r"rotary_dim", 8),
    (r".*head_dim|mamba_d_(head|state)|.*lora_rank|query_pre_attn_scalar", 16),
    (r"mamba_n_heads", 8),
    (r"mamba_d_ssm", 128),
    (r".*per_tok|.*top_?k.*", 2),
    (r".*experts.*", 4),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r"(en|de)coder_layers", 1),
    (r".*layers?(_.*)?", sys.maxsize),  # the places of layers, such as the period of layers with full attention
))
TOKEN_ID = re.compile(r".*token_ids?")
# Errors of code that does not support the sizes of the copy, or an argument that is needed for packed rows.
UNSUPPORTED = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError,
               RuntimeError, TypeError, ValueError)

_measured: dict[str, RowLogits] = {}  # class and JSON text of a configuration -> result of `row_logits`


def row_logits(config: PreTrainedConfig) -> RowLogits:
    """Return the fastest method that gives the logits of the rows alone: packed, padded or single rows.

    `config` is the configuration of the language model. If nothing can be measured, the rows are padded, because this
    is exact for all decoders that follow the conventions of transformers. Raises ValueError if tokens of this model
    read later tokens, because it could then copy the answers on which it is trained.
    """
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _measured:
        _measured[key] = _measure(config)
    return _measured[key]


def _measure(config: PreTrainedConfig) -> RowLogits:
    """Do what `row_logits` does, without using earlier results."""
    # The caller may be creating a large model on another device or in another precision, and its random numbers must
    # not change.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        language = small_copy(config)
        if language is None:
            return padded_logits
        embeds = embeddings(language)
        try:
            alone = logits_of(single_logits, language, embeds)
        except UNSUPPORTED:
            return padded_logits
        if reads_later_tokens(language, embeds, alone):
            raise ValueError("params.yaml: model.language must be a decoder in which no token reads a later token, but "
                             f"a '{language.config.model_type}' is not; use for example a Llama or Qwen model")
        # `packed_logits` comes last, because it changes the attention of the language model.
        exact = [method for method in (padded_logits, packed_logits)
                 if is_exact(method, language, embeds, alone)]
        return exact[-1] if exact else single_logits


def reads_later_tokens(language: Any, embeds: Tensor, alone: Tensor) -> bool:
    """Return whether the logits of the first tokens depend on later tokens. `alone` are the logits of whole rows."""
    first = torch.arange(LIMIT)
    beginning = single_logits(language, embeds[:LIMIT].clone(), first, [LIMIT], first)
    return difference(beginning, alone[:LIMIT]) > LEAK


def is_exact(method: RowLogits, language: Any, embeds: Tensor, alone: Tensor) -> bool:
    """Return whether the method gives the logits `alone` of the rows alone, up to rounding."""
    try:
        if method is packed_logits:
            use_packing(language)
        return difference(logits_of(method, language, embeds), alone) <= TOLERANCE
    except UNSUPPORTED:
        return False


def small_copy(config: PreTrainedConfig) -> Any:
    """Return a small language model with random weights that has every kind of module that `config` describes.

    The result is None if the architecture cannot be made small.
    """
    with torch.device("meta"):
        expected = kinds(AutoModelForCausalLM.from_config(config))
    for layers in choices_of_layers(config):
        try:
            language = AutoModelForCausalLM.from_config(shrunken(config, layers), dtype=torch.float32,
                                                        attn_implementation="eager")
        except UNSUPPORTED:
            continue
        if kinds(language) == expected:
            return randomized(language)
    return None


def kinds(model: nn.Module) -> set[Any]:
    """Return the kinds of modules in a model: their classes, with all settings that are flags, words or None."""
    return {(type(module).__name__, *sorted((name, str(value)) for name, value in vars(module).items()
                                            if not name.startswith("_") and name != "training"
                                            and (value is None or isinstance(value, bool | str))))
            for module in model.modules()}


def choices_of_layers(config: PreTrainedConfig) -> Iterator[list[int]]:
    """Yield the indices of layers that may include every kind: few layers first, and all layers last.

    The first choice is the first layer of each kind, by the settings that list one value for each layer. It is not
    enough if the kind of a layer follows from its index; therefore the first 2, 4, 8, ... layers are the next choices.
    """
    number = getattr(config, "num_hidden_layers", 0)
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == number]
    first: dict[str, int] = {}
    for index, values in enumerate(zip(*lists, strict=True)):
        first.setdefault(repr(values), index)
    yield sorted(first.values()) or [0]
    for exponent in range(1, (number - 1).bit_length() + 1):
        yield list(range(min(2**exponent, number)))


def shrunken(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """Return a copy of the configuration with small sizes, and with only the layers that have these indices."""
    small = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[index] for index in layers])
        elif TOKEN_ID.fullmatch(name):
            setattr(small, name, None if value is None else 1)
        elif isinstance(value, dict):
            setattr(small, name, _smaller_section(value, layers))
        elif isinstance(value, int) and not isinstance(value, bool):
            setattr(small, name, smaller(name, value))
    small.num_hidden_layers = len(layers)
    if config.to_dict().get("num_key_value_heads") == getattr(config, "num_attention_heads", 0):
        small.num_key_value_heads = small.num_attention_heads
    return small


def smaller(name: str, value: int) -> int:
    """Return the value of an integer setting in the copy."""
    limit = LIMIT if value > min(LENGTHS) else value
    return min(value, next((size for pattern, size in SIZES if pattern.fullmatch(name)), limit))


def _smaller_section(section: dict[Any, Any], layers: list[int]) -> dict[Any, Any]:
    """Return the value of a setting that is a section, with small sizes.

    Rotary embeddings have lists with one factor for each frequency. If the keys are integers, they are the indices of
    layers.
    """
    if section and all(isinstance(key, int) and isinstance(value, dict) for key, value in section.items()):
        return {new: _smaller_section(section[old], layers) for new, old in enumerate(layers) if old in section}
    small = {}
    for name, value in section.items():
        if isinstance(value, dict):
            value = _smaller_section(value, layers)
        elif isinstance(value, list) and name.endswith("_factor"):
            value = value[:NUM_FREQUENCIES]
        elif isinstance(value, int) and not isinstance(value, bool):
            value = smaller(name, value)
        small[name] = value
    return small


def randomized(language: nn.Module) -> nn.Module:
    """Give all weights random values, so large that every layer influences the logits."""
    generator = torch.Generator().manual_seed(SEED)
    for weight in language.parameters():
        weight.normal_(float(weight.dim() == 1), SPREAD, generator=generator)
    return language.eval()


def embeddings(language: Any) -> Tensor:
    """Return random embeddings of the tokens of all rows (T, D)."""
    width = language.get_input_embeddings().weight.shape[1]
    return torch.randn(sum(LENGTHS), width, generator=torch.Generator().manual_seed(SEED), dtype=torch.float32)


def logits_of(method: RowLogits, language: Any, embeds: Tensor) -> Tensor:
    """Return the logits of all tokens (T, V), where the language model reads the rows by this method."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    # The embeddings are copied, because some models change their input in place.
    return method(language, embeds.clone(), positions, list(LENGTHS), torch.arange(len(embeds)))


def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two logits, relative to the standard deviation of the logits over the tokens."""
    return float((logits - expected).abs().max() / (expected - expected.mean(0)).std())
