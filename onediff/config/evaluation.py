"""The sections `caption`, `stress`, `drift` and `judge` of params.yaml: how a trained model is evaluated."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from onediff.config.reading import Count, Rate, Section


class Caption(Section):
    """The settings of caption generation: greedy decoding if `num_beams` is 1, and beam search otherwise.

    `num_paraphrased` is the number of test pairs of each generated benchmark that are also captioned with every
    paraphrase of the default question; with 0, this is not measured.
    """

    max_new_tokens: Count
    num_beams: Count
    batch_size: Count
    num_paraphrased: Annotated[int, Field(ge=0)]


class Stress(Section):
    """The settings of the stress test, in which the model captions `num_pairs` perturbed test pairs per benchmark.

    Each list holds the strengths of one perturbation. Noise is in grey levels, shift is in percent of the image side,
    and scale and brightness are changes in percent. No list contains 0, because unperturbed pairs are always captioned.
    """

    num_pairs: Count
    jpeg_quality: list[Annotated[int, Field(ge=1, le=100)]]
    noise: list[Annotated[float, Field(gt=0)]]
    shift_percent: list[Annotated[float, Field(gt=0, lt=100)]]
    scale_percent: list[Annotated[float, Field(gt=-90, le=900)]]
    brightness_percent: list[Annotated[float, Field(ge=-100)]]

    @model_validator(mode="after")
    def _check_strengths(self) -> Self:
        for key in ("jpeg_quality", "noise", "shift_percent", "scale_percent", "brightness_percent"):
            strengths = getattr(self, key)
            if 0 in strengths or len(set(strengths)) < len(strengths):
                raise ValueError(f"{key} {strengths} must list each strength once, and must not list 0, because pairs "
                                 "without a perturbation are always measured")
        return self


class Drift(Section):
    """The thresholds of `onediff drift`, which compares recent images and captions with those of the `gate` split.

    A figure has drifted if its change is statistically significant and larger than the threshold. `chance` is the
    highest probability that one check reports a drift by chance. `max_distance` is the threshold for the
    Kolmogorov-Smirnov distance of two distributions, from 0 (equal) to 1. `max_rate_change` is the threshold for the
    difference of two rates, such as the shares of captions that report no change.
    """

    num_pairs: Count
    min_pairs: Annotated[int, Field(ge=10)]
    max_distance: Annotated[float, Field(gt=0, lt=1)]
    max_rate_change: Annotated[float, Field(gt=0, lt=1)]
    chance: Annotated[float, Field(gt=0, lt=1)]


class Judge(Section):
    """The settings of the language model with which `onediff judge` rates each caption as true or false."""

    model: str
    prompts: str = "v1"
    temperature: Rate = 0.0
    max_tokens: Count = 60
