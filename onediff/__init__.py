"""OneDiff: two images in, one sentence about what changed out."""

import os

# OpenMP threads that wait for each other spin. Beside another process on the same cores, that makes torch many times
# slower, so here a thread sleeps after about 1,000 rounds. `python -m benchmarks.busy` measures it. OpenMP reads the
# variables once, when torch is loaded; GOMP_SPINCOUNT is more exact than the policy, which would be 0 rounds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
