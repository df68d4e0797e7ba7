from __future__ import annotations

from collections.abc import Iterator

import pytest

from onediff.eval.metrics import Meteor


@pytest.fixture(scope="session")
def meteor() -> Iterator[Meteor]:
    with Meteor() as running:
        yield running
