"""Packed rows: train on rows of different lengths without computing anything for padding tokens.

The tokens of all rows, without padding, are concatenated into one long row. Linear layers process this long row, and
attention is restricted to tokens of one original row. The function is registered with transformers as "packed". The
rows are padded to equal length instead if the language model does not support this (exactness.py decides it).
Shapes:  B rows, T tokens of all rows together, S tokens of the longest row, A tokens that need logits, H heads,
         G key-value heads, W head width, D width and V vocabulary of the language model.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "packed"
# (language model, embeddings (T, D), positions (T,), lengths of the rows, indices of A tokens) -> logits (A, V)
RowLogits = Callable[[nn.Module, Tensor, Tensor, list[int], Tensor], Tensor]


def packed_logits(language: nn.Module, embeds: Tensor, positions: Tensor, lengths: list[int], wanted: Tensor) -> Tensor:
    """Return the logits at the tokens `wanted`, with all rows in one sequence. `use_packing` must be called before."""
    return language(inputs_embeds=embeds[None], position_ids=positions[None], attention_mask=no_mask(embeds),
                    lengths=lengths, logits_to_keep=wanted, use_cache=False).logits[0]


def padded_logits(language: nn.Module, embeds: Tensor, positions: Tensor, lengths: list[int], wanted: Tensor) -> Tensor:
    """Return the logits at the tokens `wanted`, with every row padded on the right to the length of the longest row.

    This is exact if no token reads a later token, so for almost every decoder.
    """
    rows, places = (pad_sequence(list(part.split(lengths)), batch_first=True) for part in (embeds, positions))
    is_token = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    row_of, column_of = (part[wanted] for part in is_token.nonzero(as_tuple=True))
    columns, chosen = column_of.unique(return_inverse=True)
    logits = language(inputs_embeds=rows, attention_mask=is_token.long(), use_cache=False,
                      **_accepted(language, position_ids=places, logits_to_keep=columns)).logits  # (B, columns, V)
    return logits[row_of, chosen if logits.shape[1] == len(columns) else column_of]


def single_logits(language: nn.Module, embeds: Tensor, positions: Tensor, lengths: list[int], wanted: Tensor) -> Tensor:
    """Return the logits at the tokens `wanted`, where the language model reads one row after the other.

    This is exact for every language model, but slow.
    """
    rows = zip(embeds.split(lengths), positions.split(lengths), strict=True)
    return torch.cat([language(inputs_embeds=row[None], use_cache=False,
                               **_accepted(language, position_ids=places[None])).logits[0]
                      for row, places in rows])[wanted]


def _accepted(language: nn.Module, **options: Tensor) -> dict[str, Tensor]:
    """Return those of the options that the forward pass of the language model accepts."""
    parameters = inspect.signature(language.forward).parameters
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in options.items() if accepts_all or name in parameters}


DESCRIPTIONS: dict[RowLogits, str] = {
    packed_logits: "packed into one sequence", padded_logits: "padded to equal length",
    single_logits: "read one after the other"}


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                     scaling: float | None = None, dropout: float = 0.0, lengths: list[int] | None = None,
                     **options: Any) -> tuple[Tensor, None]:
    """Compute causal attention in which each token attends only to itself and earlier tokens of its own row.

    query is (1, heads, tokens of all rows, width), and the result is (1, tokens of all rows, heads, width).
    `lengths` lists the number of tokens of each row. If it is None, the rows are not packed, and the function calls
    transformers' scaled-dot-product attention, which supports masks and caches. If the layer has a sliding window, a
    token attends to at most so many tokens, including itself.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **options)
    attend = _by_flash if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _by_row
    return attend(query, key, value, lengths, scaling, options.get("sliding_window") or max(lengths)), None


def _by_row(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None,
            window: int) -> Tensor:
    """Apply PyTorch's scaled-dot-product attention to one row after the other; this works on every device."""
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    rows = [functional.scaled_dot_product_attention(
                q, k, v, **_causal(q, window), scale=scaling, enable_gqa=q.shape[1] != k.shape[1]) for q, k, v in parts]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous()  # Some models call `view`, which needs this.


def _causal(query: Tensor, window: int) -> dict[str, Any]:
    """Return the options of PyTorch's attention for one row (1, H, S, W); a mask is needed if the window is shorter."""
    size = query.shape[2]
    if size <= window:
        return {"is_causal": True}
    return {"attn_mask": torch.ones(size, size, dtype=torch.bool, device=query.device).tril().triu(1 - window)}


def _by_flash(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None,
              window: int) -> Tensor:
    """Apply FlashAttention to all rows in one call. It needs a GPU and a 16-bit data type."""
    from torch.nn.attention.varlen import varlen_attn

    ends = functional.pad(torch.tensor(lengths, device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32),
                          (1, 0))
    longest = max(lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, W)
    earlier = window - 1 if window < longest else -1  # number of earlier tokens that a token attends to; -1: all
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(earlier, 0),
                        enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(mixed, Tensor), "varlen_attn returns one tensor unless auxiliary outputs are requested"
    return mixed[None]


def use_packing(language: nn.Module) -> None:
    """Make the language model use packed attention. Raises ValueError if the model does not support this change."""
    language.set_attn_implementation(NAME)  # type: ignore[operator]


def no_mask(like: Tensor) -> Tensor:
    """Return an attention mask of one value, which packed attention ignores, with the dtype and device of `like`.

    The mask has four axes, because transformers passes such a mask on unchanged. Without a mask, transformers would
    create a causal mask of T x T values for T tokens.
    """
    return like.new_zeros(1, 1, 1, 1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
