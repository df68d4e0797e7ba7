"""Prompts: the text that the language model reads around the images, and the answer that it learns or generates."""

import re
from dataclasses import dataclass, replace

IMAGE, DELTA = "<image>", "<delta>"  # the placeholder tokens in the vocabulary
# The placeholders are fenced in prompts, so that the word "<image>" in a caption or an instruction remains a word. The
# fence is a code point that Unicode reserves for use inside a program.
FENCE = "\uffff"
IMAGE_MARK, DELTA_MARK = f"{FENCE}image{FENCE}", f"{FENCE}delta{FENCE}"
DEFAULT_INSTRUCTION = "What changed between the two images?"
COUPLED_INSTRUCTION = "Describe the two images in order."  # the instruction in all prompts of Coupled Sample Training

_APART, _JOINED = f"First image: {IMAGE_MARK} Second image: {IMAGE_MARK}", f"Both images: {IMAGE_MARK}"
_NO_TEXT = re.compile(f"[{FENCE}\ud800-\udfff]")
_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
_SYSTEM = {"plain": "", "vicuna_v1": _VICUNA}  # vicuna_v1 is the exact system prompt of LLaVA-1.5.


@dataclass(frozen=True)
class Prompt:
    """The text of one row of a batch, and the number of images that belong to it.

    `question` ends with "ASSISTANT:", and contains IMAGE_MARK and DELTA_MARK where visual tokens belong. `answer` is
    None if the model is to generate it. `later` contains the further questions and answers of a conversation. No other
    text contains a mark, because the functions below pass all texts through `plain`.
    """

    question: str
    answer: str | None
    num_images: int
    later: tuple[tuple[str, str], ...] = ()


def plain(text: str) -> str:
    """Replace the characters that a text must not contain, fences and halves of UTF-16 characters, by U+FFFD."""
    return _NO_TEXT.sub("\ufffd", text)


def pair_prompt(template: str, instruction: str, answer: str | None = None) -> Prompt:
    """Build a prompt about two images: placeholders for both images and the delta tokens, then the instruction."""
    question = f"{_SYSTEM[template]}USER: {_APART} {DELTA_MARK}\n{plain(instruction)} ASSISTANT:"
    return Prompt(question, _plain_answer(answer), 2)


def coupled_prompt(template: str, first: str, second: str) -> Prompt:
    """Build a prompt for Coupled Sample Training: two unrelated images, and both captions in order as the answer."""
    return pair_prompt(template, COUPLED_INSTRUCTION, f"First image: {first}. Second image: {second}.")


def single_prompt(template: str, instruction: str, answer: str | None = None) -> Prompt:
    """Build a prompt about one image, in the format of LLaVA."""
    question = f"{_SYSTEM[template]}USER: {IMAGE_MARK}\n{plain(instruction)} ASSISTANT:"
    return Prompt(question, _plain_answer(answer), 1)


def text_prompt(template: str, instruction: str, answer: str | None = None) -> Prompt:
    """Build a prompt without images."""
    return Prompt(f"{_SYSTEM[template]}USER: {plain(instruction)} ASSISTANT:", _plain_answer(answer), 0)


def conversation_prompt(template: str, turns: list[tuple[str, str]], *, num_images: int) -> Prompt:
    """Build a prompt from the (question, answer) turns of a conversation, as in LLaVA's instruction data.

    If the conversation has images, their placeholders come before the first question.
    """
    first = {0: text_prompt, 1: single_prompt, 2: pair_prompt}[num_images](template, *turns[0])
    return replace(first, later=tuple((f"USER: {plain(question)} ASSISTANT:", plain(answer))
                                      for question, answer in turns[1:]))


def expand(question: str, *, tokens_per_image: int, delta_tokens: int, joined: bool) -> str:
    """Repeat each placeholder of a question once for each visual token that replaces it.

    `joined` is for token layout C, in which every patch token represents both images. If `delta_tokens` is 0, the
    delta placeholder is removed.
    """
    if joined:
        question = question.replace(_APART, _JOINED)
    if not delta_tokens:
        question = question.replace(f" {DELTA_MARK}", "")
    return question.replace(IMAGE_MARK, IMAGE_MARK * tokens_per_image).replace(DELTA_MARK, DELTA_MARK * delta_tokens)


def _plain_answer(answer: str | None) -> str | None:
    return None if answer is None else plain(answer)
