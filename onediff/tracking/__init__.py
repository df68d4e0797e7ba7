"""MLflow tracking: connection.py (address, client, errors), runs.py (training runs), evaluation.py (scores), ui.py."""

from onediff.tracking.connection import (
    HOME,
    SERVER,
    all_pages,
    check,
    client,
    exists,
    experiment_id,
    first_line,
    http_status,
    lookup,
    plain_errors,
    uri,
    where,
    without_password,
)
from onediff.tracking.evaluation import log_evaluation
from onediff.tracking.runs import PARENT, Run, flatten, parent_run, phase_run, provenance

__all__ = ["HOME", "PARENT", "SERVER", "Run", "all_pages", "check", "client", "exists", "experiment_id", "first_line",
           "flatten", "http_status", "log_evaluation", "lookup", "parent_run", "phase_run", "plain_errors",
           "provenance", "uri", "where", "without_password"]
