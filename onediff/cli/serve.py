"""The command `onediff serve`."""

from pathlib import Path
from typing import Annotated

import typer

from onediff.cli.output import Model, path_option, print_text, print_warning
from onediff.paths import CHAMPION


def serve(model: Model = CHAMPION,
          host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 listens on every network.")] =
          "127.0.0.1",
          port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 chooses a free one.")] = 8000,
          api_key_file: Annotated[Path | None, path_option(
              "--api-key-file", help="A file with the API key that clients must send. Without this option, the key is "
                                     "in the environment variable ONEDIFF_API_KEY; without both, no key is "
                                     "needed.")] = None) -> None:
    """Serve a page and an API that say what changed between two images.

    The server follows the champion: a new champion takes over without an interruption. runtime.yaml sets the limits of
    the server, in its section `serve`. docs/serving.md explains the API.

    Example: onediff serve

    Example: onediff serve --model data/models/tune --port 8080
    """
    from onediff.ops.serving import read_key
    from onediff.ops.serving import serve as run_server

    key = read_key(api_key_file)
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        print_warning("onediff: everyone who can connect to this machine can use the server, because it has no API "
                      "key; use --api-key-file, or set ONEDIFF_API_KEY")
    run_server(model, host=host, port=port, api_key=key,
               report=lambda address: print_text(f"OneDiff serves {model} at {address}; Ctrl-C stops it"))
