"""A check that decodes every image of a source, for `onediff data read`. The stages decode images themselves."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from onediff.config import load_runtime
from onediff.data.parallel import spread
from onediff.data.sources.read import open_source, reader_of
from onediff.inputs.images import open_image


def broken_images(source: str, folder: Path, *, scratch: Path | None = None) -> list[str]:
    """Decode every image of a source in parallel, and return one error message for each image that cannot be decoded.

    The messages are in the order of the pairs. runtime.yaml sets the number of workers. Archives in `folder` are
    unpacked once below `scratch` (default: the folder `scratch` of runtime.yaml). Raises ValueError or
    FileNotFoundError if the annotation files of the source cannot be read.
    """
    runtime = load_runtime()
    files = open_source(source, folder, scratch or Path(runtime.scratch))
    paths = dict.fromkeys(path for pair in reader_of(source, files)(files) for path in pair.locate(files) if path)
    messages = spread(_decoder, paths, runtime, chunk=8)
    return [message for message in tqdm(messages, "decode", len(paths), unit="image", disable=None) if message]


def _decoder() -> Callable[[Path], str]:
    return _decoding_problem


def _decoding_problem(path: Path) -> str:
    """Return the reason why the image file cannot be decoded, or an empty string if it can be decoded."""
    try:
        open_image(path)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
