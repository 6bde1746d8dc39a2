"""What only a GPU can show. `make test-gpu` runs these tests and `make test` leaves them out.

SIGHTLINE_TEST_DEVICE=cpu runs them on a CPU, except those that need CUDA, to see whether they run at all:

    SIGHTLINE_TEST_DEVICE=cpu .venv/bin/python -m pytest -q tests/gpu
"""

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.recording import record
from tests.script_helpers import Script
from tests.test_scripts import COMPARABLE

DEVICE = os.environ.get("SIGHTLINE_TEST_DEVICE", "cuda")
STEPS = 20
RUN = ["--max-steps", STEPS, "--save-every-steps", STEPS // 2, "--ema", 0.9]
EXACT = ["--precision", "fp32", "--deterministic"]  # without TF32
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, as early as its first use


def pytest_collection_modifyitems(items):
    no_gpu = DEVICE != "cpu" and not torch.cuda.is_available()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if no_gpu or (DEVICE == "cpu" and item.get_closest_marker("needs_cuda")):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def trained(drawn, tmp_path_factory):
    """A function: (name of a script, precision) -> the Record of 20 steps on the device, trained once. Its run folder
    is not to be changed."""
    records = {}

    def train(name, precision):
        if (name, precision) not in records:
            out = tmp_path_factory.mktemp("trained") / f"{name}_{precision}"
            words = [*RUN, "--device", DEVICE, "--precision", precision]
            records[name, precision] = record(Script(name, drawn(name)), out, *words)
        return records[name, precision]

    return train


@pytest.fixture(scope="session")
def comparable(drawn, tmp_path_factory):
    """A function: name of a script -> (Record of three steps on the device, its flags), from which other devices differ
    by rounding alone. Its run folder is not to be changed."""
    records = {}

    def train(name):
        if name not in records:
            words = ["--max-steps", 3, "--log-every", 1, "--optimizer", "sgd", *EXACT, *COMPARABLE[name].split()]
            out = tmp_path_factory.mktemp("comparable") / name
            records[name] = record(Script(name, drawn(name)), out, *words, "--device", DEVICE), words
        return records[name]

    return train
