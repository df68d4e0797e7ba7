"""`make backbones`: pretrains the tiny vision tower and language model that `presets/tiny.yaml` starts from.

These backbones replace the CLIP and Vicuna of the paper. They are trained on single images, never on pairs: the tower
predicts what each patch shows, and the language model lists the objects from left to right. Then the language model
learns from chats (`dialogue.py`). Only the vision tower, the language model and the tokenizer are saved.

An interrupted run continues where it stopped. The learning rate rises, stays constant, and falls to zero over the last
third of the steps. A run with more steps therefore continues from the state before the fall.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from onediff.config import load_params, load_runtime
from onediff.data.synthesis.edits.operations import TURNS
from onediff.data.synthesis.edits.pictures import PLACES
from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, INSTRUCTIONS, SCENE_TEMPLATES, SYNONYMS
from onediff.data.synthesis.render import COLORS
from onediff.files import write_json
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.train.pretrain import dialogue as chat
from onediff.train.pretrain.examples import IMAGE_PX, make_example, make_plain_example
from onediff.train.pretrain.pretrainer import Batch, Pretrainer, attribute_accuracy
from onediff.train.pretrain.store import Examples, draw_shards, read_shards

FOLDER, WORK = Path("presets/backbones/tiny"), Path(".onediff/backbones")
NUM_IMAGES, NUM_CHECK, CHAT_IMAGES = 80_000, 1000, 8000
FIRST_CHECK = 1_000_000  # the seed of the first held-out image
BATCH, CAPTIONED, LEARNING_RATE, WARMUP, FALL = 64, 16, 1.5e-3, 300, 1 / 3
SAVE_EVERY = 250


@dataclass
class Run:
    """A training of `steps` steps, of which `step` were made in `seconds`."""

    model: Pretrainer
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps,
                 "step": self.step, "seconds": self.seconds}
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def resume(self, work: Path) -> None:
        """Load the newest state in `work` that this run passes through, if there is one.

        A state of a run with another number of steps fits only if the learning rate has not begun to fall in either.
        """
        states = [torch.load(path, weights_only=True) for path in work.glob("*.pt")]
        fitting = [state for state in states if state["steps"] == self.steps
                   or state["step"] <= min(fall_start(state["steps"]), fall_start(self.steps))]
        if fitting:
            state = max(fitting, key=lambda state: state["step"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]


def main(steps: Annotated[int, typer.Option(help="Number of training steps of the vision tower.")] = 10_000,
         chat_steps: Annotated[int, typer.Option(help="Number of steps of the training on chats.")] = 7500,
         images: Annotated[int, typer.Option(help="Number of images, a multiple of 1,000.")] = NUM_IMAGES,
         folder: Annotated[Path, typer.Option(help="The folder of the trained models.")] = FOLDER,
         work: Annotated[Path, typer.Option(help="The folder of images and states; remove it to start again.")] = WORK,
         ) -> None:
    """Pretrain both backbones from random weights, or continue an interrupted run."""
    seed = load_params().seed
    draw_shards(work, images, workers=load_runtime().num_workers)
    examples = read_shards(work, images)
    if not (work / "tokenizer").exists():
        train_tokenizer([str(text) for text in examples.caption if text]).save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    torch.manual_seed(seed)
    model = Pretrainer(len(tokenizer))
    run = Run(model, torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98)), steps)
    run.resume(work)
    train(run, examples, tokenizer, seed=seed, work=work)
    figures = measure(model) | {"minutes": round(run.seconds / 60, 1), "steps": steps, "images": images}
    print(json.dumps(figures, indent=1), flush=True)
    named = np.flatnonzero(examples.caption != "")[:CHAT_IMAGES]
    started = time.monotonic()
    figures |= chat.teach(model.tower, model.language, tokenizer, images=examples.image[named],
                          captions=[str(text) for text in examples.caption[named]], seed=seed, steps=chat_steps)
    figures |= {"chat_minutes": round((time.monotonic() - started) / 60, 1), "chat_steps": chat_steps}
    save(model, tokenizer, figures, folder)
    print(json.dumps(figures, indent=1))


def train(run: Run, examples: Examples, tokenizer: PreTrainedTokenizerFast, *, seed: int, work: Path) -> None:
    """Make the remaining steps, and save the state in `work` now and then, and before the learning rate falls.

    The batch of a step depends only on the seed and the number of the step, so a resumed run equals an uninterrupted
    one.
    """
    started, before = time.monotonic(), run.seconds
    progress = tqdm(range(run.step, run.steps), desc="pretrain", unit="step", initial=run.step, total=run.steps)
    for step in progress:
        if step == fall_start(run.steps):
            run.save(work / "steady.pt")
        for group in run.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate_factor(step, run.steps)
        rows = np.random.default_rng([seed, step]).integers(len(examples), size=BATCH)
        dense, spoken = run.model(Batch.of(examples, rows, tokenizer, captions=CAPTIONED))
        run.optimizer.zero_grad(set_to_none=True)
        (dense + spoken).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.step, run.seconds = step + 1, before + time.monotonic() - started
        progress.set_postfix(dense=f"{dense.item():.3f}", caption=f"{spoken.item():.3f}", refresh=False)
        if run.step % SAVE_EVERY == 0 or run.step == run.steps:
            run.save(work / "latest.pt")


def fall_start(steps: int) -> int:
    """Return the number of steps before the learning rate begins to fall."""
    return steps - round(FALL * steps)


def rate_factor(step: int, steps: int) -> float:
    """Return the factor on the learning rate in a step: it rises to 1, stays, and falls linearly towards 0."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / max(1, steps - fall_start(steps)))


def measure(model: Pretrainer) -> dict[str, float]:
    """Return the accuracies on held-out images: plain table tops, and images drawn like those of the training."""
    model.eval()
    seeds = range(FIRST_CHECK, FIRST_CHECK + NUM_CHECK)
    plain, mixed = (Examples.of([draw(seed) for seed in seeds]) for draw in (make_plain_example, make_example))
    return attribute_accuracy(model, plain) | {
        f"mixed_{name}": value for name, value in attribute_accuracy(model, mixed).items()}


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
    words += [*PLACES, *TURNS, *DIRECTIONS.values()]
    text = captions[:5000] + 50 * [s.format(old="red cube", new="blue") for s in sentences] + 50 * words
    text += 50 * [DEFAULT_INSTRUCTION, "USER: ASSISTANT: First image: Second image: Describe the images in order. "
                  "left of right of in front of behind the"]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save(model: Pretrainer, tokenizer: PreTrainedTokenizerFast, figures: dict[str, float], folder: Path) -> None:
    from transformers import CLIPImageProcessorPil

    model.tower.save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"height": IMAGE_PX, "width": IMAGE_PX},
                          do_center_crop=False).save_pretrained(folder / "vision")
    model.language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    write_json(folder / "figures.json", figures, indent=1)


if __name__ == "__main__":
    typer.run(main)
