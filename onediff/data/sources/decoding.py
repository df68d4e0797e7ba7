"""A check that decodes every image of a source, for `onediff data read`. The stages decode images themselves."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from onediff.config import load_runtime
from onediff.data.parallel import spread
from onediff.data.sources.read import open_source, reader_of
from onediff.inputs.images import decode


def check_images(source: str, folder: Path, *, scratch: Path | None = None) -> dict[str, list[str]]:
    """Decode every image of a source in parallel, and return messages about images in the order of the pairs.

    The messages under "broken" are about images that cannot be decoded. Those under "noted" are about images with
    metadata that cannot be used, for example the orientation. runtime.yaml sets the number of workers. Archives in
    `folder` are unpacked once below `scratch` (default: the folder `scratch` of runtime.yaml). Raises ValueError or
    FileNotFoundError if the annotation files of the source cannot be read.
    """
    runtime = load_runtime()
    files = open_source(source, folder, scratch or Path(runtime.scratch))
    paths = dict.fromkeys(path for pair in reader_of(source, files)(files) for path in pair.locate(files) if path)
    found: dict[str, list[str]] = {"broken": [], "noted": []}
    messages = spread(_decoder, paths, runtime, chunk=8)
    for kind, message in tqdm(messages, "decode", len(paths), unit="image", disable=None):
        if message:
            found[kind].append(message)
    return found


def _decoder() -> Callable[[Path], tuple[str, str]]:
    return _checked


def _checked(path: Path) -> tuple[str, str]:
    """Return a message about the image file and its kind, "broken" or "noted"; the message is empty for a good file."""
    try:
        notes = decode(path).notes
    except (ValueError, OSError) as error:
        return "broken", str(error)
    return "noted", f"{path}: {', '.join(notes)}" if notes else ""
