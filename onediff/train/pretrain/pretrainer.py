"""The vision tower and the language model during pretraining, with the heads that only pretraining needs.

Shapes:  B images, N patches per image, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from onediff.train.pretrain.examples import ATTRIBUTES, IMAGE_PX, PATCH_PX, SIDE, UNKNOWN
from onediff.train.pretrain.store import Examples

WIDTH, LAYERS, HEADS = 128, 4, 4
CLIP_MEAN, CLIP_STD = (torch.tensor(values).view(3, 1, 1) for values in (
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
# the number of outputs of a head for each kind of label: attributes, presence of an object, offsets, and light
OUTPUTS = [*(len(options) for options in ATTRIBUTES.values()), 1, 2, 5]


@dataclass(frozen=True)
class Batch:
    """Some examples as tensors.

    `images` (B, 3, height, width) are normalized, `tokens` are the captions of the images with the indices `captioned`,
    and the other fields are those of class Example.
    """

    images: Tensor
    attributes: Tensor
    present: Tensor
    offsets: Tensor
    light: Tensor
    captioned: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, examples: Examples, rows: NDArray[np.int64], tokenizer: PreTrainedTokenizerFast, *,
           captions: int) -> "Batch":
        """Make a batch of the examples with the given indices; at most `captions` of them get caption tokens."""
        captioned = [i for i, row in enumerate(rows) if examples.caption[row]][:captions]
        tokens = tokenizer([f"<s>{examples.caption[rows[i]]}</s>" for i in captioned], padding=True,
                           return_tensors="pt", add_special_tokens=False)["input_ids"]
        attributes, present, offsets, light = (torch.from_numpy(values[rows]) for values in (
            examples.attributes, examples.present, examples.offsets, examples.light))
        return cls(normalized(examples.image[rows]), attributes.long(), present.float(), offsets.float(), light.float(),
                   torch.tensor(captioned), tokens)


def normalized(images: NDArray[np.uint8]) -> Tensor:
    """Return images (B, height, width, 3) as a tensor (B, 3, height, width), normalized as CLIP's processor does."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - CLIP_MEAN) / CLIP_STD


class Pretrainer(nn.Module):
    """The tower and the language model; the heads and the projector are discarded after pretraining."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            image_size=IMAGE_PX, patch_size=PATCH_PX))
        self.language = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
            num_attention_heads=HEADS, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=True))
        self.heads = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(OUTPUTS)))
                                    for _ in (LAYERS // 2, LAYERS)])
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return two losses: one for the labels of all patches, and one for the captions."""
        middle, last = self.features(batch.images)
        dense = 0.3 * dense_loss(self.heads[0](middle), batch) + dense_loss(self.heads[1](last), batch)
        return dense, self.caption_loss(last[batch.captioned], batch.tokens)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patches (B, N, C) after the middle layer and after the last layer of the tower."""
        states = self.tower(images, output_hidden_states=True).hidden_states
        return states[LAYERS // 2][:, 1:], states[LAYERS][:, 1:]

    def caption_loss(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Return the loss of captions, `tokens` (B, T), that follow the pooled patches of their images."""
        seen = self.projector(pooled(patches))
        embedded = torch.cat([seen, self.language.get_input_embeddings()(tokens)], 1)
        labels = functional.pad(tokens.masked_fill(tokens == 0, UNKNOWN), (seen.shape[1], 0), value=UNKNOWN)
        mask = functional.pad((tokens != 0).long(), (seen.shape[1], 0), value=1)
        loss: Tensor = self.language(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss
        return loss


def pooled(patches: Tensor) -> Tensor:
    """Average squares of 2 x 2 patches: (B, N, C) becomes (B, N / 4, C)."""
    grid = patches.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)


def dense_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the loss of the labels of all patches, given the outputs (B, N, sum of OUTPUTS) of a head."""
    *attributes, present, offsets, light = outputs.split(OUTPUTS, dim=-1)
    loss = functional.binary_cross_entropy_with_logits(present.squeeze(-1), batch.present)
    for k, logits in enumerate(attributes):
        loss = loss + functional.cross_entropy(logits.flatten(0, 1), batch.attributes[..., k].flatten())
    known = ~batch.offsets.isnan()
    loss = loss + 0.2 * functional.smooth_l1_loss(offsets[known], batch.offsets[known])
    return loss + 4.0 * functional.smooth_l1_loss(light, batch.light)


@torch.no_grad()
def attribute_accuracy(model: Pretrainer, examples: Examples, *, batch_size: int = 100) -> dict[str, float]:
    """Return the accuracy per attribute on patches that show an object, from the last layer of the tower."""
    right: dict[str, list[Tensor]] = {name: [] for name in ATTRIBUTES}
    for start in range(0, len(examples), batch_size):
        rows = slice(start, start + batch_size)
        outputs = model.heads[1](model.features(normalized(examples.image[rows]))[1]).split(OUTPUTS, dim=-1)
        truth = torch.from_numpy(examples.attributes[rows])
        for k, name in enumerate(ATTRIBUTES):
            known = truth[..., k] != UNKNOWN
            right[name].append(outputs[k].argmax(-1)[known] == truth[..., k][known])
    return {f"{name}_accuracy": round(torch.cat(each).float().mean().item(), 4) for name, each in right.items()}
