"""Requests that Schemathesis makes from the OpenAPI description of the server: valid ones and invalid ones."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis import GenerationMode
from serving import RunningServer, base64_text, image_file

NUM_CASES = 10  # requests to each address, of each kind
FILES = [image_file(seed, size=(24, 18), form=form) for seed, form in enumerate(("PNG", "JPEG", "GIF"))]
schemathesis.openapi.format("binary", strategies.sampled_from(FILES))
schemathesis.openapi.format("byte", strategies.sampled_from(
    [*map(base64_text, FILES), f"data:image/png;base64,{base64_text(FILES[0])}"]))


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_the_openapi_description_says(server: RunningServer, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/captions", "/healthz", "/readyz", "/metrics"}
    for operation in operations:
        if mode.is_negative and not operation.body:
            continue  # A request without a body, a query and headers cannot be invalid.

        @settings(max_examples=NUM_CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=server.url)

        check()
