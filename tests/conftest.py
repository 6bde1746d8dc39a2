"""Fixtures that the tests of several packages use, and which tests run where."""

import functools
import os
from pathlib import Path

import pytest
import torch

from tests import script_helpers

SHARED = Path(os.environ.get("SIGHTLINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_modifyitems(config, items):
    """Without the folder of real data, leave out the tests that read it."""
    if (SHARED / "data").is_dir():
        return
    realdata = [item for item in items if item.get_closest_marker("realdata")]
    items[:] = [item for item in items if item not in realdata]
    config.hook.pytest_deselected(items=realdata)


@pytest.fixture(scope="session")
def shared():
    """The folder of small real data sets beside the project, or where SIGHTLINE_SHARED says; for `realdata` tests."""
    return SHARED


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A function: name of a training script -> the folder of its synthetic data set, drawn once. Not to be changed."""
    return functools.cache(lambda name: _draw(name, tmp_path_factory.mktemp("drawn") / name))


@pytest.fixture(scope="session")
def drawn_voc(drawn):
    """A VOC data set of 24 synthetic images."""
    return drawn("ssd")


@pytest.fixture(autouse=True)
def one_thread():
    """Tests are many small computations: more threads only wait for each other."""
    torch.set_num_threads(1)


def _draw(name, folder):
    draw, images = script_helpers.DRAW[name]
    return draw(folder, images=images, seed=1)
