"""Python imports this module when it starts if this folder is on PYTHONPATH, so that stages record what they read."""

import recorded_params  # noqa: F401
