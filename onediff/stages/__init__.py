"""One module for each stage of dvc.yaml, run as `python -m onediff.stages.STAGE`."""

from onediff import interrupts

interrupts.end_while_importing()
