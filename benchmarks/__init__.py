"""Benchmark scripts. Each script is run as `python -m benchmarks.NAME` and prints one table."""

import onediff  # noqa: F401  (The import sets OpenMP variables before a script loads torch.)
