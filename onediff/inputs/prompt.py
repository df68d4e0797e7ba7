"""What the language model reads around the images, and which part of it is the answer."""

from dataclasses import dataclass, replace

IMAGE, DELTA = "<image>", "<delta>"
DEFAULT_INSTRUCTION = "What changed between the two images?"
COUPLED_INSTRUCTION = "Describe the two images in order."  # Coupled Sample Training: one caption after the other

_APART, _JOINED = f"First image: {IMAGE} Second image: {IMAGE}", f"Both images: {IMAGE}"
_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
_SYSTEM = {"plain": "", "vicuna_v1": _VICUNA}  # vicuna_v1 as LLaVA-1.5 was tuned with, verbatim


@dataclass(frozen=True)
class Prompt:
    """One row's text: `question` up to and with "ASSISTANT:", `answer` (None when to be generated), and its images.

    `later` holds what follows in a conversation: questions in the same form, with their answers.
    """

    question: str
    answer: str | None
    num_images: int
    later: tuple[tuple[str, str], ...] = ()


def pair_prompt(template: str, instruction: str, answer: str | None = None) -> Prompt:
    """Two images: [before][after][delta] and the instruction."""
    question = f"{_SYSTEM[template]}USER: {_APART} {DELTA}\n{instruction} ASSISTANT:"
    return Prompt(question, answer, 2)


def coupled_prompt(template: str, first: str, second: str) -> Prompt:
    """Coupled Sample Training: two unlike images, both captions concatenated in order as the target."""
    return pair_prompt(template, COUPLED_INSTRUCTION, f"First image: {first}. Second image: {second}.")


def single_prompt(template: str, instruction: str, answer: str | None = None) -> Prompt:
    """One image, as LLaVA puts it."""
    return Prompt(f"{_SYSTEM[template]}USER: {IMAGE}\n{instruction} ASSISTANT:", answer, 1)


def text_prompt(template: str, instruction: str, answer: str | None = None) -> Prompt:
    """No image at all."""
    return Prompt(f"{_SYSTEM[template]}USER: {instruction} ASSISTANT:", answer, 0)


def conversation_prompt(template: str, turns: list[tuple[str, str]], *, num_images: int) -> Prompt:
    """Question and answer in turn, as LLaVA's instruction data; the image, if any, stands before the first question."""
    first = {0: text_prompt, 1: single_prompt}[num_images](template, *turns[0])
    return replace(first, later=tuple((f"USER: {question} ASSISTANT:", answer) for question, answer in turns[1:]))


def expand(question: str, *, tokens_per_image: int, delta_tokens: int, joined: bool) -> str:
    """Each placeholder repeated as often as the model gives it tokens; `joined`: both images stand in the same tokens.
    """
    if joined:
        question = question.replace(_APART, _JOINED)
    if not delta_tokens:
        question = question.replace(f" {DELTA}", "")
    return question.replace(IMAGE, IMAGE * tokens_per_image).replace(DELTA, DELTA * delta_tokens)
