from __future__ import annotations

import io
import json
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from onediff.cli.main import app
from onediff.config import Runtime
from onediff.data.quality.probe import probe_record
from onediff.data.record import Record
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.captioner import Captioner
from onediff.model.digest import weights_digest
from onediff.serve.usage_log import SIDES, UsageLog, Use, append, caption_and_log, pair_facts, read_usage, usage_log

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def png(colour: str, size: tuple[int, int] = (11, 7), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def use(before: bytes, after: bytes, caption: str = "nothing has changed") -> Use:
    return Use((before, after), (open_image(before), open_image(after)), "What?", caption, 0.5)


@pytest.fixture
def log(tmp_path: Path) -> UsageLog:
    return UsageLog(tmp_path / "usage", "models:/onediff@champion", "abc", keep_images=False)


def test_logged_facts_of_a_pair_equal_those_of_the_probe_table(scene_pairs: list[Record]) -> None:
    for record in scene_pairs[:5]:
        facts = pair_facts((record.before, record.after), (open_image(record.before), open_image(record.after)))
        probed = probe_record(record, max_megapixels=64)
        assert {name: facts[name] for name in facts if name in probed} == {
            name: probed[name] for name in facts if name in probed}
        assert {"width_before", "hash_after", "distance", "mode"} <= set(probed) & set(facts)


def test_brightness_and_contrast_are_means_over_both_images_in_grey_levels() -> None:
    dark, light = png("#000000"), png("#c8c8c8")
    facts = pair_facts((dark, light), (open_image(dark), open_image(light)))
    assert (facts["brightness"], facts["contrast"], facts["distance"]) == (100, 0, 200)


def test_a_row_that_is_read_equals_the_logged_row(log: UsageLog) -> None:
    log.add([use(png("red"), png("blue", mode="L"), "ä “quoted”\ncaption"), use(png("red"), png("red"))])
    rows, broken = read_usage(log.folder, LONG_AGO)
    assert broken == 0 and [row["caption"] for row in rows] == ["ä “quoted”\ncaption", "nothing has changed"]
    assert rows[0]["mode"] == "L|RGB" and rows[0]["weights"] == "abc" and rows[0]["instruction"] == "What?"
    assert not list(log.folder.rglob("images"))
    assert log.folder.stat().st_mode & 0o077 == 0


def test_only_recent_rows_are_read(log: UsageLog) -> None:
    log.add([use(png("red"), png("blue"))])
    assert len(read_usage(log.folder, datetime.now(UTC) - timedelta(days=1))[0]) == 1
    assert read_usage(log.folder, datetime.now(UTC) + timedelta(seconds=5))[0] == []


def test_images_are_stored_unchanged_and_once(tmp_path: Path) -> None:
    log = UsageLog(tmp_path / "usage", "m", "abc", keep_images=True)
    log.add([use(png("red"), png("blue")), use(png("red"), png("red"))])
    rows, _ = read_usage(log.folder, LONG_AGO)
    images = sorted((log.folder / "images").iterdir())
    assert sorted(path.name for path in images) == sorted(sha256(png(colour)).hexdigest() for colour in ("red", "blue"))
    assert (log.folder / rows[0]["file_after"]).read_bytes() == png("blue")


def _write(path: Path, name: str) -> None:
    for number in range(200):
        append(path, [{"writer": name, "number": number, "text": name * 300}])


def test_lines_of_two_writers_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(_write, [(path, "a"), (path, "b")])
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    for name in "ab":
        assert [row["number"] for row in rows if row["writer"] == name] == list(range(200))


def test_a_line_truncated_by_a_full_disk_does_not_affect_other_lines(log: UsageLog) -> None:
    log.add([use(png("red"), png("blue"), "first")])
    path = next(log.folder.glob("*.jsonl"))
    path.write_bytes(path.read_bytes() + path.read_bytes()[:40])
    log.add([use(png("red"), png("blue"), "second")])
    rows, broken = read_usage(log.folder, LONG_AGO)
    assert [row["caption"] for row in rows] == ["first", "second"] and broken == 1


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond this number of bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_reported_once_and_raises_no_error(log: UsageLog, capsys: pytest.CaptureFixture[str]) -> None:
    log.add([use(png("red"), png("blue"))])
    size = next(log.folder.glob("*.jsonl")).stat().st_size
    with full_disk(size + 10):
        log.add([use(png("red"), png("blue"))])
        log.add([use(png("red"), png("blue"))] * 2)
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "captions are not logged" in stderr and "runtime.yaml" in stderr
    for _ in range(2):
        log.add([use(png("red"), png("blue"))])
    assert capsys.readouterr().err == f"onediff: usage_log {log.folder}: captions are logged again; 3 are missing\n"


def test_a_full_disk_leaves_no_part_of_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = UsageLog(tmp_path / "usage", "m", "abc", keep_images=True)
    with full_disk(20):
        log.add([use(png("red"), png("blue"))])
    assert "captions are not logged" in capsys.readouterr().err
    assert list((log.folder / "images").iterdir()) == []


def test_a_folder_that_cannot_be_created_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    UsageLog(tmp_path / "file" / "usage", "m", "abc", keep_images=False).add([use(png("red"), png("blue"))])
    assert "captions are not logged (Not a directory)" in capsys.readouterr().err


def test_the_error_for_a_missing_log_says_how_to_create_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"set usage_log in runtime\.yaml"):
        read_usage(tmp_path / "none", LONG_AGO)


def test_without_the_setting_usage_log_no_log_is_written(tmp_path: Path) -> None:
    assert usage_log(Runtime(), "m", tmp_path) is None


def test_logged_captions_equal_those_of_the_captioner(
        untrained: Path, scene_pairs: list[Record], tmp_path: Path) -> None:
    captioner = Captioner.load(untrained, device="cpu")
    log = usage_log(Runtime(usage_log=str(tmp_path / "usage")), "m", untrained)
    files = [(record.before, record.after) for record in scene_pairs[:3]]
    pairs = [(open_image(before), open_image(after)) for before, after in files]
    instructions = [DEFAULT_INSTRUCTION, "Say it.", "How was the image edited?"]
    captions = caption_and_log(captioner, log, files, pairs, instructions)
    assert captions == caption_and_log(captioner, None, files, pairs, instructions)
    assert captions == captioner.caption(pairs, instructions=instructions)
    rows, _ = read_usage(tmp_path / "usage", LONG_AGO)
    assert [(row["caption"], row["instruction"]) for row in rows] == list(zip(captions, instructions, strict=True))
    assert {row["weights"] for row in rows} == {weights_digest(untrained)}
    assert all(0 < row["confidence"] <= 1 for row in rows)


def test_the_command_logs_the_caption_in_the_folder_of_the_environment_variable(
        untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for side, colour in zip(SIDES, ("red", "blue"), strict=True):
        Path(f"{side}.png").write_bytes(png(colour))

    def captioned() -> str:
        """Run the command in this process, because a new process would load torch again, which takes seconds."""
        completed = CliRunner().invoke(app, ["caption", "before.png", "after.png", "--model", str(untrained)])
        assert completed.exit_code == 0, completed.output
        return completed.stdout

    plain = captioned()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.png", "before.png"]
    monkeypatch.setenv("ONEDIFF_USAGE_LOG", str(tmp_path / "usage"))
    monkeypatch.setenv("ONEDIFF_USAGE_IMAGES", "true")
    logged = captioned()
    [row], _ = read_usage(tmp_path / "usage", LONG_AGO)
    assert logged == plain == row["caption"] + "\n" and row["model"] == str(untrained)
    assert (tmp_path / "usage" / row["file_before"]).read_bytes() == png("red")
