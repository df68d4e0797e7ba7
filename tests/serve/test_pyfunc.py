from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import InvocationsResponse, invocations
from PIL import Image
from registered import register, write_lock, write_results

from onediff.config import Serve
from onediff.model.digest import DIGEST_FILE, model_digests
from onediff.paths import CHAMPION
from onediff.serve.pyfunc import PairCaptioner, _load_pyfunc
from onediff.serve.usage_log import Files, read_usage

RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"
LIMITS = Serve(pairs=3, megapixels=0.01, body_mb=0.01, waiting_pairs=3, timeout_s=0.2)


def caption_with_colours(files: list[Files], pairs: list[tuple[Image.Image, Image.Image]],
                 instructions: list[str]) -> list[str]:
    """Return a caption with the colors of both images and the instruction, so that exchanged rows are visible."""
    return [f"{before.getpixel((0, 0))} {after.getpixel((0, 0))} {instruction}"
            for (before, after), instruction in zip(pairs, instructions, strict=True)]


@pytest.fixture
def model(tmp_path: Path) -> PairCaptioner:
    """A captioner that opens images in the folder `images`, next to which is an image that no client may read."""
    (tmp_path / "images").mkdir()
    file(tmp_path, BLUE)
    return PairCaptioner(caption_with_colours, LIMITS, tmp_path / "images")


def encoded(colour: str, size: tuple[int, int] = (11, 7), mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def file(folder: Path, colour: str) -> str:
    path = folder / f"{colour[1:]}.png"
    Image.new("RGB", (11, 7), colour).save(path)
    return path.name


def test_paths_base64_and_data_uris_give_equal_captions(model: PairCaptioner, tmp_path: Path) -> None:
    with_line_break = encoded(GREEN)[:40] + "\n" + encoded(GREEN)[40:]
    folder = tmp_path / "images"
    rows = [{"before": file(folder, RED), "after": str(folder / file(folder, GREEN))},
            {"before": encoded(RED), "after": encoded(GREEN)},
            {"before": f"data:image/png;base64,{encoded(RED)}", "after": with_line_break}]
    assert model.predict(rows) == ["(255, 0, 0) (0, 255, 0) What changed between the two images?"] * 3


def test_a_path_is_found_although_its_accents_are_encoded_in_another_way(model: PairCaptioner, tmp_path: Path) -> None:
    Image.new("RGB", (11, 7), RED).save(tmp_path / "images/cafe\u0301.png")
    (caption,) = model.predict([{"before": "caf\xe9.png", "after": "cafe\u0301.png"}])
    assert caption.startswith("(255, 0, 0) (255, 0, 0)")
    Image.new("RGB", (11, 7), RED).save(tmp_path / "cafe\u0301.png")
    with pytest.raises(MlflowException, match="no readable file below"):
        model.predict([{"before": "../caf\xe9.png", "after": "caf\xe9.png"}])


def test_captions_keep_the_order_of_rows_with_mixed_instructions(model: PairCaptioner) -> None:
    rows = pd.DataFrame([{"before": encoded(RED), "after": encoded(GREEN), "instruction": "edit?"},
                         {"before": encoded(GREEN), "after": encoded(GREEN)},
                         {"before": encoded(GREEN), "after": encoded(RED), "instruction": "edit?"}])
    assert model.predict(rows) == ["(255, 0, 0) (0, 255, 0) edit?",
                                   "(0, 255, 0) (0, 255, 0) What changed between the two images?",
                                   "(0, 255, 0) (255, 0, 0) edit?"]


def test_no_rows_give_no_captions(model: PairCaptioner) -> None:
    assert model.predict([]) == []


@pytest.mark.parametrize(("bad", "message"), [
    ({"before": "nowhere.png"}, "row 1: before: 'nowhere.png' is no readable file below"),
    ({"before": "/nowhere/" + "a" * 80 + ".png"}, "row 1: before: '/nowhere/a+' is no readable file below"),
    ({"before": "a" * 5000 + "/"}, "row 1: before: 'a+' is no readable file below"),
    ({"before": "a\0b"}, "row 1: before: .* is no readable file below"),
    ({"before": base64.b64encode(b"text, no image" * 9).decode()}, "row 1: before: .*not an image"),
    ({"before": "data:image/png,raw"}, "row 1: before: a data URI must look like data:image/png;base64"),
    ({"before": "data:image/png;base64,???"}, "row 1: before: not base64"),
    ({"before": 7}, "row 1: before: must be an image as base64 text or as a data URI, got 7"),
    ({"after": None}, "row 1: after: must be an image as base64 text or as a data URI, got None"),
    ({"instruction": 3}, "row 1: instruction: must be text, got 3"),
    ({"befor": "x"}, "row 1: unknown column 'befor'"),
    ({"after": encoded(RED, (110, 100), "1")}, r"row 1: after: 0\.0 megapixels, at most 0\.01 allowed"),
    ({"instruction": "a" * 10_000}, r"the rows may have at most 0\.01 MB"),
])
def test_the_error_for_a_wrong_row_contains_row_and_column(model: PairCaptioner, bad: dict, message: str) -> None:
    good = {"before": encoded(RED), "after": encoded(GREEN)}
    with pytest.raises(MlflowException, match=message) as failure:
        model.predict([good, {**good, **bad}])
    assert failure.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_row_that_is_not_a_mapping_and_too_many_rows_are_refused(model: PairCaptioner) -> None:
    with pytest.raises(MlflowException, match="row 0: must be a mapping with before and after, got str"):
        model.predict(["a.png"])
    with pytest.raises(MlflowException, match="a request may have at most 3 rows, got 4"):
        model.predict([{"before": encoded(RED), "after": encoded(GREEN)}] * 4)


def test_a_path_that_leaves_the_image_folder_is_refused_whether_or_not_the_file_exists(
        model: PairCaptioner, tmp_path: Path) -> None:
    (tmp_path / "images/link.png").symlink_to(tmp_path / file(tmp_path, BLUE))
    (tmp_path / "images/up").symlink_to(tmp_path)
    (tmp_path / "images/loop").symlink_to(tmp_path / "images/loop")
    os.mkfifo(tmp_path / "images/pipe")
    (tmp_path / "images/large.png").write_bytes(bytes(10_001))
    messages = []
    for path in ("../0000ff.png", "../nothing.png", str(tmp_path / "0000ff.png"), "link.png", "up/0000ff.png", "loop",
                 "pipe", ".", "/etc/passwd", "/proc/self/environ", "large.png"):
        with pytest.raises(MlflowException) as failure:
            model.predict([{"before": path, "after": encoded(RED)}])
        messages.append(failure.value.message.replace(f"'{path[:80]}'", "PATH"))
    outside = "row 0: before: PATH is no readable file below the server's image folder"
    assert messages == [outside] * 10 + ["row 0: before: the file must have at most 0.01 MB"]


def test_without_an_image_folder_no_path_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = PairCaptioner(caption_with_colours, LIMITS)
    long = tmp_path / ("a" * 90)
    long.mkdir()
    for path in (file(tmp_path, RED), f"{long}/{file(long, RED)}", "nothing.png"):
        with pytest.raises(MlflowException, match=r"row 0: before: .*(paths are refused, unless|not base64 text)"):
            model.predict([{"before": path, "after": encoded(RED)}])


def answered(model: PairCaptioner, *rows: dict[str, Any]) -> InvocationsResponse:
    """Return what MLflow's server answers, without the network."""
    from mlflow.models import Model
    from mlflow.pyfunc import PyFuncModel

    metadata = Model()
    metadata.add_flavor("python_function", loader_module="onediff.serve.pyfunc")
    body = json.dumps({"dataframe_records": rows})
    return invocations(body, "application/json", PyFuncModel(metadata, model), None)


def test_mlflow_answers_an_error_without_a_stack_trace_and_without_paths_of_the_server(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> list[str]:
        raise KeyError("/secret/folder")

    good = {"before": encoded(RED), "after": encoded(GREEN)}
    model = PairCaptioner(fail, LIMITS, tmp_path)
    answers = []
    for row in ({**good, "before": "/etc/passwd"}, good):
        with pytest.raises(MlflowException) as failure:
            answered(model, row)
        answers.append(failure.value.serialize_as_json())
    assert "'/etc/passwd' is no readable file" in answers[0] and "the server has an internal error" in answers[1]
    assert not [text for text in answers if "Traceback" in text or str(tmp_path) in text or "/secret" in text]
    assert "/secret/folder" in caplog.text, "the log explains the error to the owner of the server"
    assert json.loads(answered(PairCaptioner(caption_with_colours, LIMITS), good).response) == {
        "predictions": ["(255, 0, 0) (0, 255, 0) What changed between the two images?"]}


def test_one_request_is_captioned_at_a_time_and_the_others_wait_or_are_refused(tmp_path: Path) -> None:
    started, finish = threading.Event(), threading.Event()

    def wait(*_: Any) -> list[str]:
        started.set()
        assert finish.wait(30)
        return ["done"]

    model, row = PairCaptioner(wait, LIMITS), {"before": encoded(RED), "after": encoded(GREEN)}
    captions: list[str] = []
    first = threading.Thread(target=lambda: captions.extend(model.predict([row])))
    first.start()
    assert started.wait(30)
    with pytest.raises(MlflowException, match=r"the captions were not ready within 0\.2 s") as failure:
        model.predict([row, row])
    assert failure.value.get_http_status_code() == 504
    with pytest.raises(MlflowException, match="too many pairs are waiting") as failure:
        model.predict([row, row, row])
    assert failure.value.get_http_status_code() == 429
    finish.set()
    first.join()
    assert captions == ["done"] and model.predict([row, row, row]) == ["done"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete OneDiff model with random weights and a few thousand parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

    from onediff.inputs.processing import OneDiffProcessor
    from onediff.model.configuration import OneDiffConfig
    from onediff.model.onediff import OneDiffForConditionalGeneration

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["nothing changed"], trainers.BpeTrainer(
        special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=14, intermediate_size=11, num_hidden_layers=1,
                       num_attention_heads=7, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(hidden_size=10, intermediate_size=13, num_hidden_layers=1, num_attention_heads=5,
                              image_size=21, patch_size=7)
    config = OneDiffConfig(vision_config=vision, text_config=text, patch_level=-1, delta_num_tokens=3, delta_width=22,
                           delta_heads=11, delta_levels=[1], template="plain")
    image_processor = CLIPImageProcessorPil(size={"height": 21, "width": 21}, do_center_crop=False)
    processor = OneDiffProcessor(image_processor, tokenizer, tokens_per_image=9, delta_tokens=3, template="plain")
    config.image_token_id, config.delta_token_id = processor.image_token_id, processor.delta_token_id
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("trained") / "tune"
    OneDiffForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_served_model_logs_captions_in_the_folder_of_the_environment_variable(
        trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_IMAGE_ROOT", str(tmp_path))
    rows = [{"before": file(tmp_path, RED), "after": encoded(GREEN)}, {"before": encoded(RED), "after": encoded(RED)}]
    plain = _load_pyfunc(str(trained)).predict(rows)
    monkeypatch.setenv("ONEDIFF_USAGE_LOG", str(tmp_path / "usage"))
    assert _load_pyfunc(str(trained)).predict(rows) == plain
    logged, _ = read_usage(tmp_path / "usage", datetime(2000, 1, 1, tzinfo=UTC))
    assert [(row["caption"], row["model"]) for row in logged] == [(text, str(trained)) for text in plain]
    assert [row["distance"] > 0 for row in logged] == [True, False]


def test_a_registered_version_with_changed_files_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "data/model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / DIGEST_FILE).write_text(model_digests(folder).folder + "\n")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the files must have the registered digest \w{12}, got \w{12}; they were"):
        _load_pyfunc(str(folder))


@pytest.mark.parametrize(("instruction", "message"), [
    ("é" * 2000, "row 1: instruction: too long for this model"),
    ("word " * 5000, "row 1: instruction: must have at most 2000 characters, got 25000")])
def test_an_instruction_that_the_model_cannot_take_is_refused(trained: Path, instruction: str, message: str) -> None:
    pair = {"before": encoded(RED), "after": encoded(GREEN)}
    with pytest.raises(MlflowException, match=message) as failure:
        _load_pyfunc(str(trained)).predict([pair, {**pair, "instruction": instruction}])
    assert failure.value.error_code == "INVALID_PARAMETER_VALUE"


def test_an_image_folder_that_does_not_exist_stops_the_loading(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDIFF_IMAGE_ROOT", "/nowhere")
    with pytest.raises(ValueError, match="ONEDIFF_IMAGE_ROOT must name a folder, got '/nowhere'"):
        _load_pyfunc(str(trained))


@pytest.fixture
def champion(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder whose registry, in .onediff/mlflow.db, has the model as champion. The test runs there."""
    from onediff import registry

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".onediff").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / '.onediff/mlflow.db'}")
    write_results()
    write_lock(trained)
    Path("rules.yaml").write_text("minima: {scenes.CIDEr: 0.5}\nmaxima: {}\nbetter_than_champion: null\n")
    register(trained)
    assert registry.promote(rules=Path("rules.yaml")).promoted
    return tmp_path


@pytest.mark.slow
def test_a_registered_version_can_be_loaded_as_an_mlflow_model(champion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.pyfunc import load_model

    from onediff import registry
    from onediff.model.captioner import Captioner

    monkeypatch.setenv("ONEDIFF_IMAGE_ROOT", str(champion))
    served = load_model(CHAMPION)
    rows = [{"before": file(champion, RED), "after": encoded(GREEN)}]
    direct = Captioner.load(registry.model_folder(), device="cpu")
    pair = (Image.new("RGB", (11, 7), RED), Image.new("RGB", (11, 7), GREEN))
    assert served.predict(rows) == served.predict(pd.DataFrame(rows)) == direct.caption([pair])
    with pytest.raises(MlflowException, match=r"row 0: before: 'nowhere\.png' is no readable file"):
        served.predict([{**rows[0], "before": "nowhere.png"}])


@pytest.mark.slow
def test_mlflow_models_serve_works_as_the_page_documents_it(champion: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.split("## The MLflow model")[1], re.MULTILINE | re.DOTALL)
    (_, start), (_, request), (_, script) = blocks
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (champion / file(champion, RED)).rename("before.png")
    (champion / file(champion, GREEN)).rename("after.png")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_TRACKING")} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "NO_PROXY": "127.0.0.1"}
    with subprocess.Popen(["bash", "-c", start.replace("5001", port)], env=environment, start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_port(int(port), server)
            answer = run_in_shell(request.replace("5001", port), environment)
            assert list(json.loads(answer)) == ["predictions"]
            done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True,
                                  check=True)
            assert done.stdout.splitlines()[-1] == str(json.loads(answer)["predictions"])
            refused = run_in_shell(request.replace("5001", port).replace("--fail-with-body", "").replace(
                "$(base64 -w0 before.png)", "before.png"), environment)
            assert "paths are refused" in refused and not re.search(r"Traceback|stack_trace|/onediff", refused)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server accepts connections, and fail if it ends before or after two minutes."""
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline and server.poll() is None, "mlflow models serve did not start"
            time.sleep(0.2)


def run_in_shell(code: str, environment: dict[str, str]) -> str:
    """Run Bash code and return its output; fail if a command fails."""
    return subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", code], env=environment, stdout=subprocess.PIPE,
                          text=True, check=True).stdout
