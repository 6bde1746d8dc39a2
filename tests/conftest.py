"""Fixtures that more than one room's tests use."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from data import drawn


@pytest.fixture(scope="session")
def shared():
    """The folder of small real data beside the project (SIGHTLINE_SHARED names another); without it the test skips."""
    folder = Path(os.environ.get("SIGHTLINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no small real data at {folder}: clone it there or set SIGHTLINE_SHARED")
    return folder


@pytest.fixture
def golden(shared):
    """golden.py of the golden outputs, as a module."""
    spec = importlib.util.spec_from_file_location("golden", shared / "upstream" / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def drawn_voc(tmp_path_factory):
    """A VOC set of 24 drawn pictures."""
    return drawn.draw_voc(tmp_path_factory.mktemp("drawn") / "voc", images=24, seed=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests are many small computations: more threads only wait for each other."""
    torch.set_num_threads(1)
