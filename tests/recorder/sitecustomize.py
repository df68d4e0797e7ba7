"""Python imports this at its start where this folder is on PYTHONPATH: the stages of a pipeline note what they read."""

import recorded_params  # noqa: F401
