"""OneDiff: a before image and an after image go in, and a caption of the difference comes out. Read this file first.

1. `SiameseEncoder` encodes every image with the same vision tower.
2. `VisualDeltaModule` (delta.py) turns the two encoded images of a pair into K delta tokens.
3. Projectors map patch tokens and delta tokens to the embedding width of the language model.
4. `embed` inserts the projected tokens at the placeholders of the prompt, and the language model continues the text.

Shapes:  B rows of the batch, M images of the batch (each row has 0, 1 or 2), P rows that have two images (pairs),
         L levels of the vision tower, N patches per image, C width of the vision tower, W width of the delta module,
         T patch tokens per image and K delta tokens per pair that the language model reads, D width of the language
         model, S length of the token sequence.
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


class Projector(nn.Sequential):
    """A two-layer perceptron, as in LLaVA-1.5, that maps visual tokens to the width of the language model."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


class Enhance(nn.Module):
    """Cross-attention of token layout B: the patches of a pair read the delta tokens of this pair."""

    def __init__(self, tower_width: int, delta_width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(tower_width), nn.Linear(tower_width, delta_width)
        self.attention, self.expand = Attention(delta_width, heads), nn.Linear(delta_width, tower_width)

    def forward(self, patches: Tensor, delta: Tensor) -> Tensor:
        """Let the patches of each image attend to the delta tokens of its pair, and return the enhanced patches.

        The patches are (images, patches, channels), and the delta tokens are (images, delta tokens, width).
        """
        return self.expand(self.attention(self.reduce(self.norm(patches)), delta))


class OneDiffForConditionalGeneration(PreTrainedModel):
    """The complete OneDiff model: vision tower, Visual Delta Module, projectors and language model.

    `config.reading` chooses the token layout, which is the order and the content of the visual tokens in the prompt:
    A: [before patches][after patches][delta tokens]. Each patch token is one projected patch.
    B: [before patches][after patches]. Each patch is concatenated with its enhanced version along the channel axis.
    C: [patches][delta tokens]. The before and the after patch of each position are concatenated along the channel axis.
    """

    config_class = OneDiffConfig
    config: OneDiffConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: OneDiffConfig, *, pretrained: PreTrainedModel | None = None) -> None:
        """Initialize all parts with random weights, except the language model if `pretrained` is given.

        In this case `pretrained` becomes the language model, so that no second language model is allocated.
        """
        super().__init__(config)
        tower_width, delta_width = config.vision_config.hidden_size, config.delta_width
        language_width = config.text_config.hidden_size
        self.vision = SiameseEncoder(config)
        self.delta = VisualDeltaModule(config) if config.delta_num_tokens else None
        self.language = pretrained or AutoModelForCausalLM.from_config(config.text_config)
        use_packing(self.language)
        self.projector = Projector(tower_width if config.reading == "A" else 2 * tower_width, language_width)
        if config.reading == "B":
            self.enhance = Enhance(tower_width, delta_width, config.delta_heads)
        elif self.delta is not None:
            self.delta_projector = nn.Sequential(nn.LayerNorm(delta_width),
                                                 Projector(delta_width, language_width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, so that all layers keep PyTorch's initialization, whose scale depends on the layer width."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                states: Tensor | None = None, labels: Tensor | None = None, num_answer_tokens: Tensor | None = None,
                patch_mask: Tensor | None = None) -> CausalLMOutput:
        """Return the loss if `labels` are given, and otherwise the logits (B, S, vocabulary).

        input_ids, attention_mask and labels are (B rows, S tokens), and image_counts is (B,).
        The images are given as pixels `images` (M, 3, height, width), or as hidden states `states` (M images,
        L levels, N patches, C channels) that the vision tower computed earlier.
        patch_mask (B,) is True for each row whose patch tokens the language model must not attend to.

        The loss is the sum over answer tokens, divided by `num_answer_tokens`, or by the number of answer tokens of
        this batch if it is None. If all ranks and micro-batches of a training step pass the total number of the step,
        their losses add up to the exact mean. At least one row must have an answer token, and no answer token may
        directly follow a masked placeholder.
        """
        embeds = self.embed(input_ids, image_counts, images=images, states=states)
        if patch_mask is not None:
            attention_mask = attention_mask * ~(patch_mask[:, None] & (input_ids == self.config.image_token_id))
        if labels is None:
            return CausalLMOutput(logits=self.language(inputs_embeds=embeds, attention_mask=attention_mask).logits)
        is_kept = attention_mask.bool()  # False for padding and for masked patch tokens
        # One target per kept token: the id of the next token, or IGNORED if the next token is not part of an answer.
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)[is_kept]
        is_answer = (targets != IGNORED).nonzero().flatten()  # only these tokens need logits
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits = self.language(inputs_embeds=embeds[is_kept][None], position_ids=positions[is_kept][None],
                               attention_mask=no_mask(embeds), lengths=is_kept.sum(1).tolist(),
                               logits_to_keep=is_answer, use_cache=False).logits[0]
        total = functional.cross_entropy(logits.float(), targets[is_answer], reduction="sum")
        return CausalLMOutput(loss=total / (len(is_answer) if num_answer_tokens is None else num_answer_tokens))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                 states: Tensor | None = None, **options: Any) -> Tensor:
        """Return the token ids of the answers, without the prompts.

        The inputs are those of `forward`, but prompts must be padded on the left. `options` are passed to the
        `generate` method of the language model.
        """
        embeds = self.embed(input_ids, image_counts, images=images, states=states)
        # Under ZeRO level 3 a forward pass needs all ranks, so each rank generates until the last rank has finished.
        is_sharded = hasattr(next(self.parameters()), "ds_id")
        return self.language.generate(inputs_embeds=embeds, attention_mask=attention_mask, synced_gpus=is_sharded,
                                      **options)

    def embed(self, input_ids: Tensor, image_counts: Tensor, *, images: Tensor | None = None,
              states: Tensor | None = None) -> Tensor:
        """Return input embeddings (rows, tokens, width), with visual tokens inserted at the placeholders of the prompt.

        Raises ValueError if a row has more or fewer placeholders than its images need.
        """
        self.check_placeholders(input_ids, image_counts)
        is_image, is_delta = input_ids == self.config.image_token_id, input_ids == self.config.delta_token_id
        # The embedding table may lack placeholder ids, so they get the embedding of token 0; it is overwritten below.
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
        """Append a pair of zero images to a batch without pairs, so that every module takes part in the training step.

        No placeholder receives the tokens of this pair, so the parameters that only pairs use get a gradient of 0.
        Without this pair, the other ranks would wait forever under ZeRO level 3 for a rank that skips the delta
        module, and the optimizer would treat a missing gradient differently from a gradient of 0.
        """
        counts = functional.pad(image_counts, (0, 1), value=2)
        if states is not None:
            return None, functional.pad(states, (0, 0) * 3 + (0, 2)), counts
        if images is None:
            side = self.config.vision_config.image_size
            images = next(self.projector.parameters()).new_zeros(0, 3, side, side)
        return functional.pad(images, (0, 0) * 3 + (0, 2)), None, counts

    def project_visual_tokens(self, states: Tensor, image_counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the patch tokens and the delta tokens for the language model, from hidden states of the vision tower.

        Patch tokens are (images, tokens, width), or (rows with images, tokens, width) in token layout C. Delta tokens
        are (pairs, tokens, width), or None if there is no pair, if the model has no delta module, and in token
        layout B, where the delta tokens only change the patches.
        """
        patches = states[:, self.config.read_levels.index(self.config.patch_state)]  # (M, N, C)
        starts = image_counts.cumsum(0) - image_counts  # index of the first image of each row among all images
        first = starts[image_counts == 2]  # index of the before image of each pair among all images
        delta = (self.delta(states[first], states[first + 1])  # (P, K, W)
                 if self.delta is not None and len(first) else None)
        if self.config.reading == "B":
            return self.projector(torch.cat([patches, self.enhance_pairs(patches, delta, first)], -1)), None
        patches = self.pool(patches)
        if self.config.reading == "C":
            has_images = image_counts > 0
            # In token layout C, a row with a single image joins this image with itself.
            last = starts + image_counts - 1
            patches = torch.cat([patches[starts[has_images]], patches[last[has_images]]], -1)
        return self.projector(patches), None if delta is None else self.delta_projector(delta)

    def enhance_pairs(self, patches: Tensor, delta: Tensor | None, first: Tensor) -> Tensor:
        """Return the enhanced patches of all images, computed from their patches and the delta tokens of their pairs.

        The result is 0 for images that belong to no pair. `first` holds the index of the before image of each pair;
        the after image has the next index.
        """
        if delta is None:
            return torch.zeros_like(patches)
        both = torch.stack([first, first + 1], 1).flatten()  # the indices of both images of each pair
        return torch.zeros_like(patches).index_copy(
            0, both, self.enhance(patches[both], delta.repeat_interleave(2, 0)))

    def pool(self, patches: Tensor) -> Tensor:
        """Average each square of `patch_pool` x `patch_pool` patches of an image into one patch."""
        if self.config.patch_pool == 1:
            return patches
        side, square = self.config.patches_per_side, self.config.patch_pool
        grid = patches.unflatten(1, (side // square, square, side // square, square))
        return grid.mean((2, 4)).flatten(1, 2)

    def check_placeholders(self, input_ids: Tensor, image_counts: Tensor) -> None:
        """Raise ValueError if a row of the batch has more or fewer placeholders than its number of images needs."""
        counts = torch.stack([(input_ids == self.config.image_token_id).sum(1),
                              (input_ids == self.config.delta_token_id).sum(1)], 1)  # (B, 2)
        num_patch_sets = image_counts.clamp(max=1) if self.config.reading == "C" else image_counts
        expected = torch.stack([num_patch_sets * self.config.tokens_per_image,
                                (image_counts == 2) * self.config.delta_tokens_read], 1)
        wrong_rows = (counts != expected).any(1).nonzero().flatten().tolist()
        if wrong_rows:
            row = wrong_rows[0]
            (num_image, num_delta), (need_image, need_delta) = counts[row].tolist(), expected[row].tolist()
            raise ValueError(f"row {row} of the batch has {int(image_counts[row])} images, so its prompt needs "
                             f"{need_image} image placeholders and {need_delta} delta placeholders, got {num_image} "
                             f"and {num_delta}; build prompts with OneDiffProcessor, and do not truncate them")

    def part_of(self, name: str) -> str:
        """Return the part of the model, one of `PARTS`, whose learning rate applies to the parameter `name`."""
        module = name.split(".")[0]
        return {"vision": "vision", "language": "language", "delta": "delta",
                "enhance": "delta"}.get(module, "projector")
