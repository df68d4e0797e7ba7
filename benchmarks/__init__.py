"""Scripts that print one table each: `python -m benchmarks.NAME`."""

import onediff  # noqa: F401  (sets the OpenMP variables before a script loads torch)
