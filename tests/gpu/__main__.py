"""make test-gpu: these tests, or one line on a machine without a GPU."""

import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    sys.exit(pytest.main(["-q", "--durations=10", str(Path(__file__).parent), *sys.argv[1:]]))
print(f"no GPU: nothing to test (torch {torch.__version__})")
