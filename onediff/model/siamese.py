"""The Siamese image encoder: one tower, every image of the batch in one call.

So before and after share each weight and statistic.

Shapes:  M images, L levels that are read, N patches per image, C tower width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel

from onediff.model.configuration import OneDiffConfig


class SiameseEncoder(nn.Module):
    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__()
        self.levels, self.num_patches = config.read_levels, config.num_patches
        self.tower = AutoModel.from_config(config.vision_config)

    def forward(self, images: Tensor) -> Tensor:
        """images (M, 3, H, W) -> states (M, L, N, C), the hidden states at `read_levels` without class tokens."""
        hidden = self.tower(images, output_hidden_states=True).hidden_states
        return torch.stack([hidden[level][:, -self.num_patches :] for level in self.levels], dim=1)
