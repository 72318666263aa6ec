"""Settings for all tests: one thread, no compiler, and the scripts of ``examples/`` can be imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
torch.set_num_threads(1)
