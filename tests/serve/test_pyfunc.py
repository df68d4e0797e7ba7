from __future__ import annotations

import base64
import io
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from registered import register, write_lock, write_results

from onediff.model.digest import DIGEST_FILE, model_digests
from onediff.paths import CHAMPION
from onediff.serve.pyfunc import PairCaptioner, _load_pyfunc
from onediff.serve.usage_log import Files, read_usage

RED, GREEN = "#ff0000", "#00ff00"


def caption_with_colours(files: list[Files], pairs: list[tuple[Image.Image, Image.Image]],
                 instructions: list[str]) -> list[str]:
    """Return a caption with the colors of both images and the instruction, so that exchanged rows are visible."""
    return [f"{before.getpixel((0, 0))} {after.getpixel((0, 0))} {instruction}"
            for (before, after), instruction in zip(pairs, instructions, strict=True)]


@pytest.fixture
def model() -> PairCaptioner:
    return PairCaptioner(caption_with_colours)


def encoded(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (11, 7), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def file(folder: Path, colour: str) -> str:
    path = folder / f"{colour[1:]}.png"
    Image.new("RGB", (11, 7), colour).save(path)
    return str(path)


def test_paths_base64_and_data_uris_give_equal_captions(model: PairCaptioner, tmp_path: Path) -> None:
    with_line_break = encoded(GREEN)[:40] + "\n" + encoded(GREEN)[40:]
    rows = [{"before": file(tmp_path, RED), "after": file(tmp_path, GREEN)},
            {"before": encoded(RED), "after": encoded(GREEN)},
            {"before": f"data:image/png;base64,{encoded(RED)}", "after": with_line_break}]
    assert model.predict(rows) == ["(255, 0, 0) (0, 255, 0) What changed between the two images?"] * 3


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
    ({"before": "nowhere.png"}, "row 1: before: nowhere.png does not exist"),
    ({"before": "/nowhere/" + "a" * 80 + ".png"}, "row 1: before: .*does not exist"),
    ({"before": base64.b64encode(b"text, no image" * 9).decode()}, "row 1: before: .*not an image"),
    ({"before": "data:image/png,raw"}, "row 1: before: a data URI must contain base64"),
    ({"before": "data:image/png;base64,???"}, "row 1: before: neither a file nor base64"),
    ({"before": 7}, "row 1: before: must be a path or a base64 image, got 7"),
    ({"after": None}, "row 1: after: must be a path or a base64 image, got None"),
    ({"instruction": 3}, "row 1: instruction: must be text, got 3"),
    ({"befor": "x"}, "row 1: unknown column 'befor'"),
])
def test_the_error_for_a_wrong_row_contains_row_and_column(model: PairCaptioner, bad: dict, message: str) -> None:
    good = {"before": encoded(RED), "after": encoded(GREEN)}
    with pytest.raises(ValueError, match=message):
        model.predict([good, {**good, **bad}])


def test_a_row_that_is_not_a_mapping_is_refused(model: PairCaptioner) -> None:
    with pytest.raises(ValueError, match="row 0: must be a mapping with before and after, got str"):
        model.predict(["a.png"])


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


@pytest.mark.slow
def test_a_registered_version_can_be_loaded_as_an_mlflow_model(trained: Path, tmp_path: Path, monkeypatch) -> None:
    from onediff import registry
    from onediff.model.captioner import Captioner

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    write_results()
    write_lock(trained)
    Path("rules.yaml").write_text("minima: {scenes.CIDEr: 0.5}\nmaxima: {}\nbetter_than_champion: null\n")
    register(trained)
    assert registry.promote(rules=Path("rules.yaml")).promoted

    from mlflow.pyfunc import load_model

    served = load_model(CHAMPION)
    rows = [{"before": file(tmp_path, RED), "after": encoded(GREEN)}]
    direct = Captioner.load(registry.model_folder(), device="cpu")
    pair = (Image.new("RGB", (11, 7), RED), Image.new("RGB", (11, 7), GREEN))
    assert served.predict(rows) == served.predict(pd.DataFrame(rows)) == direct.caption([pair])
    with pytest.raises(ValueError, match=r"row 0: before: nowhere\.png does not exist"):
        served.predict([{**rows[0], "before": "nowhere.png"}])
