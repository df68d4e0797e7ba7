"""OneDiff: a before image and an after image go in, and a caption of the difference comes out. Read this file first.

1. `SiameseEncoder` (siamese.py) encodes every image with the same vision tower.
2. `VisualDeltaModule` (delta.py) turns the two encoded images of a pair into K delta tokens. If the model has the
   module `Fusion` (fusion.py), it first compares the pixels of both images place by place, and the delta tokens read
   the result.
3. Projectors map patch tokens and delta tokens to the embedding width of the language model.
4. `embed` inserts the projected tokens at the placeholders of the prompt, and the language model continues the text.

Shapes:  B rows of the batch, M images of the batch (each row has 0, 1 or 2), P rows that have two images (pairs),
         L levels of the vision tower, N patches per image, C width of the vision tower, W width of the delta module,
         T patch tokens per image and K delta tokens per pair that the language model reads, D width of the language
         model, S length of the token sequence, F channels of the joined map of Fusion, G places along one side of it,
         A attributes that Fusion reads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from onediff.inputs.processing import IGNORED
from onediff.model.changed_object import AttributeTokens, changed_loss, object_loss, place_loss
from onediff.model.configuration import OneDiffConfig
from onediff.model.delta import Enhance, VisualDeltaModule
from onediff.model.exactness import row_logits
from onediff.model.fusion import Fused, Fusion
from onediff.model.packing import packed_logits, use_packing
from onediff.model.siamese import SiameseEncoder

PARTS = ("vision", "delta", "projector", "language")


@dataclass
class OneDiffOutput(CausalLMOutput):
    """The output of the model: the loss or the logits, and the auxiliary losses of Fusion if their targets are given.

    `place`: whether Fusion points at the changed places. `changed`: whether it sees that something changed. `object`:
    whether it names the attributes of the changed object. Each is a sum over pairs, divided by the number of rows.
    """

    place: Tensor | None = None
    changed: Tensor | None = None
    object: Tensor | None = None


class Projector(nn.Sequential):
    """A two-layer perceptron, as in LLaVA-1.5, that maps visual tokens to the width of the language model."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


class OneDiffForConditionalGeneration(PreTrainedModel):
    """The complete OneDiff model: vision tower, Visual Delta Module, projectors and language model.

    `config.reading` chooses the token layout, which is the order and the content of the visual tokens in the prompt:
    A: [before patches][after patches][delta tokens]. Each patch token is one projected patch.
    B: [before patches][after patches]. Each patch is concatenated with its enhanced version along the channel axis.
    C: [patches][delta tokens]. The before and the after patch of each position, and the joined map of Fusion if the
    model has it, are concatenated along the channel axis.
    In A and C, the tokens of Fusion follow the delta tokens and count as delta tokens.
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
        self.fusion = Fusion(config) if config.delta_fusion else None
        self.language = pretrained or AutoModelForCausalLM.from_config(config.text_config)
        self.row_logits = row_logits(config.text_config)
        if self.row_logits is packed_logits:
            use_packing(self.language)
        if config.delta_fusion:
            self.attribute_tokens = AttributeTokens(config.delta_classes, language_width)
        fused_width = config.delta_fusion["width"] if config.delta_fusion else 0
        self.projector = Projector({"A": tower_width, "B": 2 * tower_width,
                                    "C": 2 * tower_width + fused_width}[config.reading], language_width)
        if config.reading == "B":
            self.enhance = Enhance(tower_width, delta_width, config.delta_heads)
        elif self.delta is not None:
            self.delta_projector = nn.Sequential(nn.LayerNorm(delta_width),
                                                 Projector(delta_width, language_width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, so that all layers keep PyTorch's initialization, whose scale depends on the layer width."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                states: Tensor | None = None, labels: Tensor | None = None, total_weight: Tensor | None = None,
                row_weights: Tensor | None = None, patch_mask: Tensor | None = None,
                place_targets: Tensor | None = None, changed_targets: Tensor | None = None,
                object_targets: Tensor | None = None, num_rows: Tensor | None = None) -> OneDiffOutput:
        """Return the loss if `labels` are given, and otherwise the logits (B, S, vocabulary).

        input_ids, attention_mask and labels are (B rows, S tokens), and image_counts is (B,).
        The images are given as pixels `images` (M, 3, height, width), or as hidden states `states` (M images,
        L levels, N patches, C channels) that the vision tower computed earlier. A model with Fusion needs `images` of
        all pairs in any case.
        patch_mask (B,) is True for each row whose patch tokens the language model must not attend to.
        place_targets (P, 2 images, G * G), changed_targets (P,) and object_targets (P, A) are the targets of the
        auxiliary losses, which the functions of changed_object.py explain. They are given together or not at all.

        The loss is the weighted mean over answer tokens: their weighted sum, divided by `total_weight`, or by the sum
        of the weights in this batch if it is None. row_weights (B,) are the weights of the answer tokens of each row;
        None: every weight is 1. If all ranks and micro-batches of a training step pass the total weight of the step,
        their losses add up to the exact mean. At least one row must have an answer token, and no answer token may
        directly follow a masked placeholder. The auxiliary losses are divided by `num_rows` in the same way.
        """
        embeds, fused = self.embed(input_ids, image_counts, images=images, states=states)
        if patch_mask is not None:
            attention_mask = attention_mask * ~(patch_mask[:, None] & (input_ids == self.config.image_token_id))
        if labels is None:
            return OneDiffOutput(logits=self.language(inputs_embeds=embeds, attention_mask=attention_mask).logits)
        is_kept = attention_mask.bool()  # False for padding and for masked patch tokens
        # One target per kept token: the id of the next token, or IGNORED if the next token is not part of an answer.
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)[is_kept]
        is_answer = (targets != IGNORED).nonzero().flatten()  # only these tokens need logits
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits = self.row_logits(self.language, embeds[is_kept], positions[is_kept], is_kept.sum(1).tolist(), is_answer)
        if row_weights is None:
            total = functional.cross_entropy(logits.float(), targets[is_answer], reduction="sum")
            in_batch: Tensor | int = len(is_answer)
        else:
            weights = row_weights[:, None].expand_as(input_ids)[is_kept][is_answer]
            total = functional.cross_entropy(logits.float(), targets[is_answer], reduction="none") @ weights
            in_batch = weights.sum()
        output = OneDiffOutput(loss=total / (in_batch if total_weight is None else total_weight))
        if place_targets is not None and changed_targets is not None and object_targets is not None:
            assert fused is not None, "targets of the auxiliary losses need a model with Fusion"
            rows, pairs = len(input_ids) if num_rows is None else num_rows, len(changed_targets)
            # `fused` may contain a blank pair at the end, which has no targets.
            assert pairs == int((image_counts == 2).sum()), "the auxiliary losses need targets of every pair"
            output.place = place_loss(fused.places[:pairs].flatten(2), place_targets) / rows
            output.changed = changed_loss(fused.changed[:pairs], changed_targets) / rows
            output.object = object_loss([scores[:pairs] for scores in fused.attributes], object_targets) / rows
        return output

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, image_counts: Tensor, images: Tensor | None = None,
                 states: Tensor | None = None, **options: Any) -> Tensor:
        """Return the token ids of the answers, without the prompts.

        The inputs are those of `forward`, but prompts must be padded on the left. `options` are passed to the
        `generate` method of the language model.
        """
        embeds, _ = self.embed(input_ids, image_counts, images=images, states=states)
        # Under ZeRO level 3 a forward pass needs all ranks, so each rank generates until the last rank has finished.
        is_sharded = hasattr(next(self.parameters()), "ds_id")
        return self.language.generate(inputs_embeds=embeds, attention_mask=attention_mask, synced_gpus=is_sharded,
                                      **options)

    def embed(self, input_ids: Tensor, image_counts: Tensor, *, images: Tensor | None = None,
              states: Tensor | None = None) -> tuple[Tensor, Fused | None]:
        """Return input embeddings (rows, tokens, width), with visual tokens inserted at the placeholders of the prompt.

        The second value is the output of Fusion, or None if there is no pair or the model has no Fusion. Raises
        ValueError if a row has more or fewer placeholders than its images need.
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
            return embeds, None
        states = states.to(embeds.dtype)
        fused = self.fuse(images, states, image_counts)
        patches, delta = self.project_visual_tokens(states, image_counts, fused)
        embeds = embeds.masked_scatter(is_image[..., None], patches.to(embeds.dtype))
        if delta is not None:
            embeds = embeds.masked_scatter(is_delta[..., None], delta.to(embeds.dtype))
        return embeds, fused

    def fuse(self, images: Tensor | None, states: Tensor, image_counts: Tensor) -> Fused | None:
        """Return the output of Fusion for all pairs, or None if there is no pair or the model has no Fusion.

        Raises ValueError if the pixels are missing.
        """
        first = first_images(image_counts)
        if self.fusion is None or not len(first):
            return None
        if images is None:
            raise ValueError("a model with model.delta.fusion compares pixels, so it needs `images` besides `states`, "
                             "got none; pass the images of all rows")
        pixels = images.to(states.dtype)
        return self.fusion(torch.stack([pixels[first], pixels[first + 1]], 1), states[first], states[first + 1])

    def with_blank_pair(self, images: Tensor | None, states: Tensor | None,
                        image_counts: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Append a pair of zero images to a batch without pairs, so that every module takes part in the training step.

        No placeholder receives the tokens of this pair, so the parameters that only pairs use get a gradient of 0.
        Without this pair, the other ranks would wait forever under ZeRO level 3 for a rank that skips the delta
        module, and the optimizer would treat a missing gradient differently from a gradient of 0.
        """
        counts = functional.pad(image_counts, (0, 1), value=2)
        if states is not None:
            states = functional.pad(states, (0, 0) * 3 + (0, 2))
        elif images is None:
            side = self.config.vision_config.image_size
            images = next(self.projector.parameters()).new_zeros(0, 3, side, side)
        return None if images is None else functional.pad(images, (0, 0) * 3 + (0, 2)), states, counts

    def project_visual_tokens(self, states: Tensor, image_counts: Tensor,
                              fused: Fused | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the patch tokens and the delta tokens for the language model, from hidden states of the vision tower.

        `fused` is the output of Fusion, or None for a model without it or a batch without pairs.

        Patch tokens are (images, tokens, width), or (rows with images, tokens, width) in token layout C. Delta tokens
        are (pairs, tokens, width), or None if there is no pair, if the model has no delta module, and in token
        layout B, where the delta tokens only change the patches.
        """
        patches = states[:, self.config.read_levels.index(self.config.patch_state)]  # (M, N, C)
        first = first_images(image_counts)
        delta = (self.delta(states[first], states[first + 1], fused and fused.keys)  # (P, K, W)
                 if self.delta is not None and len(first) else None)
        if self.config.reading == "B":
            return self.projector(torch.cat([patches, self.enhance_pairs(patches, delta, first)], -1)), None
        patches = self.pool(patches)
        if self.config.reading == "C":
            patches = self.join(patches, image_counts, fused)
        return self.projector(patches), None if delta is None else self.project_delta(delta, fused)

    def project_delta(self, delta: Tensor, fused: Fused | None) -> Tensor:
        """Return the delta tokens for the language model, with those of Fusion and of the attributes after them."""
        if fused is None:
            return self.delta_projector(delta)
        words = self.attribute_tokens(fused.attributes, self.language.get_input_embeddings())
        return torch.cat([self.delta_projector(torch.cat([delta, fused.tokens], 1)), words.to(delta.dtype)], 1)

    def join(self, patches: Tensor, image_counts: Tensor, fused: Fused | None) -> Tensor:
        """Return the channels of token layout C, (rows with images, T, channels), from the patches of all images.

        A row with a single image joins this image with itself, and has zeros instead of the map of Fusion.
        """
        with_images = image_counts[image_counts > 0]
        starts = with_images.cumsum(0) - with_images
        parts = [patches[starts], patches[starts + with_images - 1]]
        if self.config.delta_fusion:
            joined = patches.new_zeros(*parts[0].shape[:2], self.config.delta_fusion["width"])
            if fused is not None:
                joined = joined.index_copy(0, (with_images == 2).nonzero()[:, 0], self.pool(fused.patches))
            parts.append(joined)
        return torch.cat(parts, -1)

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
                "enhance": "delta", "fusion": "delta"}.get(module, "projector")


def first_images(image_counts: Tensor) -> Tensor:
    """Return the index, among all images of a batch, of the before image of each pair (P,); the after image follows."""
    return (image_counts.cumsum(0) - image_counts)[image_counts == 2]
