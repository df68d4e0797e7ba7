"""Large blocks that were freed are used again without new page faults."""

import subprocess
import sys

import pytest

CODE = """
import resource
from onediff.allocator import keep_freed_memory
if {kept}:
    keep_freed_memory()
def touch():
    bytearray(64 * 2**20)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, kept: bool) -> int:
    done = subprocess.run([sys.executable, "-c", CODE.format(kept=kept)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt belongs to glibc")
def test_freed_blocks_cause_no_new_page_faults() -> None:
    assert faults(kept=True) < faults(kept=False) / 10
