"""OneDiff: two images become patch and delta tokens, and these with the prompt become a caption. Read this file first.

Shapes:  B rows, M images in the batch (0, 1 or 2 per row), P rows with two images, L levels, N patches per image,
         C tower width, T tokens per image and K delta tokens as the language model reads them, D its width,
         S sequence length.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from onediff.inputs.processing import IGNORED
from onediff.model.configuration import OneDiffConfig
from onediff.model.delta import Attention, VisualDeltaModule
from onediff.model.packing import no_mask, use_packing

PARTS = ("vision", "delta", "projector", "language")


class SiameseEncoder(nn.Module):
    """One tower encodes every image of the batch in one call, so before and after share each weight and statistic."""

    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__()
        self.levels, self.num_patches = config.read_levels, config.num_patches
        self.tower = AutoModel.from_config(config.vision_config)

    def forward(self, images: Tensor) -> Tensor:
        """images (M, 3, H, W) -> states (M, L, N, C), the hidden states at `read_levels` without class tokens."""
        hidden = self.tower(images, output_hidden_states=True).hidden_states
        return torch.stack([hidden[level][:, -self.num_patches :] for level in self.levels], dim=1)


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

    def __init__(self, config: OneDiffConfig, *, pretrained: PreTrainedModel | None = None) -> None:
        """Random weights, except for a pretrained language model, so that none of its size is created beside it."""
        super().__init__(config)
        tower, width, language = config.vision_config.hidden_size, config.delta_width, config.text_config.hidden_size
        self.vision = SiameseEncoder(config)
        self.delta = VisualDeltaModule(config) if config.delta_num_tokens else None
        self.language = pretrained or AutoModelForCausalLM.from_config(config.text_config)
        use_packing(self.language)
        self.projector = Projector(tower if config.reading == "A" else 2 * tower, language)
        if config.reading == "B":
            self.enhance = Enhance(tower, width, config.delta_heads)
        elif self.delta is not None:
            self.delta_projector = nn.Sequential(nn.LayerNorm(width), Projector(width, language))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves the initial weights of torch, whose spread, unlike a fixed one, fits any width."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                states: Tensor | None = None, labels: Tensor | None = None, num_answer_tokens: Tensor | None = None,
                patch_mask: Tensor | None = None) -> CausalLMOutput:
        """input_ids, attention_mask, labels (B, S), image_counts (B,); images (M, 3, H, W) or states (M, L, N, C).

        The loss sums over answer tokens and divides by `num_answer_tokens` (default: those of this batch), so that
        micro-batches and ranks of unlike lengths add up to the loss of the whole. patch_mask (B,) bool: rows whose
        patches the language model may not read. Returns only the loss if there are labels, else only the logits.
        """
        embeds = self.embed(input_ids, image_counts, images=images, states=states)
        if patch_mask is not None:
            attention_mask = attention_mask * ~(patch_mask[:, None] & (input_ids == self.config.image_token_id))
        if labels is None:
            return CausalLMOutput(logits=self.language(inputs_embeds=embeds, attention_mask=attention_mask).logits)
        is_read = attention_mask.bool()  # (B, S), True at all tokens of all rows: these are packed into one row
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)[is_read]  # the token after each of them
        is_answer = (targets != IGNORED).nonzero().flatten()  # elsewhere no logits are needed
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits = self.language(inputs_embeds=embeds[is_read][None], position_ids=positions[is_read][None],
                               attention_mask=no_mask(embeds), lengths=is_read.sum(1).tolist(),
                               logits_to_keep=is_answer, use_cache=False).logits[0]
        total = functional.cross_entropy(logits.float(), targets[is_answer], reduction="sum")
        return CausalLMOutput(loss=total / (len(is_answer) if num_answer_tokens is None else num_answer_tokens))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                 states: Tensor | None = None, **options: Any) -> Tensor:
        """The inputs of `forward`, with prompts padded on the left -> ids of the answers without the prompts (B, .).

        `options`: those of transformers' `generate`.
        """
        embeds = self.embed(input_ids, image_counts, images=images, states=states)
        is_sharded = hasattr(next(self.parameters()), "ds_id")  # ZeRO 3: all ranks go on until the last one is done
        return self.language.generate(inputs_embeds=embeds, attention_mask=attention_mask, synced_gpus=is_sharded,
                                      **options)

    def embed(self, input_ids: Tensor, image_counts: Tensor, *, images: Tensor | None = None,
              states: Tensor | None = None) -> Tensor:
        """Token embeddings with patch and delta tokens spliced in at their placeholders: (B, S, D).

        Raises ValueError unless placeholders and image counts agree row by row.
        """
        self.check_placeholders(input_ids, image_counts)
        is_image, is_delta = input_ids == self.config.image_token_id, input_ids == self.config.delta_token_id
        embeds = self.language.get_input_embeddings()(input_ids.masked_fill(is_image | is_delta, 0))
        if self.training and not bool((image_counts == 2).any()):
            images, states, image_counts = self.with_blank_pair(images, states, image_counts)
        if states is None and images is not None and len(images):
            states = self.vision(images)
        if states is None or not len(states):
            return embeds
        patches, delta = self.project_visual_tokens(states.to(embeds.dtype), image_counts)
        embeds = embeds.masked_scatter(is_image[..., None], patches.to(embeds.dtype))
        return embeds if delta is None else embeds.masked_scatter(is_delta[..., None], delta.to(embeds.dtype))

    def with_blank_pair(self, images: Tensor | None, states: Tensor | None,
                        image_counts: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Appends a blank pair, whose tokens go to no placeholder, so that every part runs and has a gradient of 0.

        Under ZeRO 3 the other ranks would wait forever for a rank whose rows have no pair, and the optimizer treats a
        parameter without a gradient differently from one with a gradient of 0.
        """
        counts = functional.pad(image_counts, (0, 1), value=2)
        if states is not None:
            return None, functional.pad(states, (0, 0) * 3 + (0, 2)), counts
        if images is None:
            side = self.config.vision_config.image_size
            images = next(self.projector.parameters()).new_zeros(0, 3, side, side)
        return functional.pad(images, (0, 0) * 3 + (0, 2)), None, counts

    def project_visual_tokens(self, states: Tensor, image_counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """states (M, L, N, C) -> patch tokens (M, T, D), delta tokens (P, K, D); under reading C patch tokens
        (R, T, D) of the R rows that have images.

        Delta tokens are None where no row has two images, where there is no VDM, and where they act inside the patches
        (reading B).
        """
        patches = states[:, self.config.read_levels.index(self.config.patch_state)]  # (M, N, C)
        starts = image_counts.cumsum(0) - image_counts  # each row's first image among the M
        first = starts[image_counts == 2]
        delta = (self.delta(states[first], states[first + 1])  # (P, K, W)
                 if self.delta is not None and len(first) else None)
        if self.config.reading == "B":
            return self.projector(torch.cat([patches, self.enhanced(patches, delta, first)], -1)), None
        patches = self.pool(patches)
        if self.config.reading == "C":
            has_images = image_counts > 0
            last = starts + image_counts - 1
            patches = torch.cat([patches[starts[has_images]], patches[last[has_images]]], -1)
        return self.projector(patches), None if delta is None else self.delta_projector(delta)

    def enhanced(self, patches: Tensor, delta: Tensor | None, first: Tensor) -> Tensor:
        """patches (M, N, C), delta (P, K, W) of the pairs that begin at `first` (P,) -> (M, N, C), 0 outside pairs."""
        if delta is None:
            return torch.zeros_like(patches)
        both = torch.stack([first, first + 1], 1).flatten()
        return torch.zeros_like(patches).index_copy(
            0, both, self.enhance(patches[both], delta.repeat_interleave(2, 0)))

    def pool(self, patches: Tensor) -> Tensor:
        """(M, N, C) -> (M, T, C): the mean of each patch_pool x patch_pool square."""
        if self.config.patch_pool == 1:
            return patches
        side, square = self.config.patches_per_side, self.config.patch_pool
        grid = patches.unflatten(1, (side // square, square, side // square, square))
        return grid.mean((2, 4)).flatten(1, 2)

    def check_placeholders(self, input_ids: Tensor, image_counts: Tensor) -> None:
        counts = torch.stack([(input_ids == self.config.image_token_id).sum(1),
                              (input_ids == self.config.delta_token_id).sum(1)], 1)  # (B, 2)
        num_spliced = image_counts.clamp(max=1) if self.config.reading == "C" else image_counts
        expected = torch.stack([num_spliced * self.config.tokens_per_image,
                                (image_counts == 2) * self.config.delta_tokens_read], 1)
        wrong = (counts != expected).any(1).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            (num_image, num_delta), (need_image, need_delta) = counts[row].tolist(), expected[row].tolist()
            raise ValueError(f"row {row} has {int(image_counts[row])} images and needs {need_image} image "
                             f"and {need_delta} delta placeholders, got {num_image} and {num_delta}; build prompts "
                             "with OneDiffProcessor, and do not truncate them")

    def part_of(self, name: str) -> str:
        """Which learning rate a parameter follows: vision, delta, projector or language."""
        head = name.split(".")[0]
        return {"vision": "vision", "language": "language", "delta": "delta", "enhance": "delta"}.get(head, "projector")


class Enhance(nn.Module):
    """Reading B: patches attend to the delta tokens; (., N, C) and (., K, W) -> (., N, C)."""

    def __init__(self, tower: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(tower), nn.Linear(tower, width)
        self.attention, self.expand = Attention(width, heads), nn.Linear(width, tower)

    def forward(self, patches: Tensor, delta: Tensor) -> Tensor:
        return self.expand(self.attention(self.reduce(self.norm(patches)), delta))
