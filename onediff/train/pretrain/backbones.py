"""`make backbones`: pretrains the tiny vision tower and language model that `presets/tiny.yaml` starts from.

These backbones replace the CLIP and Vicuna of the paper. They are trained on single images, never on pairs: rendered
table tops, from seeds that no data set uses, and crops of the training photographs. Each patch has labels (attributes
and centre of the object, brightness, contrast, sharpness), and captions list the objects from left to right. Only the
vision tower, the language model and the tokenizer are saved; the heads and the projector are discarded.
"""

import functools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from onediff.config import load_params, load_runtime
from onediff.data.synthesis.edits.photographs import photo_paths
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, INSTRUCTIONS, SCENE_TEMPLATES, SYNONYMS
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES, Thing, render, visible
from onediff.data.synthesis.scenes.captions import name_objects
from onediff.data.synthesis.scenes.drawing import draw_things, draw_view
from onediff.inputs.images import open_image
from onediff.train.pretrain import dialogue as chat

FOLDER = Path("presets/backbones/tiny")
IMAGE_PX, PATCH_PX, WIDTH, LAYERS, HEADS = 96, 12, 128, 4, 4
NUM_IMAGES, NUM_CHECK, CHAT_IMAGES = 32000, 1000, 8000
STEPS, BATCH, CAPTIONED, LEARNING_RATE = 4000, 64, 16, 1.5e-3
CLIP_MEAN, CLIP_STD = (torch.tensor(values).view(3, 1, 1) for values in (
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "material": MATERIALS}
UNKNOWN = -100  # the default ignore_index of cross_entropy
_SIDE = IMAGE_PX // PATCH_PX

# the type of a picture: an image, its objects, the object index of each pixel (-1: no object), and the caption
Drawn = tuple[NDArray[np.uint8], list[Thing], NDArray[np.int8], str | None]
# the type of patch labels: the arrays `attributes`, `present` and `offsets` of the class Example
Labels = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Example:
    """A training image with labels for each of the N patches.

    `attributes` (N, 4) are indices into ATTRIBUTES, `present` (N,) is 1 if the patch shows an object and 0 otherwise,
    and `offsets` (N, 2) is the distance from the patch to the centre of the object, in patches.
    """

    image: NDArray[np.uint8]
    attributes: NDArray[np.int64]
    present: NDArray[np.float32]
    offsets: NDArray[np.float32]
    caption: str | None


def make_example(seed: int) -> Example:
    """Draw a training example from the seed: a rendered table top (90 percent) or a crop of a photo (10 percent).

    A third of the images is then changed in brightness, contrast, colour or sharpness, or rotated.
    """
    rng = np.random.default_rng([20240705, seed])
    image, things, ids, caption = _photo_window(rng) if rng.random() < 0.1 else _table_top(rng)
    labels = patch_labels(ids, things)
    if rng.random() < 0.33:
        image, labels = _disturb(rng, image, labels)
        caption = None
    return Example(image, *labels, caption)


def _table_top(rng: Generator) -> Drawn:
    """Render a table top with one to six objects, all of which are large enough to see."""
    while True:
        things = draw_things(rng, int(rng.integers(1, 7)))
        view = draw_view(rng, 1.3)
        if things and visible(things, view).min() > 0.004:
            image, ids = render(things, view, IMAGE_PX)
            return image, things, ids, name_objects(things, view)


@functools.cache
def _train_photos() -> list[Image.Image]:
    """Load the photographs of the train split, at most 480 pixels wide and high."""
    photos = [open_image(path) for path in photo_paths("train", None).values()]
    for photo in photos:
        photo.thumbnail((480, 480))
    return photos


def _photo_window(rng: Generator) -> Drawn:
    """Crop a random square from a random photograph; it has no labelled objects and no caption."""
    photo = _train_photos()[int(rng.integers(len(_train_photos())))]
    side = int(min(photo.size) * rng.uniform(0.3, 1.0))
    left, top = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    window = photo.crop((left, top, left + side, top + side)).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX)
    return np.asarray(window), [], np.full((IMAGE_PX, IMAGE_PX), -1, np.int8), None


def _disturb(rng: Generator, image: NDArray[np.uint8], labels: Labels) -> tuple[NDArray[np.uint8], Labels]:
    """Change brightness, contrast, colour or sharpness, or rotate by a multiple of 90 degrees.

    Labels that the change makes wrong are set to unknown: colours after a colour change, offsets after a rotation.
    """
    picture, (attributes, present, offsets) = Image.fromarray(image), labels
    kind = int(rng.integers(6))
    if kind == 0:
        picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.4, 1.8))
    elif kind == 1:
        picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.3, 1.9))
    elif kind == 2:
        picture = Image.fromarray(np.clip(image * rng.uniform(0.5, 1.4, 3), 0, 255).astype(np.uint8))
    elif kind == 3:
        picture = picture.convert("L").convert("RGB")
    elif kind == 4:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 2.5)))
    else:
        turns = int(rng.integers(1, 4))
        picture = Image.fromarray(np.rot90(image, turns).copy())
        rotated: list[NDArray] = [np.rot90(label.reshape(_SIDE, _SIDE, *label.shape[1:]), turns).reshape(label.shape)
                                  for label in labels]
        attributes, present, offsets = (label.copy() for label in rotated)
        offsets[:] = np.nan
    if kind in (2, 3):
        attributes[:, 1] = UNKNOWN
    return np.asarray(picture), (attributes, present, offsets)


def patch_labels(ids: NDArray[np.int8], things: list[Thing]) -> Labels:
    """Label each of the N patches with the object that covers most of it.

    Returns the arrays attributes (N, 4), present (N,) and offsets (N, 2, in patches) of an `Example`. `ids` (height,
    width) is the index of the object at each pixel, or -1.
    """
    patches = ids.reshape(_SIDE, PATCH_PX, _SIDE, PATCH_PX).transpose(0, 2, 1, 3).reshape(_SIDE * _SIDE, -1)
    attributes = np.full((len(patches), 4), UNKNOWN, np.int64)
    present = np.zeros(len(patches), np.float32)
    offsets = np.full((len(patches), 2), np.nan, np.float32)
    if not things:
        return attributes, present, offsets
    share = np.stack([(patches == k).mean(axis=1) for k in range(len(things))], axis=1)
    best = share.argmax(axis=1)
    rows, columns = np.divmod(np.arange(len(patches)), _SIDE)
    for k, thing in enumerate(things):
        shows = (best == k) & (share[:, k] > 0.12)
        y, x = (axis.mean() / PATCH_PX for axis in np.nonzero(ids == k)) if (ids == k).any() else (0.0, 0.0)
        present[shows] = 1.0
        attributes[shows] = [options.index(getattr(thing, name)) for name, options in ATTRIBUTES.items()]
        offsets[shows] = np.stack([x - columns[shows] - 0.5, y - rows[shows] - 0.5], axis=1)
    return attributes, present, offsets


def photometry(images: Tensor) -> Tensor:
    """Return simple colour statistics of each patch, as targets for pretraining.

    `images` (B, 3, height, width) have values from 0 to 1. Returns (B, N patches, 5): mean red, green and blue,
    contrast, and sharpness.
    """
    grey = images.mean(1, keepdim=True)
    edges = functional.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1))
    grey_mean, grey_square, edge_mean, color_mean = (functional.avg_pool2d(values, PATCH_PX)
                                                     for values in (grey, grey**2, edges, images))
    spread = (grey_square - grey_mean**2).clamp_min(1e-6).sqrt()
    return torch.cat([color_mean, 4 * spread, 10 * edge_mean], 1).flatten(2).transpose(1, 2)


def train_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions and on all words of the project's caption templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\u2581", " ")])
    sentences = [s for table in (SCENE_TEMPLATES, EDIT_TEMPLATES, INSTRUCTIONS)
                 for options in table.values() for s in options]
    words = [w for options in SYNONYMS.values() for w in options] + [w + end for w in COLORS for end in ("", ",", ".")]
    text = captions[:5000] + 50 * [s.format(old="red cube", new="blue") for s in sentences] + 50 * words
    text += 50 * ["USER: ASSISTANT: First image: Second image: Describe the images in order. "
                  "left of right of in front of behind the"]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class Pretrainer(nn.Module):
    """The vision tower and the language model, with the heads and the projector that only pretraining needs."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            image_size=IMAGE_PX, patch_size=PATCH_PX))
        self.language = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
            num_attention_heads=HEADS, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=True))
        outputs = sum(len(options) for options in ATTRIBUTES.values()) + 1 + 2 + 5
        self.heads = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs))
                                    for _ in (LAYERS // 2, LAYERS)])
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def dense_loss(self, hidden: Tensor, batch: dict[str, Tensor], head: nn.Module) -> Tensor:
        """Return the loss of predicting patch labels from hidden states, `hidden` (B images, N patches, C channels)."""
        sizes = [*(len(options) for options in ATTRIBUTES.values()), 1, 2, 5]
        *attributes, present, offsets, light = head(hidden).split(sizes, dim=-1)
        loss = functional.binary_cross_entropy_with_logits(present.squeeze(-1), batch["present"])
        for k, logits in enumerate(attributes):
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), batch["attributes"][..., k].flatten())
        known = ~batch["offsets"].isnan()
        loss = loss + 0.2 * functional.smooth_l1_loss(offsets[known], batch["offsets"][known])
        return loss + 4.0 * functional.smooth_l1_loss(light, photometry(batch["images"]))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return two losses: one for the labels of all patches, and one for the captions."""
        states = self.tower((batch["images"] - CLIP_MEAN) / CLIP_STD, output_hidden_states=True).hidden_states
        middle, last = (states[level][:, 1:] for level in (LAYERS // 2, LAYERS))
        dense = 0.3 * self.dense_loss(middle, batch, self.heads[0]) + self.dense_loss(last, batch, self.heads[1])
        grid = last[batch["captioned"]].transpose(1, 2).unflatten(2, (_SIDE, _SIDE))
        seen = self.projector(functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2))
        embedded = torch.cat([seen, self.language.get_input_embeddings()(batch["tokens"])], 1)
        labels = functional.pad(batch["tokens"].masked_fill(batch["tokens"] == 0, UNKNOWN), (seen.shape[1], 0),
                                value=UNKNOWN)
        mask = functional.pad((batch["tokens"] != 0).long(), (seen.shape[1], 0), value=1)
        return dense, self.language(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerFast, captioned: int) -> dict[str, Tensor]:
    """Make a batch of all examples; at most `captioned` of them get caption tokens."""
    rows = [i for i, example in enumerate(examples) if example.caption][:captioned]
    tokens = tokenizer([f"<s>{examples[i].caption}</s>" for i in rows], padding=True, return_tensors="pt",
                       add_special_tokens=False)
    return {
        "images": torch.from_numpy(np.stack([e.image for e in examples])).permute(0, 3, 1, 2).float() / 255,
        "attributes": torch.from_numpy(np.stack([e.attributes for e in examples])),
        "present": torch.from_numpy(np.stack([e.present for e in examples])),
        "offsets": torch.from_numpy(np.stack([e.offsets for e in examples])),
        "captioned": torch.tensor(rows), "tokens": tokens["input_ids"]}


def measure(model: Pretrainer, examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the accuracy per attribute on held-out patches that show an object, and the caption loss per token."""
    right = {name: [0, 0] for name in ATTRIBUTES}
    losses = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), BATCH):
            batch = collate(examples[start : start + BATCH], tokenizer, BATCH)
            losses.append(model(batch)[1].item())
            last = model.tower((batch["images"] - CLIP_MEAN) / CLIP_STD).last_hidden_state[:, 1:]
            guesses = model.heads[1](last).split([*(len(o) for o in ATTRIBUTES.values()), 8], dim=-1)
            for k, name in enumerate(ATTRIBUTES):
                known = batch["attributes"][..., k] != UNKNOWN
                right[name][0] += int((guesses[k].argmax(-1)[known] == batch["attributes"][..., k][known]).sum())
                right[name][1] += int(known.sum())
    return {f"{name}_accuracy": round(good / total, 4) for name, (good, total) in right.items()} | {
        "caption_loss_per_token": round(float(np.mean(losses)), 4)}


def main() -> None:
    """Pretrain both backbones from random weights and save them in presets/backbones/tiny."""
    started = time.time()
    torch.manual_seed(load_params().seed)
    with ProcessPoolExecutor(load_runtime().num_workers) as pool:
        numbers = range(NUM_IMAGES + NUM_CHECK)
        examples = list(tqdm(pool.map(make_example, numbers, chunksize=64), total=len(numbers), desc="images",
                             unit="image"))
    train, check = examples[:NUM_IMAGES], examples[NUM_IMAGES:]
    tokenizer = train_tokenizer([e.caption for e in train if e.caption])
    model = Pretrainer(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    order = np.random.default_rng(load_params().seed)
    progress = tqdm(range(STEPS), desc="pretrain", unit="step")
    for _ in progress:
        batch = collate([train[i] for i in order.integers(NUM_IMAGES, size=BATCH)], tokenizer, CAPTIONED)
        dense, spoken = model(batch)
        optimizer.zero_grad(set_to_none=True)
        (dense + spoken).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(dense=f"{dense.item():.3f}", caption=f"{spoken.item():.3f}")
    named = [e for e in train[:CHAT_IMAGES] if e.caption]
    pixels = torch.from_numpy(np.stack([e.image for e in named])).permute(0, 3, 1, 2).float() / 255
    figures = measure(model, check, tokenizer) | chat.teach(
        model.tower, model.language, tokenizer, pixels=(pixels - CLIP_MEAN) / CLIP_STD,
        captions=[str(e.caption) for e in named], seed=load_params().seed) | {
        "minutes": round((time.time() - started) / 60, 1), "steps": STEPS, "images": NUM_IMAGES}
    save(model, tokenizer, figures)
    print(json.dumps(figures, indent=1))


def save(model: Pretrainer, tokenizer: PreTrainedTokenizerFast, figures: dict[str, float]) -> None:
    from transformers import CLIPImageProcessorPil

    model.tower.save_pretrained(FOLDER / "vision")
    CLIPImageProcessorPil(size={"height": IMAGE_PX, "width": IMAGE_PX},
                          do_center_crop=False).save_pretrained(FOLDER / "vision")
    model.language.save_pretrained(FOLDER / "language")
    tokenizer.save_pretrained(FOLDER / "language")
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
