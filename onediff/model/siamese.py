"""The Siamese image encoder: one vision tower, whose weights both images of a pair share."""

import torch
from torch import Tensor, nn
from transformers import AutoModel

from onediff.model.configuration import OneDiffConfig


class SiameseEncoder(nn.Module):
    """The image encoder: one vision tower encodes the before images and the after images in one call."""

    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__()
        self.levels, self.num_patches = config.read_levels, config.num_patches
        self.tower = AutoModel.from_config(config.vision_config)

    def forward(self, images: Tensor) -> Tensor:
        """Return hidden states (M images, L levels, N patches, C channels) of images (M, 3, height, width).

        The class token is not included, and the levels are those of `config.read_levels`.
        """
        hidden = self.tower(images, output_hidden_states=True).hidden_states
        return torch.stack([hidden[level][:, -self.num_patches :] for level in self.levels], dim=1)
