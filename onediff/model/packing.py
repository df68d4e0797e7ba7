"""Packed attention: train on rows of different lengths without computing anything for padding tokens.

The tokens of all rows, without padding, are concatenated into one long row. Linear layers process this long row, and
attention is restricted to tokens of one original row. The function is registered with transformers as "packed".
Shapes:  T tokens of all rows together, H heads, G key-value heads, W head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "packed"


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                     scaling: float | None = None, dropout: float = 0.0, lengths: list[int] | None = None,
                     **options: Any) -> tuple[Tensor, None]:
    """Compute causal attention in which each token attends only to itself and earlier tokens of its own row.

    query is (1, heads, tokens of all rows, width), and the result is (1, tokens of all rows, heads, width).
    `lengths` lists the number of tokens of each row. If it is None, the rows are not packed, and the function calls
    transformers' scaled-dot-product attention, which supports masks and caches.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **options)
    window = options.get("sliding_window")
    assert not window or max(lengths) <= window, (
        "a packed row must fit into the decoder's sliding window, because packed attention does not apply the window")
    attend = _by_flash if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _by_row
    return attend(query, key, value, lengths, scaling), None


def _by_row(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None) -> Tensor:
    """Apply PyTorch's scaled-dot-product attention to one row after the other; this works on every device."""
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    rows = [functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                                    enable_gqa=q.shape[1] != k.shape[1]) for q, k, v in parts]
    return torch.cat(rows, dim=2).transpose(1, 2)


def _by_flash(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None) -> Tensor:
    """Apply FlashAttention to all rows in one call. It needs a GPU and a 16-bit data type."""
    from torch.nn.attention.varlen import varlen_attn

    ends = functional.pad(torch.tensor(lengths, device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32),
                          (1, 0))
    longest = max(lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, W)
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0),
                        enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(mixed, Tensor), "varlen_attn returns one tensor unless auxiliary outputs are requested"
    return mixed[None]


def use_packing(language: nn.Module) -> None:
    """Make the language model use packed attention. Raises ValueError if the model does not support this change."""
    try:
        language.set_attn_implementation(NAME)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ValueError("params.yaml: model.language: the attention implementation of the language model must be "
                         f"configurable, but that of {type(language).__name__} is not ({error}); use a model of the "
                         "Llama or Qwen family") from None


def no_mask(like: Tensor) -> Tensor:
    """Return an attention mask of one value, which packed attention ignores, with the dtype and device of `like`.

    The mask has four axes, because transformers passes such a mask on unchanged. Without a mask, transformers would
    create a causal mask of T x T values for T tokens.
    """
    return like.new_zeros(1, 1, 1, 1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
