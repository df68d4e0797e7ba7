"""Baseline without training: ask an existing chat model of transformers what changed between two images."""

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
    """A chat model that writes captions with greedy decoding.

    The sampling settings and repetition penalties of the checkpoint are ignored, so that every run gives the same
    captions.
    """

    def __init__(self, model: Any, processor: Any, *, name: str, prompt: str = PROMPT) -> None:
        """Create a captioner from a loaded model and processor.

        `prompt` is the text that follows the two images; {question} in it is replaced by the question about the pair.
        Raises ValueError if the chat template of the model does not insert both images.
        """
        self.model, self.processor, self.name, self.prompt = model.eval(), processor, name, prompt
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        mark = getattr(processor, "image_token", None)
        shown = self.conversation("").count(mark) if mark else NUM_IMAGES
        if shown != NUM_IMAGES:
            raise ValueError(f"{WHERE} {name}: the chat template must insert {NUM_IMAGES} images, but inserts {shown} "
                             f"(as {mark}); choose a model that was trained on several images")

    @classmethod
    def load(cls, name: str, *, prompt: str = PROMPT, device: str = "auto") -> Self:
        """Load a chat model from a folder or by name from the Hugging Face Hub.

        Only weights in safetensors format are read, and no code from the checkpoint is run. Raises FileNotFoundError if
        the model does not exist, ValueError if it is not a chat model that accepts two images.
        """
        try:
            config = read_config(name, where=WHERE)
            if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                raise ValueError(f"{WHERE} {name}: must be a chat model that reads images, but config.json has the "
                                 f"model type '{config.model_type}'; choose a model of a type such as llava, qwen2_vl, "
                                 "qwen2_5_vl or idefics3")
            processor = load_processor(config, name)
            torch_device = pick_device(device)
            model = load_strictly(AutoModelForImageTextToText, name, where=WHERE, use_safetensors=True,
                                  dtype=torch.bfloat16 if torch_device.type == "cuda" else torch.float32)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FileNotFoundError(f"{WHERE} {name} must be a folder with weights in safetensors format, or a model "
                                    f"of the Hugging Face Hub, but could not be loaded ({first_line(error)}); give a "
                                    f"folder, or download the model with 'hf download {name}'") from None
        return cls(model.to(torch_device), processor, name=name, prompt=prompt)

    @torch.inference_mode()
    def caption(self, pairs: Sequence[tuple[Image.Image, Image.Image]], questions: Sequence[str], *,
                max_new_tokens: int = 64) -> list[str]:
        """Return the model's answer for each pair (before, after). `questions` has one question per pair.

        Raises ValueError if images, prompt and answer are longer than the context of the model.
        """
        batch = self.inputs(pairs, questions).to(self.model.device, self.model.dtype)
        length = batch["input_ids"].shape[1]
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room and length + max_new_tokens > room:
            raise ValueError(f"{WHERE} {self.name}: {NUM_IMAGES} images, prompt and answer must fit into the context "
                             f"of {room} tokens, but need {length + max_new_tokens}; use a shorter prompt, or a model "
                             "with a longer context")
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
                                    repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=tokenizer.pad_token_id,
                                    eos_token_id=tokenizer.eos_token_id if ends is None else ends)
        ids = self.model.generate(**batch, generation_config=settings)[:, length:]
        return clean_captions(tokenizer, ids)

    def inputs(self, pairs: Sequence[tuple[Image.Image, Image.Image]], questions: Sequence[str]) -> Any:
        """Return the input tensors for `generate`, padded on the left, because `generate` appends tokens on the right.
        """
        texts = [self.conversation(question) for question in questions]
        begin = self.processor.tokenizer.bos_token
        return self.processor(text=texts, images=[list(pair) for pair in pairs], padding=True, padding_side="left",
                              add_special_tokens=not (begin and texts[0].startswith(begin)), return_tensors="pt")

    def conversation(self, question: str) -> str:
        """Return the prompt in the format of the chat template, up to the position where the answer starts.

        It contains a placeholder for each image, then the text with the question. Raises ValueError if this text
        contains a control token of the model, because the processors of chat models cannot treat it as text.
        """
        text = self.prompt.replace(QUESTION, question)
        tokenizer = self.processor.tokenizer
        tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        control = next((token for token in tokens if token.strip() and token in text), None)
        if control:
            raise ValueError(f"{WHERE} {self.name}: the text of a prompt must not contain control tokens of the model, "
                             f"got {control} in {text[:80]!r}; write the instruction of this pair in other words")
        content = [*({"type": "image"} for _ in range(NUM_IMAGES)),
                   {"type": "text", "text": text}]
        return str(self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                      add_generation_prompt=True))


def load_processor(config: PreTrainedConfig, name: str) -> Any:
    """Load the processor, which prepares images and text, from the checkpoint `name`.

    Raises ValueError if the processor has no chat template or needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (ImportError, ValueError) as error:
        # Processors for images and videos need torchvision only for videos, so the video part is left out if possible.
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        video = inspect.signature(kind.__init__).parameters.get("video_processor") if kind else None
        if "torchvision" not in str(error).lower() or video is None or video.default is not None:
            raise ValueError(f"{WHERE} {name}: the processor could not be loaded ({first_line(error)}); install the "
                             "missing package, or add the missing file to the checkpoint") from None
        processor = _without_videos(kind).from_pretrained(name, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(f"{WHERE} {name}: the checkpoint must have a processor for images and text, got a "
                         f"{type(processor).__name__}; also download preprocessor_config.json and the tokenizer files")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{WHERE} {name}: the checkpoint must have a chat template, but has none; choose a checkpoint "
                         "with a chat template (such as llava-hf/llava-1.5-7b-hf), or put chat_template.jinja beside "
                         "config.json")
    return processor


def _without_videos(kind: Any) -> Any:
    """Return a subclass of the processor class without the part for videos, which is the only part that needs
    torchvision.
    """

    class ForImages(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if "video" not in part]

    ForImages.__name__ = kind.__name__  # transformers finds default settings by the name of the processor class.
    return ForImages
