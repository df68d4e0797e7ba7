from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest
from serving import RunningServer, base64_text, image_file, pair_body, running_server

from onediff.config import Serve
from onediff.inputs.images import open_image
from onediff.model.captioner import Captioner


def test_both_kinds_of_body_give_the_caption_of_the_captioner(client: httpx.Client,
                                                              served_captioner: Captioner) -> None:
    files = image_file(3), image_file(5)
    (expected, confidence), = served_captioner.caption_with_confidence([(open_image(files[0]), open_image(files[1]))])
    of_form = client.post("/v1/captions", files={"before": files[0], "after": files[1]}).json()
    of_json = client.post("/v1/captions", json=pair_body(3, 5)).json()
    for answer in (of_form, of_json):
        assert answer["caption"] == expected
        assert answer["confidence"] == pytest.approx(confidence, abs=1e-4)
        assert answer["model"] == {"version": "1", "digest": "1" * 64}
        assert answer["milliseconds"] > 0
        assert {answer["regions"], answer["familiar"]} == {None}
        assert "heat_map" not in answer


def test_a_list_gives_a_list_in_the_order_of_the_pairs(client: httpx.Client) -> None:
    pairs = [pair_body(seed, seed + 1) for seed in (3, 5, 7)]
    alone = [client.post("/v1/captions", json=pair).json()["caption"] for pair in pairs]
    assert [answer["caption"] for answer in client.post("/v1/captions", json=pairs).json()] == alone


def test_a_heat_map_has_values_from_0_to_1_for_both_images(client: httpx.Client) -> None:
    maps = client.post("/v1/captions", files={"before": image_file(3), "after": image_file(5)},
                       data={"heat_map": "true"}).json()["heat_map"]
    assert set(maps) == {"before", "after"}
    assert {len(row) for grid in maps.values() for row in grid} == {len(maps["before"])}
    values = [value for grid in maps.values() for row in grid for value in row]
    assert min(values) >= 0 and max(values) == 1


def test_an_instruction_reaches_the_model(client: httpx.Client, served_captioner: Captioner) -> None:
    question = "How was the image edited?"
    pair = open_image(image_file(3)), open_image(image_file(5))
    answer = client.post("/v1/captions", json=pair_body(3, 5) | {"instruction": question}).json()
    assert answer["caption"] == served_captioner.caption([pair], instructions=[question])[0]


@pytest.mark.parametrize(("body", "param", "code"), [
    ({"before": "aaaa"}, "after", "invalid_value"),
    (pair_body() | {"caption": "x"}, "caption", "invalid_value"),
    (pair_body() | {"before": 7}, "before", "invalid_value"),
    (pair_body() | {"before": "http://127.0.0.1/a.png"}, "before", "address_refused"),
    (pair_body() | {"before": "file:///etc/passwd"}, "before", "address_refused"),
    (pair_body() | {"before": "/etc/passwd"}, "before", "invalid_image"),
    (pair_body() | {"before": "../ä"}, "before", "invalid_image"),
    (pair_body() | {"before": "data:image/png,raw"}, "before", "invalid_image"),
    (pair_body() | {"after": base64_text(b"no image")}, "after", "corrupt_image"),
    (pair_body() | {"before": "A" * 70 + "%2B"}, "before", "invalid_image"),
    (pair_body() | {"instruction": "word " * 300}, "instruction", "instruction_too_long"),
    ([pair_body(), pair_body() | {"after": ""}], "1.after", "corrupt_image"),
    ([], None, "no_pairs"),
    ("text", None, "invalid_value"),
])
def test_a_wrong_value_is_named_in_one_shape(client: httpx.Client, body: object, param: str | None, code: str) -> None:
    answer = client.post("/v1/captions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (422, param, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and ".py" not in error["message"]


@pytest.mark.parametrize(("files", "data", "param"), [
    ({"before": image_file()}, {}, "after"), ({"before": image_file(), "after": image_file(), "c": b""}, {}, "c"),
    ({"before": image_file(), "after": image_file()}, {"heat_map": "perhaps"}, "heat_map"),
    ({"before": image_file(), "after": image_file()}, {"question": "what?"}, "question"),
    ({"before": image_file()}, {"after": "text"}, "after"),
    ({"before": image_file(), "after": image_file()}, {"instruction": ["what?", "where?"]}, "instruction"),
])
def test_a_wrong_form_is_refused(client: httpx.Client, files: dict, data: dict, param: str | None) -> None:
    answer = client.post("/v1/captions", files=files, data=data)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


def form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """Return the content and the headers of a multipart body, from the header and the content of each part."""
    lines = [b"--x\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (header.encode(), content)
             for header, content in parts]
    return {"content": b"".join([*lines, b"--x--\r\n"]), "headers": {"content-type": "multipart/form-data; boundary=x"}}


@pytest.mark.parametrize("name", ['filename="日é.png"', "filename*=UTF-8''%E6%97%A5.png", 'filename=""',
                                  "filename=\"a.png\"; filename*=UTF-8''%E6%97%A5.png"])
def test_every_form_of_a_file_name_is_taken(client: httpx.Client, name: str) -> None:
    """A part with only `filename*` was refused as text."""
    answer = client.post("/v1/captions", **form((f'name="before"; {name}', image_file(3)),
                                                (f'name="after"; {name}', image_file(5))))
    assert answer.json()["caption"] == client.post("/v1/captions", json=pair_body(3, 5)).json()["caption"]


def test_two_files_with_one_field_name_are_refused(client: httpx.Client) -> None:
    files = [("before", image_file(3)), ("before", image_file(5)), ("after", image_file(7))]
    answer = client.post("/v1/captions", files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "before")
    assert answer.json()["error"]["message"] == "before: must be sent once, got 2 values"


@pytest.mark.parametrize(("method", "address", "status", "code", "message"), [
    ("GET", "/nothing", 404, "not_found", "nothing is at this address"),
    ("POST", "/v1/captions/", 404, "not_found", "nothing is at this address"),
    ("OPTIONS", "/v1/captions", 405, "method_not_allowed", "this address takes POST only, got OPTIONS"),
    ("POST", "/page/page.js", 405, "method_not_allowed", "this address takes GET, HEAD only, got POST"),
    ("POST", "/v1/captions", 415, "unsupported_content_type", "must be application/json or multipart/form-data")])
def test_errors_of_the_framework_have_the_same_shape(client: httpx.Client, method: str, address: str, status: int,
                                                     code: str, message: str) -> None:
    answer = client.request(method, address, content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert message in answer.json()["error"]["message"]


def test_a_byte_order_mark_before_json_is_ignored(client: httpx.Client) -> None:
    body, kind = json.dumps(pair_body()), {"content-type": "application/json"}
    assert client.post("/v1/captions", content=body.encode("utf-8-sig"), headers=kind).status_code == 200
    error = client.post("/v1/captions", content=body.encode("utf-16"), headers=kind).json()["error"]
    assert error["message"].startswith("the body is not valid JSON in UTF-8")


def test_a_compressed_body_is_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/captions", content=gzip.compress(json.dumps(pair_body()).encode()),
                         headers={"content-type": "application/json", "content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_encoding")


def test_a_multipart_body_without_a_boundary_is_refused_with_a_cure(client: httpx.Client) -> None:
    answer = client.post("/v1/captions", content=b"x", headers={"content-type": "multipart/form-data"})
    assert answer.json()["error"]["message"] == (
        "the multipart body is not valid (Missing boundary in multipart); let your HTTP library make the body and "
        "its content type")


def test_head_has_the_status_and_the_length_of_get(client: httpx.Client) -> None:
    for address in ("/", "/healthz", "/docs", "/page/page.js", "/nothing"):
        head, get = client.head(address), client.get(address)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-length"] == str(len(get.content))


def test_a_request_beyond_the_limits_is_refused_before_it_is_read(served_captioner: Captioner) -> None:
    limits = Serve(body_mb=0.1, pairs=2, megapixels=0.5)
    with (running_server(served_captioner, limits) as server,
          httpx.Client(base_url=server.url, trust_env=False) as client):
        answers = [client.post("/v1/captions", files={"before": bytes(200_000), "after": b""}),
                   client.post("/v1/captions", content=(bytes(50_000) for _ in range(3)),
                               headers={"content-type": "application/json"}),
                   client.post("/v1/captions", json=[pair_body()] * 3),
                   client.post("/v1/captions", files={"before": image_file(size=(1000, 600)), "after": image_file()})]
    assert [answer.status_code for answer in answers] == [413] * 4
    assert [answer.json()["error"]["code"] for answer in answers] == [
        "body_too_large", "body_too_large", "too_many_pairs", "image_too_large"]


@pytest.mark.parametrize(("address", "start", "item", "end"), [
    ("/v1/captions", b"[", b"{},", b"{}]"), ("/v1/captions", b'{"x": [', b"[],", b"[]]}"),
    ("/v1/chat/completions", b'{"model": "onediff", "messages": [', b'{"role":"user"},', b"{}]}")])
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(client: httpx.Client, address: str, start: bytes,
                                                                   item: bytes, end: bytes) -> None:
    """Three megabytes of `{}` needed 46 seconds, and hundreds of bytes of memory for each value."""
    answer = client.post(address, content=start + item * 30_000 + end, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_values")


def test_only_the_addresses_below_v1_need_the_key(served_captioner: Captioner) -> None:
    with (running_server(served_captioner, Serve(), api_key="sesame") as server,
          httpx.Client(base_url=server.url, trust_env=False) as client):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"},
                       {"authorization": "Bearer sësame".encode()}):
            answer = client.post("/v1/captions", json=pair_body(), headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        key = {"authorization": "Bearer sesame"}
        assert client.post("/v1/captions", json=pair_body(), headers=key).status_code == 200
        assert {client.get(address).status_code for address in ("/healthz", "/readyz", "/metrics", "/docs")} == {200}


def test_metrics_count_requests_batches_and_captions(client: httpx.Client, server: RunningServer) -> None:
    client.post("/v1/captions", json=pair_body())
    client.get("/unknown/address")
    lines = client.get("/metrics").text
    for line in ('onediff_requests_total{path="/v1/captions",status="200"}', "onediff_batch_pairs_count",
                 'onediff_request_seconds_count{path="/v1/captions"}', "onediff_waiting_pairs 0.0",
                 'onediff_requests_total{path="other",status="404"}',
                 'onediff_captions_total{changed="', 'onediff_model_info{digest="'):
        assert line in lines


def test_the_docs_name_every_address_and_need_no_other_server(client: httpx.Client) -> None:
    page = client.get("/docs")
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in page.text
    assert "http://" not in page.text and "https://" not in page.text and "<script" not in page.text
