"""Settings of every test: few threads, no compilation, examples importable as scripts import each other."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # before torch is imported: BitNet layers compile otherwise

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
