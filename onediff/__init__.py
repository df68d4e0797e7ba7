"""OneDiff describes in one sentence what changed between two images."""

import os

# By default an OpenMP thread that waits for another one spins, and if another process uses the same cores, this makes
# torch many times slower. With these variables a waiting thread sleeps after 1,000 spins; the policy alone would mean
# 0 spins. OpenMP reads the variables once, when torch is loaded. `python -m benchmarks.busy` measures the effect.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
