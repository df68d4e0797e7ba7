"""A loaded model version, and how it captions a batch of jobs. This code runs in the thread that captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onediff.config import Serve
from onediff.inputs.prompt import DEFAULT_INSTRUCTION, pair_prompt
from onediff.serve.http.batching import Captioned, Job
from onediff.serve.http.errors import ApiError
from onediff.serve.http.schemas import LONGEST_INSTRUCTION
from onediff.serve.usage_log import UsageLog

if TYPE_CHECKING:
    from onediff.model.captioner import Captioner


@dataclass(frozen=True)
class Version:
    """A loaded model version: its name, the SHA-256 of its files, the model, and the usage log if there is one.

    `claims_change` returns whether a caption says that something changed, or None if it cannot tell.
    """

    name: str
    digest: str
    captioner: Captioner
    claims_change: Callable[[str], bool | None]
    usage_log: UsageLog | None = None


def caption(version: Version, batch: list[Job], limits: Serve) -> list[Captioned | ApiError]:
    """Caption the pairs of a batch, and return the outcome of each job, which is an error for a wrong instruction."""
    problems = [wrong_instruction(version.captioner, job.instruction, f"{job.place}instruction") for job in batch]
    good = [job for job, problem in zip(batch, problems, strict=True) if problem is None]
    texts = iter(version.captioner.caption_with_confidence(
        [job.images for job in good], instructions=[job.instruction for job in good],
        max_new_tokens=limits.max_new_tokens) if good else [])
    return [problem or _captioned(version, job, *next(texts)) for job, problem in zip(batch, problems, strict=True)]


def _captioned(version: Version, job: Job, text: str, confidence: float) -> Captioned:
    maps = None
    if job.heat_map and version.captioner.model.delta is not None:
        from onediff.model.attention import heat_maps

        before, after = heat_maps(version.captioner, *job.images)
        maps = before.round(4).tolist(), after.round(4).tolist()
    return Captioned(text, confidence, version.claims_change(text), maps, version.name, version.digest)


def wrong_instruction(captioner: Captioner, instruction: str, param: str) -> ApiError | None:
    """Return why the model cannot take an instruction, which the error calls `param`, or None if it can."""
    if instruction == DEFAULT_INSTRUCTION:
        return None
    if len(instruction) > LONGEST_INSTRUCTION:  # The tokenizer would need seconds for megabytes of text.
        return ApiError(422, f"{param}: must have at most {LONGEST_INSTRUCTION} characters, got {len(instruction)}; "
                        "use fewer words", code="instruction_too_long", param=param)
    try:
        captioner.processor.encode_question(pair_prompt(captioner.processor.template, instruction))
    except ValueError:
        return ApiError(422, f"{param}: too long for this model; use fewer words", code="instruction_too_long",
                        param=param)
    return None
