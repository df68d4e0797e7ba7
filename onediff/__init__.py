"""OneDiff: two images in, one sentence about what changed out."""

import os

# OpenMP threads sleep while they wait. Spinning threads make torch many times slower when another process uses the
# cores. OpenMP reads the variable once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
