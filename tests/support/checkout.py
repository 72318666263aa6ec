"""Where the checkout is: tests read its pages, run its examples and start processes that import its modules."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
"""For a process that imports the package and modules of ``tests/support``."""
