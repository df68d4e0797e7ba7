"""Connect the server with the registry: which version should serve, and how a version is loaded and checked."""

from __future__ import annotations

import atexit
import gc
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onediff import interrupts, tracking
from onediff.config import Runtime, load_runtime
from onediff.encoding import read_text
from onediff.eval.analysis.behaviour import GRAMMARS
from onediff.library_logs import silence_libraries
from onediff.model.digest import checked_digests
from onediff.ops.predict import folder_of
from onediff.registry import NAME, version_tags
from onediff.serve.http.port import address, listener
from onediff.serve.usage_log import usage_log

if TYPE_CHECKING:
    from onediff.serve.http.captioning import Version

KEY_VARIABLE = "ONEDIFF_API_KEY"


def serve(model: str, *, host: str, port: int, api_key: str | None, report: Callable[[str], None]) -> None:
    """Serve the model at the address until a signal stops the process.

    `model` is a model folder or the address of a registered version. If this address contains an alias, such as
    @champion, the server follows the alias. `report` gets the address of the server. Raises the errors of
    `Captioner.load` and of the registry, and OSError if the port cannot be opened.
    """
    runtime = load_runtime()
    if model.startswith("models:/"):
        tracking.check()  # A server that does not answer is reported at once, before torch is imported.
    else:
        folder_of(model)
    with listener(host, port) as opened:
        threading.Thread(target=_import_model, daemon=True).start()
        from onediff.serve.http.app import create_app
        from onediff.serve.http.server import run
        from onediff.serve.http.service import Service

        report(address(opened, host))
        service = Service(runtime.serve, current=lambda: current_version(model),
                          load=lambda name: load_version(model, name, runtime))
        run(service, create_app(service, api_key=api_key), opened)
    atexit.register(_end_quickly)


def _end_quickly() -> None:
    """Let Python end without a last garbage collection, which takes seconds on a busy machine.

    A second Ctrl-C then ends the process at once: Python would print the stack trace of a clean-up function of torch.
    """
    gc.freeze()
    interrupts.use_default_actions()


def _import_model() -> None:
    """Import the libraries of the model in another thread while the server starts and the registry is asked."""
    silence_libraries()
    import onediff.model.captioner  # noqa: F401


def current_version(model: str) -> str:
    """Return the number of the version with this address, or the name of the model folder.

    Raises ValueError if the version does not exist, or if the champion never passed the promotion rules.
    """
    if not model.startswith("models:/"):
        return Path(model).resolve().name
    return version_tags(model)["version"]


def load_version(model: str, name: str, runtime: Runtime) -> Version:
    """Load the version `name` of the model that is served, after comparing its files with the registered digest.

    Only weights, configurations and tokenizer are read: the file MLmodel is ignored, and no code in the folder is run.
    Raises the errors of `Captioner.load`, and ValueError if the files were changed.
    """
    from onediff.model.captioner import Captioner
    from onediff.serve.http.captioning import Version

    source = f"models:/{NAME}/{name}" if model.startswith("models:/") else model
    folder = folder_of(source)
    digests = checked_digests(folder)
    captioner = Captioner.load(folder, device=runtime.device)
    # The loaded weights are a view of the file: a change of the file would change the captions, or end the process.
    for weights in (*captioner.model.parameters(), *captioner.model.buffers()):
        weights.data = weights.data.clone()
    return Version(name, digests.folder, captioner, claims_change, usage_log(runtime, source, folder))


def claims_change(caption: str) -> bool | None:
    """Return whether a caption says that something changed, or None if no grammar can read it."""
    kinds = {grammar.read(caption).change_type for grammar in GRAMMARS.values()} - {None}
    return kinds != {"none"} if kinds else None


def read_key(path: Path | None) -> str | None:
    """Return the API key in the file, or else in the environment variable ONEDIFF_API_KEY, or None if there is none.

    Raises ValueError for a key that is empty or cannot stand in a header, and FileNotFoundError if the file does not
    exist.
    """
    key = os.environ.get(KEY_VARIABLE) if path is None else read_text(path, "a text file with the API key")
    if key is not None and not key.strip():
        raise ValueError(f"{path or KEY_VARIABLE}: must contain the API key, but is empty: write a key of your choice, "
                         "or leave it out to serve without a key")
    key = key and key.strip()
    if key and not re.fullmatch("[!-~]+", key):
        raise ValueError(f"{path or KEY_VARIABLE}: the API key must be one word of ASCII letters, digits and signs, "
                         "because clients send it in a header; choose another key")
    return key
