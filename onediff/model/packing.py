"""Rows of unlike length, one after the other, so that no work is done on padding: `attention="packed"` of a decoder.

Every linear layer sees the kept tokens of all rows as one long row; attention stays within each row.
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
    """query (1, H, T, W), key and value (1, G, T, W), lengths of the rows in T -> (1, T, H, W), causal in each row.

    Without `lengths` it is transformers' own scaled-dot-product attention, mask, cache and all.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **options)
    window = options.get("sliding_window")
    assert not window or max(lengths) <= window, "a packed row is shorter than the decoder's sliding window"
    mixed = _by_flash if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _by_row
    return mixed(query, key, value, lengths, scaling), None


def _by_row(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None) -> Tensor:
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    rows = [functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                                    enable_gqa=q.shape[1] != k.shape[1]) for q, k, v in parts]
    return torch.cat(rows, dim=2).transpose(1, 2)


def _by_flash(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = functional.pad(torch.tensor(lengths, device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32),
                          (1, 0))
    longest = max(lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, W)
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0),
                        enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(mixed, Tensor), "no auxiliary output was asked for"
    return mixed[None]


def use_packing(language: nn.Module) -> None:
    """Raises ValueError for a decoder whose attention cannot be chosen."""
    try:
        language.set_attn_implementation(NAME)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ValueError(f"model.language: {type(language).__name__} does not let its attention be chosen "
                         f"({error}); take a decoder of the Llama or Qwen kind") from None


def no_mask(like: Tensor) -> Tensor:
    """A mask of four axes is handed to attention as it is, so that none of T x T is made; packed attention needs none.
    """
    return like.new_zeros(1, 1, 1, 1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
