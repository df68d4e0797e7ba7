"""The second half of `make backbones`: trains the tiny language model on chats, as Vicuna was before LLaVA used it.

One part of the training is text only: an instruction, and as answer a sentence about invented objects from the caption
templates. The other part is single images with captions, so that the model learns to read patch tokens; the projector
for them is discarded. The training contains no image pairs.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

from onediff.data.synthesis.edits.operations import CASTS, TURNS
from onediff.data.synthesis.edits.pictures import PLACES
from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, INSTRUCTIONS, SCENE_TEMPLATES, pick, say
from onediff.inputs.attributes import CLASSES, COLORS, MATERIALS, OF_THE_OBJECT, result_of, words_of
from onediff.inputs.processing import IGNORED
from onediff.inputs.prompt import (
    DEFAULT_INSTRUCTION,
    DELTA_MARK,
    IMAGE_MARK,
    Prompt,
    coupled_prompt,
    single_prompt,
    text_prompt,
)
from onediff.train.pretrain.pretrainer import normalized, pooled

ROWS, IMAGES, RATE = 48, 8, 1e-3
COUPLED, STATED = 0.2, 0.85  # share of texts with two captions; share of the other texts that state the attributes
_NEW = {"color_cast": tuple(CASTS), "remove_cast": tuple(CASTS), "rotate": tuple(TURNS)}


def sentence(rng: Generator) -> tuple[str, str]:
    """Return a question and a random change caption as answer; no image belongs to them.

    Half of the questions are the default question, and the others are instructions of the source of the caption. Most
    questions follow the attributes of the change, as words in the order in which AttributeTokens puts them before the
    question about a pair. So the language model learns to write a sentence from words.
    """
    source, attributes, caption = _change_caption(rng)
    question = DEFAULT_INSTRUCTION if rng.random() < 0.5 else pick(rng, INSTRUCTIONS[source])
    words = [words_of(attributes[name]) for name in sorted(CLASSES) if attributes.get(name)]
    return f"{' '.join(words)}\n{question}" if rng.random() < STATED else question, caption


def _change_caption(rng: Generator) -> tuple[str, dict[str, str], str]:
    """Return the name of a source, the attributes of a random change, and a caption in the words of this source."""
    if rng.random() < 0.6:
        kind = pick(rng, tuple(SCENE_TEMPLATES))
        thing = {} if kind == "none" else _draw_thing(rng)
        result = pick(rng, {"color": COLORS, "texture": MATERIALS, "move": tuple(DIRECTIONS)}.get(kind, ("",)))
        words = {"old": thing and noun(rng, thing), "new": DIRECTIONS.get(result) or say(rng, result)}
        return ("scenes", {"change_type": kind, "result": result, **thing},
                pick(rng, SCENE_TEMPLATES[kind]).format(**words))
    kind = pick(rng, tuple(EDIT_TEMPLATES))
    template = pick(rng, EDIT_TEMPLATES[kind])
    # A sentence about a removed object never names it. The object is known on a canvas, but not in a photograph.
    thing = _draw_thing(rng) if kind == "paste" or (kind == "remove" and rng.random() < 0.5) else {}
    result = pick(rng, _NEW.get(kind, tuple(PLACES))) if "{new}" in template else ""
    words = {"old": thing and f"{thing['color']} {say(rng, thing['shape'])}", "new": result}
    return ("edits", {"change_type": kind, "result": result_of(result), **thing}, template.format(**words))


def _draw_thing(rng: Generator) -> dict[str, str]:
    """Draw the attributes of an object."""
    return {name: pick(rng, CLASSES[name]) for name in OF_THE_OBJECT}


def noun(rng: Generator, thing: Mapping[str, str]) -> str:
    """Return a noun phrase for an object, such as "small red cube" or "red cube left of the blue ball"."""
    words = [say(rng, thing["size"])] if rng.random() < 0.2 else []
    words.append(thing["color"])
    words += [say(rng, thing["material"])] if rng.random() < 0.2 else []
    phrase = " ".join([*words, say(rng, thing["shape"])])
    if rng.random() < 0.1:
        side, other = pick(rng, ("left of", "right of", "behind", "in front of")), _draw_thing(rng)
        phrase += f" {side} the {other['color']} {say(rng, other['shape'])}"
    return phrase


def text_row(rng: Generator, captions: list[str]) -> Prompt:
    """Return a question with an answer in the chat format, without images.

    In some rows, the answer is two captions in order, as in Coupled Sample Training.
    """
    if rng.random() < COUPLED:
        first, second = (captions[int(i)] for i in rng.integers(len(captions), size=2))
        coupled = coupled_prompt("plain", first, second)
        return Prompt(coupled.question.replace(IMAGE_MARK, "").replace(DELTA_MARK, ""), coupled.answer, 0)
    return text_prompt("plain", *sentence(rng))


def encode(prompts: list[Prompt], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, both (B prompts, S tokens), padded on the right; only answer tokens have labels."""
    rows = [([1, *tokenizer.encode(prompt.question, add_special_tokens=False)],
             [*tokenizer.encode(str(prompt.answer), add_special_tokens=False), 2]) for prompt in prompts]
    ids = [torch.tensor(question + answer) for question, answer in rows]
    labels = [torch.tensor([IGNORED] * len(question) + answer) for question, answer in rows]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def teach(tower: CLIPVisionModel, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *,
          images: NDArray[np.uint8], captions: list[str], seed: int, steps: int) -> dict[str, float]:
    """Train `language` in place on chats and image captions, and return the mean losses of the last 100 steps.

    `images` has shape (M images, height, width, 3), and `captions` has one caption for each image.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 21])
    width = language.config.hidden_size
    projector = nn.Sequential(nn.Linear(tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width))
    optimizer = torch.optim.AdamW([*language.parameters(), *projector.parameters()], lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    spoken, seen = [], []
    language.train()
    for _ in tqdm(range(steps), desc="chat", unit="step"):
        ids, labels = encode([text_row(rng, captions) for _ in range(ROWS)], tokenizer)
        text_loss = language(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        chosen = [int(i) for i in rng.integers(len(captions), size=IMAGES)]
        with torch.no_grad():
            last = tower(normalized(images[chosen])).last_hidden_state[:, 1:]
        patches = projector(pooled(last))
        image_loss = caption_loss(language, tokenizer, patches, [captions[i] for i in chosen])
        optimizer.zero_grad(set_to_none=True)
        (text_loss + image_loss).backward()
        nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        spoken.append(text_loss.item())
        seen.append(image_loss.item())
    return {"chat_loss_per_token": round(float(np.mean(spoken[-100:])), 4),
            "chat_caption_loss_per_token": round(float(np.mean(seen[-100:])), 4)}


def caption_loss(language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, patches: Tensor,
                 captions: list[str]) -> Tensor:
    """Return the loss of the captions; `patches` (B images, T tokens, width) replace the image mark in the question."""
    question = single_prompt("plain", "Describe the image.").question
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in question.split(IMAGE_MARK))
    ids, labels = encode([Prompt("", caption, 1) for caption in captions], tokenizer)
    embed = language.get_input_embeddings()
    before, after = (embed(torch.tensor([part] * len(captions))) for part in ([1, *head], tail))
    embeds = torch.cat([before, patches, after, embed(ids[:, 1:])], 1)
    rest = embeds.shape[1] - ids.shape[1] + 1
    mask = functional.pad((ids[:, 1:] != 0).long(), (rest, 0), value=1)
    return language(inputs_embeds=embeds, attention_mask=mask,
                    labels=functional.pad(labels[:, 1:], (rest, 0), value=IGNORED)).loss
