"""A small nuScenes data set, written once. Tests that change files write their own."""

import pytest

from tests.small_nuscenes import SmallNuScenes


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return SmallNuScenes(tmp_path_factory.mktemp("nuscenes"))
