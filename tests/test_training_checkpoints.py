import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from training import checkpoints, devices
from training.flags import UsageError

STEPS = 12


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)
    )
    return net.to(memory_format=torch.channels_last)


def groups(net):
    return [
        {"params": net[0].parameters(), "lr": 0.1, "base_lr": 0.1, "name": "base_net"},
        {"params": [*net[1].parameters(), *net[5].parameters()], "lr": 0.01, "base_lr": 0.01, "name": "heads"},
    ]


def parts(optimizer="sgd", ema=0.9, precision="fp32"):
    """A small run: Run, state, Progress."""
    run = devices.setup(device="cpu", precision=precision)
    net = network()
    if optimizer == "sgd":
        made = torch.optim.SGD(groups(net), lr=0.1, momentum=0.9, weight_decay=1e-4)
    else:
        made = torch.optim.AdamW(groups(net), lr=0.1)
    state = {"model": net, "optimizer": made, "scaler": run.scaler, "ema": checkpoints.Ema(net, ema)}
    return run, state, checkpoints.Progress()


def train(folder, run, state, progress, until):
    net, optimizer, scaler = state["model"], state["optimizer"], state["scaler"]
    while progress.step < until:
        step = progress.step + 1
        run.seed_step(step)
        images = torch.rand(2, 3, 6, 6)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] / step
        with run.autocast():
            loss = net(images).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state["ema"].update(net)
        progress.step = step
        progress.improved(1 / 3 + step / 7)
    checkpoints.save(folder, {**state, "progress": progress, "flags": {"lr": 0.1, "out": Path("runs/x")}})


@pytest.fixture
def folder(tmp_path):
    """A run of 4 steps saved at 2 and 4."""
    folder = tmp_path / "run"
    run, state, progress = parts()
    train(folder, run, state, progress, 2)
    train(folder, run, state, progress, 4)
    return folder


def cut(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def read_step(path):
    return checkpoints.read(path)["step"]


@pytest.mark.filterwarnings("ignore:.*slow:UserWarning")
@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "fp32"), ("adamw", "bf16"), ("adamw", "fp16")])
def test_resume_is_exact_to_the_bit(tmp_path, optimizer, precision, capsys):
    whole, first, second = (parts(optimizer, precision=precision) for _ in range(3))
    train(tmp_path / "whole", *whole, STEPS)
    train(tmp_path / "cut", *first, 5)
    saved = checkpoints.open_run(tmp_path / "cut", "auto")
    before = checkpoints.fingerprint(saved)
    torch.manual_seed(99)
    checkpoints.restore(saved, second[1], second[2])
    assert f"resumed epoch 0 step 5 lr {0.1 / 5:.1e}" in capsys.readouterr().out
    assert checkpoints.fingerprint(second[1]) == before
    train(tmp_path / "cut", *second, STEPS)
    assert checkpoints.fingerprint(saved) == before, "training wrote into what was read"

    one, two = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(two)
    assert one["scaler"] == two["scaler"]
    assert second[2] == whole[2]
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    assert one["ema"]["updates"] == two["ema"]["updates"] == STEPS
    torch.testing.assert_close(one["ema"]["model"], two["ema"]["model"], rtol=0, atol=0)


def test_a_checkpoint_is_a_flat_dict_of_plain_values(folder):
    saved = torch.load(folder / "last.pt", weights_only=True)
    fields = {"step", "epoch", "best", "best_step", "stale"}
    assert set(saved) == {"format_version", "model", "optimizer", "scaler", "ema", "flags"} | fields
    assert saved["flags"]["out"] == "runs/x"
    assert saved["best"] == 1 / 3 + 4 / 7
    assert saved["model"]._metadata, "the versions of the modules are kept"
    with pytest.raises(TypeError, match=r"checkpoint value flags.a\[1\] is a set"):
        checkpoints.save(folder, {"flags": {"a": [1, {2}]}})


def test_two_are_kept_and_copies_stay(folder):
    assert (read_step(folder / "last.pt"), read_step(folder / "previous.pt")) == (4, 2)
    _, state, progress = parts()
    progress.step, progress.epoch = 6, 3
    checkpoints.save(folder, {**state, "progress": progress}, epoch_copy=3, step_copy=6, best=True)
    progress.step = 8
    for _ in range(2):
        checkpoints.save(folder, {**state, "progress": progress})
    names = ["last.pt", "previous.pt", "best.pt", "epoch_003.pt", "step_000006.pt"]
    assert [read_step(folder / name) for name in names] == [8, 8, 6, 6, 6]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_copies_without_hard_links(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    _, state, progress = parts()
    progress.step = 6
    checkpoints.save(folder, {**state, "progress": progress}, best=True)
    assert [read_step(folder / name) for name in ("last.pt", "previous.pt", "best.pt")] == [6, 4, 6]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(11))
def test_killed_between_any_two_steps_of_a_save(folder, monkeypatch, call):
    """A whole last.pt, old or new, is there at every moment; and the next save works."""
    calls = []

    def watched(function):
        def wrapper(*arguments):
            calls.append(function)
            if len(calls) == call + 1:
                raise Killed
            return function(*arguments)

        return wrapper

    def unlink(path, missing_ok=False):  # a killed process cleans nothing up
        if len(calls) <= call:
            real_unlink(path, missing_ok=missing_ok)

    _, state, progress = parts()
    progress.step = 6
    real_unlink = Path.unlink
    with monkeypatch.context() as patch:
        for name in ("link", "replace", "fsync"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(torch, "save", watched(torch.save))
        patch.setattr(Path, "unlink", unlink)
        try:
            checkpoints.save(folder, {**state, "progress": progress}, best=True)
        except Killed:
            pass
        else:
            assert len(calls) <= call
    saved = checkpoints.open_run(folder, "auto")
    assert saved["step"] in (4, 6)
    assert Path(saved["file"]).name == "last.pt"
    assert saved["step"] == 4 or read_step(folder / "best.pt") == 6, "progress would claim a best.pt that is not there"
    assert read_step(folder / "previous.pt") in (2, 4)
    progress.step = 7
    checkpoints.save(folder, {**state, "progress": progress})
    assert read_step(folder / "last.pt") == 7
    assert read_step(folder / "previous.pt") == saved["step"]


def test_only_the_newest_numbered_copies_are_kept(folder):
    _, state, progress = parts()
    for step in (8, 9, 10):
        progress.step = step
        checkpoints.save(folder, {**state, "progress": progress}, step_copy=step, keep=2)
    numbered = sorted(path.name for path in folder.glob("step_*.pt"))
    assert numbered == ["step_000009.pt", "step_000010.pt"]
    assert read_step(folder / "last.pt") == 10


def test_a_full_disk_is_told_and_leaves_the_old_one(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    _, state, progress = parts()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match=r"last.pt: not written: No space left on device; free some room"):
            checkpoints.save(folder, {**state, "progress": progress})
    assert read_step(folder / "last.pt") == 4
    assert not list(folder.glob("*.tmp"))


def test_a_full_disk_as_torch_reports_it(folder):
    """A RuntimeError out of its own writer, with the OSError behind it."""
    former, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"last.pt: not written: File too large"):
            checkpoints.save(folder, {"model": {"a": torch.zeros(10000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert read_step(folder / "last.pt") == 4


@pytest.mark.parametrize("keep", [0, 0.001, 0.3, 0.99])
def test_auto_falls_back_from_a_truncated_file_and_says_why(folder, keep, capsys):
    cut(folder / "last.pt", keep)
    saved = checkpoints.open_run(folder, "auto")
    assert saved["step"] == 2
    said = capsys.readouterr().out
    assert str(folder / "last.pt") in said
    assert "empty" in said or "truncated" in said or "not a PyTorch file" in said
    assert f"using {folder / 'previous.pt'}" in said
    # The damaged file must not push the whole one out at the next save.
    assert (folder / "last.pt.damaged").exists()
    _, state, progress = parts()
    checkpoints.restore(saved, state, progress)
    progress.step = 3
    checkpoints.save(folder, {**state, "progress": progress})
    assert (read_step(folder / "last.pt"), read_step(folder / "previous.pt")) == (3, 2)


def test_auto_without_last_and_with_numbered_copies(folder):
    (folder / "last.pt").unlink()
    assert checkpoints.open_run(folder, "auto")["step"] == 2
    _, state, progress = parts()
    progress.step = 9
    checkpoints.save(folder, {**state, "progress": progress}, step_copy=9)
    cut(folder / "previous.pt")
    (folder / "last.pt").unlink()
    assert checkpoints.open_run(folder, "auto")["step"] == 9


def test_auto_with_nothing_whole_or_nothing_at_all(folder, tmp_path):
    assert checkpoints.open_run(tmp_path / "new", "auto") is None
    cut(folder / "last.pt")
    cut(folder / "previous.pt", 0)
    with pytest.raises(
        UsageError, match=r"no whole checkpoint: .*last.pt: truncated.*previous.pt: is empty.*--overwrite"
    ):
        checkpoints.open_run(folder, "auto")


def test_a_flipped_bit_is_noticed(folder):
    data = bytearray((folder / "last.pt").read_bytes())
    weights = checkpoints.read(folder / "last.pt")["model"]["5.weight"].numpy().tobytes()
    data[data.index(weights) + 7] ^= 1
    (folder / "last.pt").write_bytes(data)
    with pytest.raises(UsageError, match="truncated or damaged at"):
        checkpoints.read(folder / "last.pt")


def test_missing_file_lists_what_is_near(folder, tmp_path):
    with pytest.raises(UsageError, match=r"lost.pt: no such checkpoint; checkpoints near it: .*last.pt"):
        checkpoints.read(folder / "lost.pt")
    with pytest.raises(UsageError, match=r"no such checkpoint; checkpoints near it: .*run.last.pt"):
        checkpoints.read(tmp_path / "rnu" / "deep" / "last.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"--resume .*empty: no checkpoint in .*there is none"):
        checkpoints.open_run(tmp_path / "other", str(tmp_path / "empty"))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_files_are_told_apart(tmp_path, monkeypatch, zipped):
    def written(value):
        torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        return tmp_path / "x.pt"

    with pytest.raises(UsageError, match=r"x.pt: bare weights \(2 tensors\).*use --pretrained-ssd .*x.pt"):
        checkpoints.read(written(nn.Linear(2, 2).state_dict()))
    with pytest.raises(UsageError, match=r"a dict of epoch, state_dict, .*--load-model"):
        checkpoints.read(written({"epoch": 1, "state_dict": {}}), weights_flag="--load-model")
    with pytest.raises(UsageError, match="a list, not a checkpoint"):
        checkpoints.read(written([1]))
    with pytest.raises(UsageError, match=r"torch.nn.modules.linear.Linear.*refused; .*state_dict\(\)"):
        checkpoints.read(written(nn.Linear(2, 2)))
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    with pytest.raises(UsageError, match="refused"):
        checkpoints.read(written({"format_version": 1, "x": Bomb()}))
    assert not (tmp_path / "went off").exists()
    with pytest.raises(UsageError, match="format 2, this program knows 1; update it"):
        checkpoints.read(written({"format_version": 2}))
    cut(written({"a": torch.zeros(1000)}))
    with pytest.raises(UsageError, match="damaged"):
        checkpoints.read(tmp_path / "x.pt")


@pytest.mark.parametrize("data", [b"hello", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_files_that_are_nothing(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UsageError, match=r"x.pt: (is not a PyTorch file|truncated or damaged)"):
        checkpoints.read(tmp_path / "x.pt")


def test_a_run_is_not_overwritten_by_accident(folder, tmp_path):
    for name in ("metrics.jsonl", "events.out.tfevents.1", "step_000002.pt", "best.pt", "notes.txt"):
        (folder / name).touch()
    with pytest.raises(UsageError, match="holds a run; use --resume auto to continue it, --overwrite"):
        checkpoints.open_run(folder)
    assert checkpoints.open_run(folder, evaluate_only=True) is None
    assert checkpoints.open_run(folder, evaluate_only=True, overwrite=True) is None
    with pytest.raises(UsageError, match=r"--overwrite would remove .*last.pt"):
        checkpoints.open_run(folder, "auto", overwrite=True)
    other = tmp_path / "other"
    assert checkpoints.open_run(other, str(folder))["step"] == 4
    assert checkpoints.open_run(other, str(folder / "previous.pt"))["step"] == 2
    train(other, *parts(), 1)
    with pytest.raises(UsageError, match="other: holds a run"):
        checkpoints.open_run(other, str(folder))
    assert checkpoints.open_run(folder, overwrite=True) is None
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_eval_only_needs_what_it_names(folder, tmp_path):
    assert checkpoints.open_run(tmp_path / "x", str(folder), evaluate_only=True)["step"] == 4
    with pytest.raises(UsageError, match="--resume auto: no checkpoint in"):
        checkpoints.open_run(tmp_path / "x", "auto", evaluate_only=True)


def refusal(saved, state):
    with pytest.raises(UsageError) as caught:
        checkpoints.restore(saved, state, checkpoints.Progress())
    assert "\n" not in str(caught.value)
    assert saved["file"] in str(caught.value)
    return str(caught.value)


def test_restore_names_what_is_missing_or_does_not_fit(folder):
    saved = checkpoints.read(folder / "last.pt")
    less = {name: value for name, value in saved.items() if name not in ("optimizer", "epoch")}
    assert "no optimizer, epoch in it" in refusal(less, parts()[1])
    message = refusal(saved, parts(optimizer="adamw")[1])
    assert "its optimizer is SGD, this run's AdamW" in message
    assert "ema was off in that run and is on now; resume with its --ema" in refusal({**saved, "ema": {}}, parts()[1])
    state = parts()[1]
    state["model"] = nn.Sequential(*network()[:5], nn.Linear(64, 6))
    assert "model does not fit this network, 2 of 9 tensors: 5.weight is (2, 64), here (6, 64)" in refusal(saved, state)
    state = parts()[1]
    state["optimizer"] = torch.optim.SGD(state["model"].parameters(), lr=0.1, momentum=0.9)
    assert "its optimizer has groups [('base_net', 2), ('heads', 4)], this run's [(None, 6)]" in refusal(saved, state)


def test_settings_of_the_optimizer_are_those_of_the_flags(folder):
    _, state, progress = parts()
    for group in state["optimizer"].param_groups:
        group.update(weight_decay=0.5, base_lr=0.3)
    checkpoints.restore(checkpoints.read(folder / "last.pt"), state, progress)
    group = state["optimizer"].param_groups[0]
    assert (group["weight_decay"], group["base_lr"], group["lr"]) == (0.5, 0.3, 0.1 / 4)


def test_changed_flags_are_listed():
    before = {"epochs": 30, "lr": 0.1, "data": ["a"], "out": "x", "resume": "", "old": 1}
    now = {"epochs": 60, "lr": 0.1, "data": ["a"], "out": Path("x"), "resume": "auto", "new": 2}
    assert checkpoints.changed(before, now) == ["epochs: 30 -> 60", "new: (absent) -> 2", "old: 1 -> (absent)"]


def test_command_line_prints_the_fingerprint(folder, capsys):
    checkpoints.main([str(folder / "last.pt")])
    digest = checkpoints.fingerprint(checkpoints.read(folder / "last.pt"))
    assert capsys.readouterr().out == f"{folder / 'last.pt'} epoch 0 step 4 sha256 {digest}\n"


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "is_main", lambda: False)
    checkpoints.save(tmp_path / "run", {"model": network()})
    assert not (tmp_path / "run").exists()
