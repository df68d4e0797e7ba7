"""The splits of DiffCap. Their order seeds generated pairs, and decides which of two equal pairs counts as a leak."""

from __future__ import annotations

from typing import Literal, get_args

Split = Literal["train", "val", "gate", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
