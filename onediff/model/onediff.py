"""OneDiff: before and after become patch and delta tokens, these and the prompt a caption. Read this file first.

Shapes:  B rows, M images in the batch (0, 1 or 2 per row), P rows with two images, L levels, N patches per image,
         C tower width, T tokens per image and K delta tokens as the language model reads them, D its width,
         S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from onediff.model.configuration import OneDiffConfig
from onediff.model.delta import Attention, VisualDeltaModule
from onediff.model.siamese import SiameseEncoder

IGNORED = -100  # a label that no loss counts
PARTS = ("vision", "delta", "projector", "language")


@dataclass
class OneDiffOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class Projector(nn.Sequential):
    """LLaVA's two-layer perceptron into the language model's width."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


class OneDiffForConditionalGeneration(PreTrainedModel):
    config_class = OneDiffConfig
    config: OneDiffConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__(config)
        tower, width, language = config.vision_config.hidden_size, config.delta_width, config.text_config.hidden_size
        self.vision = SiameseEncoder(config)
        self.delta = VisualDeltaModule(config)
        self.language = AutoModelForCausalLM.from_config(config.text_config)
        if config.reading == "A":
            self.projector = Projector(tower, language)
            self.delta_projector = nn.Sequential(nn.LayerNorm(width), Projector(width, language))
        else:
            self.projector = Projector(2 * tower, language)
            self.enhance = Enhance(tower, width, config.delta_heads)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module starts as torch makes it, which unlike one fixed spread fits any width."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                states: Tensor | None = None, labels: Tensor | None = None, num_answer_tokens: Tensor | None = None,
                patch_mask: Tensor | None = None) -> OneDiffOutput:
        """input_ids, attention_mask, labels (B, S), image_counts (B,); images (M, 3, H, W) or states (M, L, N, C).

        The loss sums over answer tokens and divides by `num_answer_tokens` (default: those of this batch), so that
        micro-batches and ranks of unlike lengths add up to the loss of the whole. patch_mask (B,) bool: rows whose
        patches the language model may not read. With labels only the loss is given, without them only the logits.
        """
        embeds = self.embed(input_ids, image_counts, images=images, states=states)
        if patch_mask is not None:
            attention_mask = attention_mask * ~(patch_mask[:, None] & (input_ids == self.config.image_token_id))
        if labels is None:
            return OneDiffOutput(logits=self.language(inputs_embeds=embeds, attention_mask=attention_mask).logits)
        wanted = labels[:, 1:]
        asked = int((wanted != IGNORED).any(0).long().argmax())  # before the first answer no logits are needed
        logits = self.language(inputs_embeds=embeds, attention_mask=attention_mask,
                               logits_to_keep=labels.shape[1] - asked).logits
        total = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted[:, asked:].flatten(),
                                         ignore_index=IGNORED, reduction="sum")
        count = (wanted != IGNORED).sum() if num_answer_tokens is None else num_answer_tokens
        return OneDiffOutput(loss=total / count)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                 states: Tensor | None = None, **options: Any) -> Tensor:
        """The same inputs, prompts padded on the left -> ids of the answers alone (B, .); transformers' own options."""
        embeds = self.embed(input_ids, image_counts, images=images, states=states)
        return self.language.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    def embed(self, input_ids: Tensor, image_counts: Tensor, *, images: Tensor | None = None,
              states: Tensor | None = None) -> Tensor:
        """Token embeddings with patch and delta tokens spliced in at their placeholders: (B, S, D).

        Raises ValueError unless placeholders and image counts agree row by row.
        """
        self.check_placeholders(input_ids, image_counts)
        is_image, is_delta = input_ids == self.config.image_token_id, input_ids == self.config.delta_token_id
        embeds = self.language.get_input_embeddings()(input_ids.masked_fill(is_image | is_delta, 0))
        if states is None and images is not None and len(images):
            states = self.vision(images)
        if states is None or not len(states):
            return embeds
        patches, delta = self.look(states, image_counts)
        embeds = embeds.masked_scatter(is_image[..., None], patches.to(embeds.dtype))
        return embeds if delta is None else embeds.masked_scatter(is_delta[..., None], delta.to(embeds.dtype))

    def look(self, states: Tensor, image_counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """states (M, L, N, C) -> patch tokens (M, T, D), delta tokens (P, K, D).

        The latter are None where no row has two images, or where they act inside the patches (reading B).
        """
        patches = states[:, self.config.read_levels.index(self.config.patch_state)]  # (M, N, C)
        first = (image_counts.cumsum(0) - image_counts)[image_counts == 2]  # each pair's before among the M
        delta = self.delta(states[first], states[first + 1]) if len(first) else None  # (P, K, W)
        if self.config.reading == "A":
            return self.projector(self.pool(patches)), None if delta is None else self.delta_projector(delta)
        enhanced = torch.zeros_like(patches)
        if delta is not None:
            both = torch.stack([first, first + 1], 1).flatten()
            enhanced = enhanced.index_copy(0, both, self.enhance(patches[both], delta.repeat_interleave(2, 0)))
        return self.projector(torch.cat([patches, enhanced], -1)), None

    def pool(self, patches: Tensor) -> Tensor:
        """(M, N, C) -> (M, T, C): the mean of each patch_pool x patch_pool square."""
        if self.config.patch_pool == 1:
            return patches
        side, square = self.config.patches_per_side, self.config.patch_pool
        grid = patches.unflatten(1, (side // square, square, side // square, square))
        return grid.mean((2, 4)).flatten(1, 2)

    def check_placeholders(self, input_ids: Tensor, image_counts: Tensor) -> None:
        found_images = (input_ids == self.config.image_token_id).sum(1)
        found_delta = (input_ids == self.config.delta_token_id).sum(1)
        need_images = image_counts * self.config.tokens_per_image
        need_delta = (image_counts == 2) * self.config.delta_tokens_read
        wrong = ((found_images != need_images) | (found_delta != need_delta)).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise ValueError(f"row {row} has {int(image_counts[row])} images and needs {int(need_images[row])} image "
                             f"and {int(need_delta[row])} delta placeholders, got {int(found_images[row])} and "
                             f"{int(found_delta[row])}; build prompts with OneDiffProcessor, and do not truncate them")

    def part_of(self, name: str) -> str:
        """Which learning rate a parameter follows: vision, delta, projector or language."""
        head = name.split(".")[0]
        return {"vision": "vision", "language": "language", "delta": "delta", "enhance": "delta"}.get(head, "projector")


class Enhance(nn.Module):
    """Reading B: each patch asks the delta tokens; (., N, C) and (., K, W) -> (., N, C)."""

    def __init__(self, tower: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(tower), nn.Linear(tower, width)
        self.attention, self.expand = Attention(width, heads), nn.Linear(width, tower)

    def forward(self, patches: Tensor, delta: Tensor) -> Tensor:
        return self.expand(self.attention(self.reduce(self.norm(patches)), delta))
