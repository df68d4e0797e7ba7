from __future__ import annotations

import base64
import io
from dataclasses import replace

from PIL import Image

from onediff.data.record import Record
from onediff.eval.report.gallery import MAX_PX, Album, choose, data_uri, example, fitted, losses, worst


def png(color: str = "red", size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def record(pair_id: str = "a", change_type: str = "add") -> Record:
    cube = {"shape": "cube", "color": "red", "size": "big", "material": "matte"}
    where = {"object": cube, "new": None, "region_before": None, "region_after": [10, 5, 30, 15]}
    return Record(pair_id, "scenes", "test", "g", png(), png("blue"), ["a red cube"], "What?", change_type, where)


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_an_image_in_a_data_uri_equals_the_original_file() -> None:
    before, _ = example(record(), "a red cube was added").sides
    assert base64.b64decode(before.image.partition(",")[2]) == png()
    assert data_uri(b"\xff\xd8abc").startswith("data:image/jpeg;")


def test_large_images_are_resized_and_small_images_stay() -> None:
    before, after = example(replace(record(), before=png(size=(1000, 500))), "").sides
    assert opened(before.image).size == (MAX_PX, MAX_PX // 2) and opened(after.image).size == (40, 20)


def test_an_image_that_browsers_do_not_show_becomes_a_jpeg() -> None:
    for kind, shown in (("TIFF", "JPEG"), ("PPM", "JPEG"), ("AVIF", "AVIF"), ("GIF", "GIF"), ("BMP", "BMP")):
        file = io.BytesIO()
        Image.new("RGB", (40, 20), "red").save(file, kind)
        before, _ = example(replace(record(), before=file.getvalue()), "").sides
        assert opened(before.image).format == shown
        assert before.image.startswith(f"data:image/{shown.lower()};")


def test_regions_are_given_in_percent_of_the_image_size() -> None:
    shown = example(record(), "a red cube was added")
    assert [side.region for side in shown.sides] == [None, [25.0, 25.0, 50.0, 50.0]] and shown.right
    assert not example(record(), "a blue cube was added").right


def test_the_heat_map_covers_the_square_to_which_the_image_is_padded() -> None:
    maps = {"before": [[0.0, 0.5], [0.0, 0.0]], "after": [[0.25, 0.0], [0.0, 0.25]]}
    before, after = example(record(), "", maps=maps).sides
    assert before.square == [0.0, -50.0, 100.0, 200.0] and before.heat and after.heat
    heat = opened(before.heat)
    assert heat.size == (2, 2) and heat.getpixel((1, 0)) == (255, 230, 90, 165)
    assert heat.getpixel((0, 1)) == (20, 10, 90, 165)
    assert opened(after.heat).getpixel((0, 0)) == (215, 45, 80, 165)  # the color for half of the maximum of the pair


def test_the_gallery_shows_failures_of_every_type_and_prefers_pairs_with_attention_maps() -> None:
    rows = [vars(record(f"{kind}{i}", kind)) for kind in ("add", "drop", "none") for i in range(5)]
    predictions = {row["pair_id"]: "nothing has changed" for row in rows} | {"add3": "a red cube was added"}
    predictions |= {f"drop{i}": "the red cube is gone" for i in range(1, 5)}
    assert choose("scenes", rows, predictions, per_type=4) == [
        "add3", "add0", "add1", "add2", "drop1", "drop2", "drop3", "drop0", "none0", "none1", "none2", "none3"]
    chosen = choose("scenes", rows, predictions, per_type=2, first={"none4", "drop4"})
    assert chosen[2:] == ["drop4", "drop0", "none4", "none0"]


def test_the_worst_pairs_are_wrong_pairs_and_losses_are_sorted_by_size() -> None:
    rows = [vars(record(name)) for name in "abc"]
    predictions = {"a": "a red cube was added", "b": "no", "c": "no"}
    assert worst("scenes", rows, predictions, {"a": 0.0, "b": 2.0, "c": 1.0}, count=5) == ["c", "b"]
    assert worst("own", rows, predictions, {"a": 0.0, "b": 2.0, "c": 1.0}, count=2) == ["a", "c"]
    assert losses({"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 2.0, "b": 1.0, "c": 3.0}, count=5) == {"c": 3.0, "a": 1.0}


def test_if_the_page_is_too_large_the_last_pairs_are_shown_without_images() -> None:
    pair = example(record(), "")
    size = sum(len(side.image) for side in pair.sides)
    albums = fitted({"x": Album([pair], [pair, pair], []), "y": Album([], [pair], [])}, 3 * size)
    assert [[bool(shown.sides) for shown in part] for album in albums.values()
            for part in (album.shown, album.worst)] == [[True], [True, False], [], [True]]
