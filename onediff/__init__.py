"""OneDiff describes in one sentence what changed between two images."""

import os

# OpenMP threads wait by spinning, which makes torch many times slower if another process uses the same CPU cores.
# These environment variables let a waiting thread sleep after 1,000 spins; `python -m benchmarks.busy` measures this.
# These environment variables must be set before torch is imported, because OpenMP reads them only once.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
