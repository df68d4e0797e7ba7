"""A small OneDiff model in which each dimension has another size, so that exchanged axes cause an error."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from onediff.config import Auxiliary, Phase, Tune, WeightDecay
from onediff.model.configuration import OneDiffConfig
from onediff.model.onediff import OneDiffForConditionalGeneration

IMAGE_ID, DELTA_ID, VOCAB = 101, 102, 97
SIDE, CHANNELS, TOKENS, WIDTH, LANGUAGE = 3, 11, 7, 13, 34  # 3 patches per side: N = 9


# Changes of the OneDiffConfig of the small model that add the module Fusion: 3 cells, 3 places, 2 attributes.
FUSION: dict[str, Any] = {
    "delta_fusion": {"channels": 5, "width": 7, "places": 3, "blocks": 2},
    "delta_classes": {"color": {"red": [5], "green": [7, 11], "blue": [13], "gray": [17], "brown": [19]},
                      "shape": {"cube": [23], "sphere": [29, 31, 37], "cylinder": [41]}}}


def small(**changes: Any) -> OneDiffForConditionalGeneration:
    """Return a small model with fixed random weights; `changes` replace keys of its OneDiffConfig.

    The key `text_config` replaces the configuration of the language model, a Llama.
    """
    vision = CLIPVisionConfig(hidden_size=CHANNELS, intermediate_size=19, num_hidden_layers=5, num_attention_heads=1,
                              image_size=12, patch_size=4)
    llama = LlamaConfig(vocab_size=VOCAB, hidden_size=LANGUAGE, intermediate_size=23, num_hidden_layers=2,
                        num_attention_heads=17, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
                        eos_token_id=2)
    settings = {"reading": "A", "patch_level": -2, "patch_pool": 1, "delta_num_tokens": TOKENS, "delta_width": WIDTH,
                "delta_heads": 1, "delta_levels": [1, 3, 5], "delta_inputs": "pair", "image_token_id": IMAGE_ID,
                "delta_token_id": DELTA_ID, "text_config": llama} | changes
    torch.manual_seed(0)
    return OneDiffForConditionalGeneration(OneDiffConfig(vision_config=vision, **settings)).eval()


def batch_of(model: OneDiffForConditionalGeneration, counts: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch whose rows have `counts` images: placeholders, then text of different lengths, padded right."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for count in counts:
        words = torch.randint(3, VOCAB, (4 + count,), generator=generator).tolist()
        num_patch_sets = min(count, 1) if model.config.reading == "C" else count
        rows.append([1] + [IMAGE_ID] * model.config.tokens_per_image * num_patch_sets
                    + [DELTA_ID] * model.config.delta_tokens_read * (count == 2) + words)
    longest = max(map(len, rows))
    return {"input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "image_counts": torch.tensor(counts), "images": torch.randn(sum(counts), 3, 12, 12, generator=generator)}


PLAIN = {"weight_decay": WeightDecay(vision=0, delta=0, projector=0, language=0), "lr_inherited": None,
         "loss": "tokens"}
RATES = {"lr_vision": 0.0, "lr_delta": 3e-3, "lr_projector": 2e-3, "lr_language": 1e-3}


def phase(**changes: Any) -> Phase:
    """Return the settings of a training phase; `changes` replace single keys.

    With the key `auxiliary`, which holds the weights of the auxiliary losses, it is the phase `tune`.
    """
    settings = {"steps": 30, "epochs": None, "batch_size": 12, "warmup": 0.2, "clip_norm": 0.5, **PLAIN,
                "mask_patches": 0.0, "validate_every": None, "num_val": 1, "mixture": {"scenes": 1.0}, "lora": None}
    if weights := changes.pop("auxiliary", None):
        return Tune(**settings | RATES | changes, default_question=1.0, auxiliary=Auxiliary(**weights))
    return Phase(**settings | RATES | changes)
