"""Log levels of the libraries that this project uses."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Hide log messages of libraries below level ERROR, and the progress bars of transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    warnings.filterwarnings("ignore", module="torch|transformers|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
