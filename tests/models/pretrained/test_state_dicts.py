"""State dicts loaded strictly, in part and by class name, and downloads."""

import hashlib
import urllib.error

import pytest
import torch

import models
from models.pretrained import state_dicts
from tests.model_helpers import assert_same_state
from utils.errors import WeightsError

URL = "https://example.org/files/net-{}.pth"


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def test_trained_weights():
    """Averaged weights come first, names lose `module.`, values that are no tensors are dropped."""
    one, two = torch.ones(1), torch.zeros(1)
    for saved in (
        {"a": one},
        {"module.a": one, "epoch": 3},
        {"state_dict": {"module.a": one}},
        {"model": {"a": one}, "ema": {}},
        {"model": {"a": two}, "ema": {"model": {"a": one}, "updates": 3}},
    ):
        assert state_dicts.trained_weights(saved) == {"a": one}


def test_load_strictly():
    net, source = models.build("resnet18", 3), models.build("resnet18", 3)
    state = source.state_dict()
    with_counters = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    state_dicts.load_strictly(net, with_counters, "x.pt")  # files before torch 0.4.1
    assert_same_state(net, source)
    for wrong, line in (
        ({**state, "more": torch.zeros(1)}, "1 tensors do not fit resnet18, the first: more is not in this network"),
        ({key: state[key] for key in state if key != "fc.bias"}, "fc.bias is missing"),
        ({**state, "fc.bias": torch.zeros(4)}, r"fc.bias is \(4,\), here \(3,\)"),
    ):
        with pytest.raises(WeightsError, match=f"x.pt: .*{line}"):
            state_dicts.load_strictly(net, wrong, "x.pt")


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_network_is_made_without_memory_first(name):
    with torch.device("meta"):
        outline = models.build(name, 2)
    assert all(value.is_meta for value in outline.state_dict().values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classification_headers.5.bias": torch.zeros(10**6)}, "tensors do not fit mb2-ssd-lite"),
        ({"classification_headers.5.bias": torch.zeros(())}, "without its last heads"),
        ({"regression_headers.5.bias": torch.zeros(0)}, "without its last heads"),
        ({"base_net.17.conv.7.weight": torch.zeros(())}, "base_net.17.conv.7.weight is missing or has another shape"),
        ({"base_net.17.conv.7.weight": torch.zeros(10**6)}, "width_mult 3125.0: must be from 0.1 to 4"),
        ({7: torch.zeros(1), "ema": torch.ones(2), "model": 3}, "unknown weights"),
    ],
)
def test_published_files_of_impossible_shapes(tmp_path, change, reason):
    state = {} if 7 in change else models.build("mb2-ssd-lite", 2, width_mult=0.2).state_dict()
    torch.save({**state, **change}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=f"x.pth: .*{reason}"):
        models.load(tmp_path / "x.pth")


def test_class_names_in_files_of_other_programs():
    for classes in (None, 3, torch.ones(2), [1, 2], [], {"a": 1}):
        assert state_dicts.names_in({"classes": classes}) is None
    assert state_dicts.names_in({"classes": ("a", "b")}) == ["a", "b"]


def test_load_matching_keeps_the_head_of_other_classes():
    source, net = models.build("mb1-ssd", 20), models.build("mb1-ssd", 5)
    head = net.classification_headers[0].weight.clone()
    loaded, total, skipped = state_dicts.load_matching(net, source.state_dict())
    assert (loaded, total, len(skipped)) == (190, 202, 12)
    assert all(name.startswith("classification_headers.") for name in skipped)
    torch.testing.assert_close(net.classification_headers[0].weight, head, rtol=0, atol=0)
    torch.testing.assert_close(net.regression_headers[0].weight, source.regression_headers[0].weight, rtol=0, atol=0)


@pytest.mark.parametrize("background", [False, True])
def test_load_with_classes_selects_the_rows_of_a_head(background):
    """Two anchors per cell, three classes, one of which and another order are wanted."""
    values = torch.arange(2.0 * (3 + background))
    net = torch.nn.ModuleDict({"head": torch.nn.Linear(1, 2 * (2 + background), bias=False)})
    net.name, net.num_classes, net.classes = "net", 2, ["cow", "ant"]
    weights = state_dicts.NetworkWeights("net", {"head.weight": values[:, None]}, 3, ["ant", "bee", "cow"], {}, "x.pt")
    line = state_dicts.load_with_classes(net, weights, ["head"], anchors_per_cell=2, background=background)
    assert line == "1 of 1 tensors loaded, 2 of its 3 classes by name"
    expected = [0, 3, 1, 4, 7, 5] if background else [2, 0, 5, 3]
    assert net["head"].weight.flatten().tolist() == expected


def test_fetch(tmp_path, monkeypatch):
    """An existing file is not downloaded again; a SHA-256 in the name is verified; errors name the URL and the path."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content, folder, downloads = b"weights", tmp_path / "hub" / "checkpoints", []

    def download(url, path, hash_prefix, progress):
        downloads.append(hash_prefix)
        with open(path, "wb") as file:
            file.write(content)
        if hash_prefix and not hashlib.sha256(content).hexdigest().startswith(hash_prefix):
            raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    digest = hashlib.sha256(content).hexdigest()[:8]
    for _ in range(2):
        assert state_dicts.fetch(URL.format(digest)).read_bytes() == content
    assert downloads == [digest]
    assert state_dicts.fetch(URL.format("mp-0_675")) == folder / "net-mp-0_675.pth"
    assert downloads == [digest, None]
    with pytest.raises(
        WeightsError, match=r"cannot download https://example.org/.* \(invalid hash value\); put it at "
    ):
        state_dicts.fetch(URL.format("00000000"))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsError, match=rf"no network.*put it at {folder / 'net-11111111.pth'}"):
        state_dicts.fetch(URL.format("11111111"))
