"""A fixture that makes each test of a stage also check that dvc.yaml lists all parameters that the stage reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from recorder import recorded_params


@pytest.fixture(autouse=True)
def stages_read_only_declared_params(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    record: Path = tmp_path_factory.mktemp("params") / "read"
    with pytest.MonkeyPatch.context() as patch:
        recorded_params.install(recorded_params.append_to(str(record)), patch.setattr)
        yield
    assert list(recorded_params.undeclared(recorded_params.read_notes(record))) == []
