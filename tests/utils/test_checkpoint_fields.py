import math

import pytest
import torch

from utils import checkpoint_fields
from utils.errors import WeightsError

WHOLE = {
    "format_version": 1,
    "architecture": "mb1-ssd",
    "arguments": {"priors": "scaled"},
    "num_classes": 2,
    "classes": ["a", "b"],
    "image_mean": (127, 127.0, 0),
    "image_std": [128, 1.5, 1],
    "image_size": (300, 300),
    "model": {"x": torch.zeros(1)},
    "ema": {},
    "optimizer": {"class": "SGD", "state": {0: {}}, "param_groups": [{"lr": 0.1}]},
    "scaler": {},
    "plateau": {"factor": 0.1, "best": math.inf, "stale": 2, "loss": 1.5, "steps": 3},
    "step": 3,
    "best": None,
    "flags": {"lr": 0.1, "milestones": [3.0], "score_threshold": 0.5, "resume": ""},
}


def test_a_whole_checkpoint_and_files_that_are_not_ours():
    checkpoint_fields.check("x.pt", WHOLE)
    checkpoint_fields.check("x.pt", {"step": "text", "classes": 3})


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("step", "3", "step is '3', must be a whole number from 0"),
        ("step", -1, "step is -1, must"),
        ("step", math.nan, "step is nan, must"),
        ("step", True, "step is True, must"),
        ("best", math.nan, "best is nan, must be a number or None"),
        ("format_version", None, "format_version is None, must"),
        ("classes", None, "classes is None, must be a list of names"),
        ("classes", ["a", 2], "classes is a list, must be a list of names"),
        ("classes", ["a", "b\nc"], "classes is a list, must be a list of names"),
        ("classes", ["a", "\ud800"], "classes is a list, must be a list of names"),
        ("classes", ["a"], "classes has 1 names, num_classes is 2"),
        ("num_classes", 10**9, "num_classes is 1000000000, must be a whole number from 1 to 100000"),
        ("image_size", (10**6, 10**6), "image_size is a tuple, must be a whole number from 1 to 8192 or two of them"),
        ("image_size", -1, "image_size is -1, must"),
        ("image_size", "big", "image_size is 'big', must"),
        ("min_side", 0, "min_side is 0, must"),
        ("max_side", 10**6, "max_side is 1000000, must"),
        ("image_std", (1, 0, 1), "image_std is a tuple, must be three numbers above 0"),
        ("arguments", {7: 1}, "arguments is a dict, must be a dict of arguments by name"),
        ("arguments", {"proposals": 10**9}, "arguments.proposals is 1000000000, must"),
        ("model", {7: torch.zeros(1)}, "model is a dict, must be a dict of tensors by name"),
        ("model", {"a": "text"}, "model is a dict, must be a dict of tensors by name"),
        ("ema", {"updates": 3}, "not a complete checkpoint: ema.model missing"),
        ("ema", {"updates": 3, "model": {"a": 1}}, "ema.model is a dict, must be"),
        ("scaler", {"scale": "text"}, "scaler is a dict, must be a dict of numbers"),
        ("plateau", {"factor": math.nan}, "plateau is a dict, must be a dict of numbers"),
        ("optimizer", {"state": {"a": {}}}, "optimizer.state is a dict, must be a dict by parameter"),
        ("optimizer", {"param_groups": 3}, "optimizer.param_groups is 3, must be a list of dicts"),
        ("flags", [1], "flags is a list, must be a dict of plain values by name"),
        ("flags", {"lr": torch.zeros(1)}, "flags is a dict, must be a dict of plain values by name"),
        ("flags", {"score_threshold": "x" * 1000}, "flags.score_threshold is 'x"),
    ],
)
def test_a_field_of_another_kind_is_named(field, value, reason):
    with pytest.raises(WeightsError) as caught:
        checkpoint_fields.check("x.pt", {**WHOLE, field: value})
    assert str(caught.value).startswith(f"x.pt: {reason}")
    assert len(str(caught.value)) < 200 and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", checkpoint_fields.WITH_ARCHITECTURE)
def test_what_a_network_is_built_from_must_be_there(field):
    contents = {name: value for name, value in WHOLE.items() if name != field}
    with pytest.raises(WeightsError, match=f"x.pt: not a complete checkpoint: {field} missing; use another copy"):
        checkpoint_fields.check("x.pt", contents)
