"""Captions by any chat model of transformers that reads two images, given by name or folder, without training it."""

import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
)

from onediff.model.captioner import clean_captions, pick_device
from onediff.model.weights import first_line, load_strictly, read_config

WHERE = "--chat"
QUESTION = "{question}"
PROMPT = (f"The first image was taken before, the second one after. {QUESTION} "
          "Answer with one short sentence. If nothing changed, say so.")
NUM_IMAGES = 2


class ChatCaptioner:
    """Decodes greedily, without the sampling and penalties that a checkpoint recommends."""

    def __init__(self, model: Any, processor: Any, *, name: str, prompt: str = PROMPT) -> None:
        """`prompt`: the text after the two images; {question} in it becomes the question of the pair.

        Raises ValueError if the chat template does not show both images.
        """
        self.model, self.processor, self.name, self.prompt = model.eval(), processor, name, prompt
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        mark = getattr(processor, "image_token", None)
        shown = self.conversation("").count(mark) if mark else NUM_IMAGES
        if shown != NUM_IMAGES:
            raise ValueError(f"{WHERE} {name}: its chat template must show {NUM_IMAGES} images, but shows {shown} of "
                             f"them as {mark}; take a model that was trained on several images")

    @classmethod
    def load(cls, name: str, *, prompt: str = PROMPT, device: str = "auto") -> Self:
        """`name`: of the hub, or a folder, with safetensors. Code in the checkpoint is not run.

        Raises FileNotFoundError if there is no such model, ValueError if the model cannot chat about two images.
        """
        try:
            config = read_config(name, where=WHERE)
            if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                raise ValueError(f"{WHERE} {name}: a chat model that reads images is needed, but its config.json says "
                                 f"'{config.model_type}', which transformers cannot show images and ask; take one such "
                                 "as llava, qwen2_vl, qwen2_5_vl or idefics3")
            processor = load_processor(config, name)
            torch_device = pick_device(device)
            model = load_strictly(AutoModelForImageTextToText, name, where=WHERE, use_safetensors=True,
                                  dtype=torch.bfloat16 if torch_device.type == "cuda" else torch.float32)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FileNotFoundError(f"{WHERE} {name} not found: no folder with such a model's files in safetensors, "
                                    f"nor to be had from the Hub ({first_line(error)}); give a folder, or fetch it "
                                    f"with 'hf download {name}'") from None
        return cls(model.to(torch_device), processor, name=name, prompt=prompt)

    @torch.inference_mode()
    def caption(self, pairs: Sequence[tuple[Image.Image, Image.Image]], questions: Sequence[str], *,
                max_new_tokens: int = 64) -> list[str]:
        """What the model answers about the first and second image of each pair, one question per pair.

        Raises ValueError if the model cannot read so much.
        """
        batch = self.inputs(pairs, questions).to(self.model.device, self.model.dtype)
        length = batch["input_ids"].shape[1]
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room and length + max_new_tokens > room:
            raise ValueError(f"{WHERE} {self.name}: {NUM_IMAGES} images, prompt and answer take "
                             f"{length + max_new_tokens} tokens, but it reads at most {room}; take a shorter prompt, "
                             "or a model that reads more")
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
                                    repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=tokenizer.pad_token_id,
                                    eos_token_id=tokenizer.eos_token_id if ends is None else ends)
        ids = self.model.generate(**batch, generation_config=settings)[:, length:]
        return clean_captions(tokenizer, ids)

    def inputs(self, pairs: Sequence[tuple[Image.Image, Image.Image]], questions: Sequence[str]) -> Any:
        """What the model's `generate` takes: rows padded on the left, so that every answer begins at the end."""
        texts = [self.conversation(question) for question in questions]
        begin = self.processor.tokenizer.bos_token
        return self.processor(text=texts, images=[list(pair) for pair in pairs], padding=True, padding_side="left",
                              add_special_tokens=not (begin and texts[0].startswith(begin)), return_tensors="pt")

    def conversation(self, question: str) -> str:
        """The chat template's text, a placeholder for each image, up to where the answer begins."""
        content = [*({"type": "image"} for _ in range(NUM_IMAGES)),
                   {"type": "text", "text": self.prompt.replace(QUESTION, question)}]
        return str(self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                      add_generation_prompt=True))


def load_processor(config: PreTrainedConfig, name: str) -> Any:
    """The checkpoint's own processor. Raises ValueError if it has no chat template or asks for an absent package."""
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (ImportError, ValueError) as error:  # which one depends on the files that say that it reads videos, too
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        video = inspect.signature(kind.__init__).parameters.get("video_processor") if kind else None
        if "torchvision" not in str(error).lower() or video is None or video.default is not None:
            raise ValueError(f"{WHERE} {name}: its processor cannot be made, a package or a file may be absent: "
                             f"{first_line(error)}") from None
        processor = _without_videos(kind).from_pretrained(name, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(f"{WHERE} {name}: a processor for images and text is needed, but its files make a "
                         f"{type(processor).__name__}; fetch preprocessor_config.json and the tokenizer, too")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{WHERE} {name}: has no chat template, so how it is asked is not known; take a checkpoint "
                         "with one (llava-hf/llava-1.5-7b-hf has), or put its chat_template.jinja beside config.json")
    return processor


def _without_videos(kind: Any) -> Any:
    """The processor class without the part for videos, which is the only part that needs torchvision."""

    class ForImages(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if "video" not in part]

    ForImages.__name__ = kind.__name__  # transformers chooses its defaults by it
    return ForImages
