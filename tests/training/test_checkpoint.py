import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training import small_run
from training import checkpoint, run_folder
from training.checkpoint import Progress
from training.ema import Ema
from utils.errors import UsageError, WeightsError

STEPS = 12


@pytest.fixture
def folder(tmp_path):
    return small_run.make(tmp_path / "run")


class Small(nn.Linear):
    def __init__(self, **arguments):
        super().__init__(2, 2)
        self.arguments = arguments


def small_parts(optimizer="SGD", ema=0.0, **arguments):
    net = Small(**arguments)
    return {
        "model": net,
        "optimizer": getattr(torch.optim, optimizer)(net.parameters(), lr=0.1),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "ema": Ema(net, ema),
    }


def saved_run(folder, ema=0.0, **arguments):
    """The checkpoint of a run of one step whose averages are all 7."""
    parts = small_parts(ema=ema, **arguments)
    for average in parts["ema"].averages.values():
        average.fill_(7)
    run_folder.save(folder, {**parts, **vars(Progress(step=1)), "arguments": arguments})
    return checkpoint.read(folder / "last.pt")


def refusal(saved, parts):
    with pytest.raises(UsageError) as caught:
        checkpoint.restore(saved, parts)
    assert "\n" not in str(caught.value)
    assert saved["file"] in str(caught.value)
    return str(caught.value)


def test_progress_counts_validations_since_the_best():
    progress, results = Progress(), []
    for step, value in enumerate([math.nan, 0.2, 0.2, 0.1, torch.tensor(0.5), math.nan, math.inf], start=1):
        progress.step, progress.validation_due = step, True
        results.append(progress.record(value, higher_is_better=True))
        assert not progress.validation_due
    assert results == [False, True, False, False, True, False, False]
    assert (progress.best, progress.best_step, progress.stale) == (0.5, 5, 2)
    assert progress.record(0.4, higher_is_better=False)


def test_an_infinite_loss_is_never_the_best():
    progress = Progress()
    assert not progress.record(math.inf, higher_is_better=False)
    assert progress.best is None


def test_a_checkpoint_from_before_interrupted_validations_were_known_has_none(folder):
    saved = torch.load(folder / "last.pt", weights_only=True)
    del saved["validation_due"], saved["checksum"]
    torch.save(saved, folder / "old.pt")
    assert checkpoint.restore(checkpoint.read(folder / "old.pt"), small_run.parts()[1]).validation_due is False


@pytest.mark.filterwarnings("ignore:.*slow:UserWarning")
@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "fp32"), ("adamw", "bf16"), ("adamw", "fp16")])
def test_resume_is_exact_to_the_bit(tmp_path, optimizer, precision):
    whole, first, second = (small_run.parts(optimizer, precision=precision) for _ in range(3))
    small_run.train(tmp_path / "whole", *whole, STEPS)
    small_run.train(tmp_path / "cut", *first, 5)
    saved = checkpoint.read(tmp_path / "cut" / "last.pt")
    before = checkpoint.fingerprint(saved)
    torch.manual_seed(99)
    run, parts, _ = second
    progress = checkpoint.restore(saved, parts)
    assert progress == first[2]
    assert checkpoint.fingerprint(parts) == before
    small_run.train(tmp_path / "cut", run, parts, progress, STEPS)
    assert checkpoint.fingerprint(saved) == before, "training wrote into what was read"

    one, two = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(two)
    assert one["scaler"] == two["scaler"]
    assert progress == whole[2]
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    assert one["ema"]["updates"] == two["ema"]["updates"] == STEPS
    torch.testing.assert_close(one["ema"]["model"], two["ema"]["model"], rtol=0, atol=0)


def test_a_checkpoint_is_a_flat_dict_of_plain_values(folder):
    saved = torch.load(folder / "last.pt", weights_only=True)
    fields = {"step", "epoch", "best", "best_step", "stale", "validation_due"}
    assert set(saved) == {"format_version", "model", "optimizer", "scaler", "ema", "flags", "checksum"} | fields
    assert saved["flags"]["out"] == "runs/x"
    assert saved["best"] == 1 / 3 + 4 / 7
    assert saved["model"]._metadata, "the versions of the modules are kept"
    with pytest.raises(TypeError, match=r"checkpoint value flags.a\[1\] is a set"):
        checkpoint.write(folder / "x.pt", {"flags": {"a": [1, {2}]}})
    assert not (folder / "x.pt").exists()


def test_a_flipped_bit_is_noticed(folder):
    data = bytearray((folder / "last.pt").read_bytes())
    weights = checkpoint.read(folder / "last.pt")["model"]["5.weight"].numpy().tobytes()
    data[data.index(weights) + 7] ^= 1
    (folder / "last.pt").write_bytes(data)
    with pytest.raises(WeightsError, match="truncated or damaged at"):
        checkpoint.read(folder / "last.pt")


@pytest.mark.parametrize(("part", "place"), [("model", "1.running_var"), ("ema", "ema: 1.running_var")])
def test_weights_that_are_not_finite_are_refused(folder, part, place):
    saved = torch.load(folder / "last.pt", weights_only=True)
    tensors = saved["model"] if part == "model" else saved["ema"]["model"]
    tensors["1.running_var"][2] = math.nan
    checkpoint.write(folder / "last.pt", saved)
    with pytest.raises(WeightsError, match=f"last.pt: {place} contains NaN or infinity"):
        checkpoint.read(folder / "last.pt")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_state_of_the_optimizer_must_fit(tmp_path, optimizer):
    run, parts, progress = small_run.parts(optimizer)
    small_run.train(tmp_path, run, parts, progress, 2)
    saved = checkpoint.read(tmp_path / "last.pt")
    state, groups = saved["optimizer"]["state"], saved["optimizer"]["param_groups"]
    name = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    other = small_run.parts(optimizer)[1]

    def refused(**change):
        return refusal({**saved, "optimizer": {**saved["optimizer"], **change}}, other)

    for wrong in ({}, 3, {**state[0], name: "text"}, {**state[0], name: state[0][name][:1]}):
        message = refused(state={**state, 0: wrong})
        assert "its optimizer's state of parameter 0 ((4, 3, 3, 3)) does not fit: needed are tensors" in message
        assert name in message
    assert "state of parameter 6 (no parameter) does not fit" in refused(state={**state, 6: state[0]})
    for wrong in ({**groups[0], "lr": "text"}, {**groups[0], "params": 3}, {"lr": 0.1}):
        assert "a group of its optimizer has no lr or no list of params" in refused(param_groups=[wrong, groups[1]])
    assert checkpoint.restore(saved, other).step == 2


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, zipped):
    def written(value):
        torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        return tmp_path / "x.pt"

    with pytest.raises(UsageError, match=r"x.pt: bare weights \(2 tensors\).*use --weights .*x.pt; .* last.pt"):
        checkpoint.read(written(nn.Linear(2, 2).state_dict()))
    with pytest.raises(UsageError, match=r"x.pt: weights, not a checkpoint of a run .*--weights"):
        checkpoint.read(written({"epoch": 1, "state_dict": {}}))
    with pytest.raises(UsageError, match="format 2, this program knows 1; update it"):
        checkpoint.read(written({"format_version": 2, "step": 3}))


def test_weights_alone_are_not_a_checkpoint(tmp_path):
    checkpoint.write(tmp_path / "backbone.pt", {"model": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match=r"no step\); .* use --weights .*backbone.pt; to continue a run .* last.pt"):
        checkpoint.read(tmp_path / "backbone.pt")


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_evaluation_needs_no_flag_of_the_run_and_uses_its_averages(tmp_path, decay):
    saved, parts = saved_run(tmp_path, ema=0.9), small_parts("AdamW", ema=decay)
    assert checkpoint.restore(saved, parts, for_evaluation=True).step == 1
    for value in parts["model"].state_dict().values():
        torch.testing.assert_close(value, torch.full_like(value, 7))


def test_an_evaluation_of_a_run_without_averages_uses_its_weights(tmp_path):
    saved, parts = saved_run(tmp_path), small_parts("AdamW", ema=0.5)
    checkpoint.restore(saved, parts, for_evaluation=True)
    torch.testing.assert_close(dict(parts["model"].state_dict()), dict(saved["model"]))


def test_averages_are_not_dropped_silently(tmp_path):
    with pytest.raises(UsageError, match=r"last.pt: ema was on in that run and is off now; resume with its --ema"):
        checkpoint.restore(saved_run(tmp_path, ema=0.9), small_parts())


@pytest.mark.parametrize("for_evaluation", [False, True])
def test_a_network_of_other_arguments_is_refused(tmp_path, for_evaluation):
    saved = saved_run(tmp_path, anchor_scale=2.0, radar=True)
    with pytest.raises(UsageError, match=r"anchor_scale 2.0, this run's has 4.0; give --anchor-scale as in that run"):
        checkpoint.restore(saved, small_parts(anchor_scale=4.0, radar=True), for_evaluation)
    with pytest.raises(UsageError, match=r"radar True, this run's has False; give --pointcloud"):
        checkpoint.restore(saved, small_parts(anchor_scale=2.0, radar=False), for_evaluation)
    assert checkpoint.restore(saved, small_parts(anchor_scale=2.0, radar=True, new=1), for_evaluation).step == 1


def test_checkpoints_older_than_an_argument(tmp_path):
    """The first checkpoints of an SSD do not have `priors`; theirs are scaled."""
    saved = saved_run(tmp_path)
    assert checkpoint.restore(saved, small_parts(priors="scaled")).step == 1
    with pytest.raises(UsageError, match="priors scaled, this run's has jetson; give --priors as in that run"):
        checkpoint.restore(saved, small_parts(priors="jetson"))


def test_the_number_of_proposals_may_change(tmp_path):
    saved = saved_run(tmp_path, proposals=100)
    assert checkpoint.restore(saved, small_parts(proposals=300), for_evaluation=True).step == 1


def test_restore_names_what_is_missing_or_does_not_fit(folder):
    saved = checkpoint.read(folder / "last.pt")
    less = {name: value for name, value in saved.items() if name not in ("optimizer", "epoch")}
    _, parts, _ = small_run.parts()
    assert "optimizer, epoch missing" in refusal(less, parts)
    assert "its optimizer is SGD, this run's AdamW" in refusal(saved, small_run.parts(optimizer="adamw")[1])
    assert "ema was off in that run and is on now; resume with its --ema" in refusal({**saved, "ema": {}}, parts)
    net = nn.Sequential(*small_run.network()[:5], nn.Linear(64, 6))
    message = refusal(saved, {**parts, "model": net})
    assert "model does not fit this network, 2 of 9 tensors: 5.weight is (2, 64), here (6, 64)" in message
    optimizer = torch.optim.SGD(parts["model"].parameters(), lr=0.1, momentum=0.9)
    message = refusal(saved, {**parts, "optimizer": optimizer})
    assert "its optimizer has groups [('base_net', 2), ('heads', 4)], this run's [(None, 6)]" in message
    other = {**saved["ema"], "model": {"x": torch.zeros(1)}}
    assert "ema does not fit" in refusal({**saved, "ema": other}, parts)


def test_settings_of_the_optimizer_are_those_of_the_flags(folder):
    _, parts, _ = small_run.parts()
    for group in parts["optimizer"].param_groups:
        group.update(weight_decay=0.5, base_lr=0.3)
    checkpoint.restore(checkpoint.read(folder / "last.pt"), parts)
    group = parts["optimizer"].param_groups[0]
    assert (group["weight_decay"], group["base_lr"], group["lr"]) == (0.5, 0.3, 0.1 / 4)


def test_changed_flags_are_listed():
    before = {"epochs": 30, "lr": 0.1, "data": ["a"], "out": "x", "resume": "", "old": 1}
    now = {"epochs": 60, "lr": 0.1, "data": ["a"], "out": Path("x"), "resume": "auto", "new": 2}
    assert checkpoint.changed_flags(before, now) == ["epochs: 30 -> 60"]


def test_fingerprint_depends_on_names_shapes_and_bits():
    def of(**model):
        return checkpoint.fingerprint({"model": model, "step": 3})

    one = torch.tensor([1.0, 2.0])
    assert of(a=one, b=one[0]) == of(b=one[0].clone(), a=one.clone())
    seen = {of(a=one), of(b=one), of(a=one[:, None]), of(a=one.bfloat16()), of(a=one + 1e-7), of(a=-one), of()}
    assert len(seen) == 7
    square = torch.rand(2, 3, 4, 4)
    assert of(a=square) == of(a=square.to(memory_format=torch.channels_last))


def test_command_line_prints_the_fingerprint(folder, capsys):
    checkpoint.main([str(folder / "last.pt")])
    digest = checkpoint.fingerprint(checkpoint.read(folder / "last.pt"))
    assert capsys.readouterr().out == f"{folder / 'last.pt'} epoch 0 step 4 sha256 {digest}\n"
