"""The schema of params.yaml, which holds every setting that changes a result.

The modules data, training and evaluation of this package have one class for each section of the file, and each check
rejects a wrong value before any work is done. The comments in params.yaml explain the keys for users.

DVC tracks the values in params.yaml but not these modules, so that a new key for one stage does not make other stages
stale. Therefore these modules must not influence a result: a section that a stage reads has no default values and no
methods other than checks. tests/config/test_params.py enforces this rule.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from onediff.config.data import Data, source_names
from onediff.config.evaluation import Caption, Drift, Judge, Stress
from onediff.config.reading import Section, SourceName, checked, did_you_mean, read_yaml
from onediff.config.training import Align, Model, Task, Tune
from onediff.paths import PARAMS


class Config(Section):
    """All settings of params.yaml: data, model, the two training phases, and the evaluation."""

    seed: Annotated[int, Field(ge=0)]
    data: Data
    model: Model
    tasks: dict[SourceName, Task]
    align: Align | None  # If this section is null, the phase `tune` starts from the pretrained models.
    tune: Tune
    caption: Caption
    stress: Stress
    drift: Drift | None = None  # If this section is missing, `onediff drift` stops, because it has no thresholds.
    judge: Judge | None = None  # If this section is missing, `onediff judge` needs the option --model.

    @model_validator(mode="after")
    def _check_auxiliary_losses(self) -> Self:
        if self.tune.auxiliary and not self.model.delta.fusion:
            raise ValueError("tune.auxiliary: the auxiliary losses train the module Fusion, but model.delta.fusion is "
                             "null; set tune.auxiliary to null, or configure model.delta.fusion")
        return self

    @model_validator(mode="after")
    def _check_inherited_weights(self) -> Self:
        for name, phase in (("align", self.align), ("tune", self.tune)):
            if phase and phase.lr_inherited is not None and self.model.delta.init == "random":
                raise ValueError(f"{name}.lr_inherited: this is the rate of weights from BERT, but model.delta.init is "
                                 "random; set lr_inherited to null, or model.delta.init to a BERT")
        return self

    @model_validator(mode="after")
    def _check_names_of_sources(self) -> Self:
        """Raise ValueError if a section names an unknown source. The message has one line for each wrong name."""
        sources = source_names(self.data)
        names_at: dict[str, Iterable[str]] = {
            "data.leaks.max_distance": self.data.leaks.max_distance, "tasks": self.tasks,
            "align.mixture": self.align.mixture if self.align else (), "tune.mixture": self.tune.mixture}
        lines = [f"{key}: '{name}' is not one of the sources {', '.join(sources)}; "
                 + did_you_mean(name, sources, "correct the name, or add the source to the section data")
                 for key, names in names_at.items() for name in names
                 if name not in sources and (key, name) != ("tasks", "scenes_far")]
        if lines:
            raise ValueError("\n".join(lines))
        return self


def load_params(path: Path = PARAMS) -> Config:
    """Read and check params.yaml. Raises ValueError whose message has one line for each wrong value."""
    return checked(Config, read_yaml(path), path)
