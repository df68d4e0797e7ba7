"""Files as people have them, given to the commands: names of macOS, broken metadata, other formats and profiles."""

from __future__ import annotations

import io
import shutil
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest
from commands import run_cli
from damaged_images import chunk, inserted
from PIL import Image
from profiles import ADOBE_RGB, rgb_profile

ROOT = Path(__file__).resolve().parents[2]


def picture(color: str = "red") -> Image.Image:
    image = Image.new("RGB", (128, 96), "white")
    image.paste(color, (30, 20, 70, 60))
    return image


def write_table(before: str, after: str) -> None:
    Path("mine/pairs.csv").write_text(f"before,after,references,split\n{before},{after},the cup is gone,train\n")


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize("packed", [False, True])
def test_names_of_macos_are_found_although_people_type_them_in_another_form(
        packed: bool, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project / "mine" / nfd("Fotos für später")
    folder.mkdir(parents=True)
    for name in ("café_vor.png", "café_nach.png"):
        picture().save(folder / nfd(name))
    if packed:
        content = io.BytesIO()
        names = [f"{folder.name}/{path.name}".encode() for path in sorted(folder.iterdir())]
        with zipfile.ZipFile(content, "w") as archive:
            for number, path in enumerate(sorted(folder.iterdir())):
                archive.write(path, str(number) * len(names[number]))
        shutil.rmtree(folder)
        packed_files = content.getvalue()
        for number, name in enumerate(names):  # The Finder writes names in UTF-8, without the mark for UTF-8.
            packed_files = packed_files.replace(str(number).encode() * len(name), name)
        Path("mine/pictures.zip").write_bytes(packed_files)
    write_table("Fotos für später/café_vor.png", "Fotos für später/café_nach.png")
    assert run_cli(monkeypatch, "data", "read", "mine", "mine") == 0
    assert "no image missing" in capsys.readouterr().out


def test_two_names_that_look_alike_are_an_error_that_shows_both(project: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine").mkdir()
    for name in ("café.png", nfd("café.png"), "b.png"):
        picture().save(Path("mine", name))
    write_table("café.png", "b.png")
    message = str(run_cli(monkeypatch, "data", "read", "mine", "mine"))
    assert r"caf\xe9.png" in message and r"cafe\u0301.png" in message and "rename or remove one of them" in message


@pytest.mark.parametrize(("ending", "kind"), [("jfif", "JPEG"), ("ppm", "PPM"), ("avif", "AVIF"), ("dib", "BMP")])
def test_every_ending_of_a_format_that_can_be_read_is_an_image(
        ending: str, kind: str, project: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/in").mkdir(parents=True)
    picture().save(f"mine/in/x.{ending}", kind)
    picture("blue").save(f"mine/in/y.{ending}", kind)
    write_table(f"x.{ending}", f"y.{ending}")
    assert run_cli(monkeypatch, "data", "read", "mine", "mine") == 0
    assert "no image missing" in capsys.readouterr().out


def test_images_with_broken_metadata_get_the_caption_of_the_intact_image(
        untrained: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    picture().save(file, "PNG")
    good = file.getvalue()
    wide = io.BytesIO()
    picture().save(wide, "PNG", icc_profile=rgb_profile(ADOBE_RGB, 2.2)[:300])
    files = {"good": good, "exif": inserted(good, chunk(b"eXIf", b"no EXIF at all")),
             "raw": inserted(good, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  12\nzz")),
             "workflow": inserted(good, chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"a": 1}' * 300_000))),
             "profile": wide.getvalue()}
    for name, content in files.items():
        Path(f"{name}.png").write_bytes(content)
    captions = set()
    for before, after in (("good", "good"), ("exif", "workflow"), ("raw", "profile")):
        assert run_cli(monkeypatch, "caption", f"{before}.png", f"{after}.png", "--model", str(untrained)) == 0
        captions.add(capsys.readouterr().out)
    assert len(captions) == 1


def test_the_caption_command_finds_a_name_of_macos_and_reads_avif(
        untrained: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(nfd("café.avif"))
    Path("runtime.yaml").write_text("usage_log: usage\n")
    assert run_cli(monkeypatch, "caption", "café.avif", "café.avif", "--model", str(untrained)) == 0
    assert len(list(Path("usage").glob("*.jsonl"))) == 1
