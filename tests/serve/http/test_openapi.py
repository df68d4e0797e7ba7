"""Requests that Schemathesis makes from the OpenAPI description of the server: valid ones and invalid ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies
from serving import base64_text, image_file, running_server

from onediff.config import Serve
from onediff.model.captioner import Captioner

if TYPE_CHECKING:
    # The import takes seconds, and `make test` imports every test file in every process.
    from schemathesis import Case, GenerationMode
    from schemathesis.schemas import APIOperation

NUM_CASES = 5  # requests to each address, of each kind


@pytest.fixture(scope="module")
def address(served_captioner: Captioner) -> Iterator[str]:
    """The address of a server that writes short captions, so that many requests take little time."""
    with running_server(served_captioner, Serve(pairs=2, max_new_tokens=2)) as server:
        yield server.url


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_every_answer_is_as_the_openapi_description_says(address: str, kind: str) -> None:
    import schemathesis

    mode = schemathesis.GenerationMode(kind)
    files = [image_file(seed, size=(24, 18), form=form) for seed, form in enumerate(("PNG", "JPEG", "GIF"))]
    texts = [*map(base64_text, files), f"data:image/png;base64,{base64_text(files[0])}"]
    schemathesis.openapi.format("binary", strategies.sampled_from(files))
    schemathesis.openapi.format("byte", strategies.sampled_from(texts))
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/captions", "/healthz", "/readyz", "/metrics"}
    for operation in operations:
        if operation.body or mode.is_positive:  # A request without a body, a query and headers cannot be invalid.
            check_operation(operation, mode, address)


def check_operation(operation: APIOperation, mode: GenerationMode, address: str) -> None:
    """Send valid or invalid requests to one address, and check each answer."""
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    # The schema of a chat cannot say that a message must have two images, so the server refuses many valid bodies.
    excluded = [positive_data_acceptance] if "chat" in operation.path else []
    # Every value of a form is text, so the server cannot see that a number was sent as the instruction.
    of_form = [negative_data_rejection]

    @settings(max_examples=NUM_CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        is_form = case.media_type == "multipart/form-data"
        case.call_and_validate(base_url=address, excluded_checks=excluded + (of_form if is_form else []))

    check()
