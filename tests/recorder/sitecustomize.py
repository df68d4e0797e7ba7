"""Makes each Python process record the parameters that a stage reads, if this folder is on PYTHONPATH.

Python imports a module of this name when it starts.
"""

import recorded_params  # noqa: F401
