"""A benchmark of one's own beside training sets in every form; copies are re-encoded, resized and renamed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from published_sets import put

from onediff.config import Runtime
from onediff.data.overlap.audit import as_text, audit, verdict
from onediff.data.overlap.datasets import read_examples
from onediff.data.record import Record, write_shards

CASES = Path(__file__).parents[4] / "shared/cases"
NUM = 7
CAPTIONS = ["the woman who carried the green suitcase has left the platform",
        "two of the bicycles near the old gate are gone",
        "a delivery van now blocks half of the narrow side street", "nothing has changed",
        "someone took the yellow ladder away from the brick wall", "the cat on the window sill looks the other way",
        "the shop lowered its shutter and the lamp above is lit"]
RUNTIME = Runtime(workers=1)


def drawn(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(30, 220, size=(7, 11, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((221, 155), Image.Resampling.BICUBIC)


def shrunk(image: Image.Image) -> Image.Image:
    return image.resize((111, 78), Image.Resampling.LANCZOS)


def saved(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def row(name: str, images: Any, *answers: str) -> dict[str, Any]:
    turns = [turn for answer in answers
             for turn in ({"from": "human", "value": "<image>\n<image>\nWhat is different?"},
                          {"from": "gpt", "value": answer})]
    return {"id": name, "image": images, "conversations": turns}


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """NUM test pairs and as many training pairs, as published by a user."""
    folder = tmp_path / "mine"
    lines = []
    for split, start in (("test", 0), ("train", 1000)):
        for k in range(NUM):
            for side in (0, 1):
                saved(folder / f"images/{split}{k}_{side}.png", drawn(start + 2 * k + side))
            caption = CAPTIONS[k] if split == "test" else f"training sentence {k}"
            lines.append({"before": f"images/{split}{k}_0.png", "after": f"images/{split}{k}_1.png",
                          "references": [caption], "split": split, "pair_id": f"{split}{k}"})
    put(folder / "pairs.jsonl", "\n".join(map(json.dumps, lines)))
    return folder


def audited(train: Path, benchmark: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = train.parent / "findings.jsonl"
    trained = read_examples(train, split="train", scratch=train.parent / "scratch", **options)
    tested = read_examples(benchmark, split="test", scratch=train.parent / "scratch")
    result = audit(trained, tested, out=out, max_distance=2.0, runtime=RUNTIME)
    return result, [json.loads(line) for line in out.read_text().splitlines()]


def others(folder: Path) -> Path:
    """LLaVA-style rows: two test pairs as JPEG of half the size, an image and a caption alone, and what is new."""
    for k in (1, 3):
        saved(folder / f"coco/{k}a.jpg", shrunk(drawn(2 * k)))
        saved(folder / f"coco/{k}b.jpg", shrunk(drawn(2 * k + 1)))
    saved(folder / "vqa/x.png", drawn(2 * 5))
    for k in range(4):
        saved(folder / f"new/{k}.jpg", drawn(500 + k))
    put(folder / "new/broken.jpg", "no image")
    rows = [row("a", ["coco/1a.jpg", "coco/1b.jpg"], CAPTIONS[1].upper()),
            row("b", ["coco/3a.jpg", "coco/3b.jpg"], CAPTIONS[3]), row("c", "vqa/x.png", "What a nice picture."),
            row("d", ["new/0.jpg", "new/1.jpg"], f"Well. {CAPTIONS[2]}."),
            row("e", ["new/2.jpg", "new/gone.jpg"], "the dog left"), row("f", "new/broken.jpg", "nothing has changed"),
            {"id": 7, "conversations": [{"from": "gpt", "value": f"they say {CAPTIONS[4]} at noon"}]}]
    return put(folder / "rows.json", rows)


def test_copies_in_llava_conversations_are_matched_and_unrelated_images_are_not(benchmark: Path,
                                                                                tmp_path: Path) -> None:
    result, findings = audited(others(tmp_path / "m4"), benchmark)
    assert result["benchmarks"] == {"mine": {
        "num_pairs": 7, "equal_image": 1, "near_image": 2, "equal_caption": 3, "rare_caption": 2, "near_caption": 1,
        "image_and_caption": 2, "leaks": 5}}
    matches = {(finding["reason"], finding["pair_id"], finding["train"]) for finding in findings}
    assert matches == {("near image", "mine-test-test1", "a"), ("near image", "mine-test-test3", "b"),
                     ("equal image", "mine-test-test5", "c"), ("equal caption", "mine-test-test1", "a"),
                     ("equal caption", "mine-test-test3", "b"), ("equal caption", "mine-test-test2", "d"),
                     ("near caption", "mine-test-test4", "7")}
    images = [finding for finding in findings if "image" in finding]
    assert {finding["train_image"] for finding in images} == {"coco/1a.jpg", "coco/1b.jpg", "coco/3a.jpg",
                                                              "coco/3b.jpg", "vqa/x.png"}
    assert all(0 < finding["distance"] <= 2 for finding in images if finding["reason"] == "near image")
    near = next(finding for finding in findings if finding["reason"] == "near caption")
    assert (near["caption"], near["train_caption"]) == (CAPTIONS[4], f"they say {CAPTIONS[4]} at noon")


def test_unreadable_images_are_counted_and_listed(benchmark: Path, tmp_path: Path) -> None:
    result, _ = audited(others(tmp_path / "m4"), benchmark)
    train = result["train"]
    assert (train["rows"], train["images"], train["missing_images"], train["corrupt_images"]) == (7, 10, 1, 1)
    assert train["unread"][0] == "new/gone.jpg is missing" and train["unread"][1].startswith("new/broken.jpg: not an i")
    assert verdict(result) == ("5 of 7 pairs leak; but 2 of 10 images of the training set could not be read and were "
                               "not compared")
    assert as_text(result).splitlines()[1].split() == ["mine", "7", "1", "2", "3", "2", "1", "2", "5"]


def test_a_training_set_without_content_of_the_benchmark_is_clean(benchmark: Path, tmp_path: Path) -> None:
    for k in range(6):
        saved(tmp_path / f"m4/{k}.jpg", drawn(700 + k))
    rows = [row(str(k), f"{k}.jpg", f"nothing has changed, said number {k}") for k in range(6)]
    result, findings = audited(put(tmp_path / "m4/rows.json", rows), benchmark)
    assert (verdict(result), findings) == ("clean: none of 7 pairs leaks", [])


def test_the_training_split_of_a_folder_can_be_compared_with_the_test_split_of_the_folder(benchmark: Path) -> None:
    result, findings = audited(benchmark, benchmark)
    assert result["train"]["rows"] == NUM and result["leaks"] == 0 and findings == []


def test_shards_are_read_by_split_and_each_benchmark_is_counted_separately(benchmark: Path, tmp_path: Path) -> None:
    def encoded(image: Image.Image, kind: str) -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    def record(number: int, source: str, split: str, kind: str = "PNG") -> Record:
        before, after = (encoded(drawn(2 * number + side), kind) for side in (0, 1))
        return Record(f"{source}-{split}-{number}", source, split, f"g{number}", before, after,
                      [f"the pair number {number} {CAPTIONS[0]}"], "?", "none", {})

    tested = [record(k, source, "test") for k, source in enumerate(["web", "film"] * 3)]
    trained = [record(k, "web", "train", "JPEG") for k in (0, 1, 20, 21)]
    write_shards(trained, tmp_path / "shards", "train", shard_pairs=3)
    write_shards(tested, tmp_path / "shards", "test", shard_pairs=3)
    result, _ = audited(tmp_path / "shards", tmp_path / "shards")
    assert {name: (counts["num_pairs"], counts["near_image"]) for name, counts in result["benchmarks"].items()} == {
        "web": (3, 1), "film": (3, 1)}
    assert result["train"]["rows"] == 4


def test_blank_pages_are_not_near_each_other(tmp_path: Path) -> None:
    for name, grey in (("mine/a.png", 255), ("mine/b.png", 254), ("m4/c.png", 253)):
        saved(tmp_path / name, Image.new("RGB", (97, 89), (grey, grey, grey)))
    put(tmp_path / "mine/pairs.csv", "before,after,references,split\na.png,b.png,a page,test\n")
    result, _ = audited(put(tmp_path / "m4/rows.json", [row("a", "c.png", "a cat")]), tmp_path / "mine")
    assert result["leaks"] == 0


def test_dark_pictures_of_different_objects_are_not_near(tmp_path: Path) -> None:
    for name, left in (("mine/a.png", 40), ("m4/c.png", 110)):
        floor = np.broadcast_to(np.linspace(35, 60, 160).astype(np.uint8)[:, None], (160, 200)).copy()
        floor[40:70, left : left + 40] = 25
        saved(tmp_path / name, Image.fromarray(floor).convert("RGB"))
    put(tmp_path / "mine/pairs.csv", "before,after,references,split\na.png,a.png,it is darker,test\n")
    result, _ = audited(put(tmp_path / "m4/rows.json", [row("a", "c.png", "a cat")]), tmp_path / "mine")
    assert result["leaks"] == 0
    saved(tmp_path / "m4/c.png", Image.open(tmp_path / "mine/a.png").resize((111, 89)))
    assert audited(tmp_path / "m4/rows.json", tmp_path / "mine")[0]["leaks"] == 1


@pytest.mark.skipif(not CASES.is_dir(), reason="shared/cases is not beside the project")
def test_reduced_jpeg_copies_of_photographs_are_matched_and_other_photographs_are_not(tmp_path: Path) -> None:
    photos = sorted((CASES / "photos").glob("*.jpg"))
    assert len(photos) > 10
    rows = []
    for number, path in enumerate(photos):
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((400, 400))
        tested = number % 2 == 0
        saved(tmp_path / f"mine/{number}.png", small)
        small = small.resize((small.width * 2 // 3, small.height * 2 // 3), Image.Resampling.BICUBIC)
        saved(tmp_path / f"m4/{number}.jpg", small)
        rows.append((tested, row(f"r{number}", f"{number}.jpg", "a photograph")))
    pairs = ["before,after,references,split", *(f"{k}.png,{k}.png,a photograph {k},test"
                                                for k, (tested, _) in enumerate(rows) if tested)]
    put(tmp_path / "mine/pairs.csv", "\n".join(pairs))
    new, old = ([entry for tested, entry in rows if tested == is_copy] for is_copy in (False, True))
    clean, _ = audited(put(tmp_path / "m4/new.json", new), tmp_path / "mine")
    copied, _ = audited(put(tmp_path / "m4/old.json", old), tmp_path / "mine")
    assert (clean["leaks"], copied["leaks"]) == (0, len(pairs) - 1)


@pytest.mark.parametrize(("content", "message"), [
    ({"data": []}, r"rows\.json line 1: not valid JSON \(a list \[\.\.\.\] was expected, got '\{.*LLaVA conv"),
    ([row("a", "a.jpg", "x"), {"id": "b", "image": "a.jpg"}], r"entry 2 \(line 1\): 'conversations' is missing"),
    ([{"id": "b", "image": {"path": "a"}, "conversations": []}], r"entry 1 \(line 1\), image: a list expected, got"),
    ([{"id": "b", "image": ["a", 3], "conversations": []}], r"entry 1 \(line 1\), image: text expected, got 3"),
    ([{"id": "b", "conversations": [{"from": "gpt", "text": "x"}]}], r"entry 1 .*, conversations: 'value' is missing"),
    ([], r"rows\.json: the file has no row; it must be a list of LLaVA conversations"),
])
def test_the_error_for_a_malformed_conversation_contains_the_entry(benchmark: Path, tmp_path: Path, content: Any,
                                                                   message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audited(put(tmp_path / "m4/rows.json", content), benchmark)
    assert not list((tmp_path / "m4").glob("findings*"))


def test_errors_for_missing_files_say_what_to_do(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give a folder of DiffCap shards, the folder"):
        audited(tmp_path / "nowhere", benchmark)
    with pytest.raises(FileNotFoundError, match=r"photos is not a folder: give the folder .* with --images"):
        audited(put(tmp_path / "rows.json", []), benchmark, images=tmp_path / "photos")
    with pytest.raises(ValueError, match=r"rows\.txt: the file name must end in \.json or \.jsonl, got '\.txt'"):
        audited(put(tmp_path / "rows.txt", "x"), benchmark)
    put(tmp_path / "m4/a.txt", "x")
    with pytest.raises(ValueError, match=r"m4: must contain .*; 'm4' is not the name of one: give .* --train-source"):
        audited(tmp_path / "m4", benchmark)


def test_a_benchmark_without_pairs_in_the_split_is_an_error(benchmark: Path, tmp_path: Path) -> None:
    lines = (benchmark / "pairs.jsonl").read_text().replace('"split": "test"', '"split": "val"')
    put(benchmark / "pairs.jsonl", lines)
    with pytest.raises(ValueError, match=r"mine: no pair in split 'test'; .* are: val \(7\), train \(7\); choose"):
        audited(others(tmp_path / "m4"), benchmark)
