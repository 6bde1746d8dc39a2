import functools
import json
import math
import os
import signal
import socket
import threading
from unittest import mock

import pytest
import torch
import torch.multiprocessing
from torch import nn

from tests.training import small_run
from training import distributed, run_folder
from training.distributed import init_device
from training.logger import Logger
from training.meter import NonFiniteLoss
from training.signals import StopSignals
from utils.errors import UsageError


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_one_process_on_the_cpu(capsys):
    run = init_device("cpu", seed=3)
    first = torch.rand(2)
    init_device("cpu", seed=3)
    torch.testing.assert_close(torch.rand(2), first, rtol=0, atol=0)
    assert (run.device, run.rank, run.world_size, run.is_main) == (torch.device("cpu"), 0, 1, True)
    assert (run.gpus, run.pin_memory, run.precision) == ((), False, torch.float32)
    assert not run.scaler.is_enabled()
    net = small_net()
    assert run.wrap(net) is net
    assert run.gather({"a": 1}) == [{"a": 1}]
    assert run.max(15) == 15
    run.set_eval_mode(net)
    assert not net[1].training
    with run.main_first():
        run.print("once")
    run.close()
    assert capsys.readouterr().out == "once\n"
    assert distributed.describe(run).startswith("cpu, 1 threads, fp32")
    distributed.synchronize(run.device)


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3), torch.tensor(3.0, requires_grad=True)])
def test_mean_of_one_process_is_the_value_as_float(value):
    mean = init_device("cpu").mean(value)
    assert mean.shape == ()
    assert mean.is_floating_point()
    assert not mean.requires_grad
    assert float(mean.clamp(min=1)) == 3.0


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_precision_on_the_cpu(precision, dtype):
    run = init_device("cpu", precision=precision)
    with run.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == getattr(torch, dtype)
    assert not run.scaler.is_enabled()


def test_fp16_scales_and_warns_that_a_cpu_is_slow():
    with pytest.warns(UserWarning, match="slow"):
        run = init_device("cpu", precision="fp16")
    assert run.scaler.is_enabled()
    assert run.precision == torch.float16


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_is_bf16_where_the_gpu_computes_in_it(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    gpu = torch.device("cuda:1")
    assert distributed._choose_precision("auto", gpu) == dtype
    assert distributed._choose_precision("fp16", gpu) == torch.float16
    if not native:
        with pytest.raises(UsageError, match="--precision bf16: GPU cuda:1 does not compute in it; use fp16 or fp32"):
            distributed._choose_precision("bf16", gpu)


def test_the_seed_of_a_step_depends_on_the_step_alone():
    run = init_device("cpu", seed=1)
    run.seed_step(5)
    first = torch.rand(3)
    torch.rand(10)
    run.seed_step(5)
    torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
    run.seed_step(6)
    assert not torch.equal(torch.rand(3), first)


@pytest.mark.slow
def test_compile_leaves_the_network_itself_as_it_is():
    net = small_net()
    names = set(net.state_dict())
    wrapped = init_device("cpu").wrap(net, compile=True)
    assert wrapped is not net
    assert set(net.state_dict()) == names
    assert list(map(id, wrapped.parameters())) == list(map(id, net.parameters()))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device": "cuda"}, "--device cuda: .*use --device cpu"),
        ({"gpus": "0,1"}, "--gpus 0,1: .*use --device cpu"),
        ({"device": "cpu", "gpus": "0"}, "--gpus 0 and --device cpu contradict each other"),
        ({"device": "gpu"}, "--device gpu: use auto, cpu, cuda"),
        ({"device": "cuda:x"}, "--device cuda:x: use auto"),
        ({"device": "cpu", "precision": "int8"}, "--precision int8: use auto, fp32, bf16, fp16"),
    ],
)
def test_impossible_devices_without_a_gpu(flags, message):
    with pytest.raises(UsageError, match=message):
        init_device(**flags)


@pytest.mark.usefixtures("two_gpus")
def test_choice_of_gpus(monkeypatch):
    def choose(device="auto", gpus="", world_size=1):
        return distributed._choose_device(device, gpus, world_size)

    assert choose() == (torch.device("cuda:0"), (0,))
    assert choose("cuda:1") == (torch.device("cuda:1"), (1,))
    assert choose(gpus="0") == (torch.device("cuda:0"), (0,))
    assert choose(gpus="1, 0") == (torch.device("cuda:1"), (1, 0))
    assert choose("cpu") == (torch.device("cpu"), ())
    assert distributed.gpu_names() == ["GPU 0", "GPU 1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose("cuda", world_size=2) == (torch.device("cuda:1"), (1,))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=r"torchrun process 2: there is no GPU 2; .*smaller --nproc-per-node"):
        choose(world_size=4)
    with pytest.raises(UsageError, match="--device cuda:1 under torchrun"):
        choose("cuda:1", world_size=2)
    for bad in ("0,0", "a", "0,", "-1"):
        with pytest.raises(UsageError, match="different GPU numbers separated by commas"):
            choose(gpus=bad)
    with pytest.raises(UsageError, match="--gpus 0,5: there is no GPU 5; this machine has 2"):
        choose(gpus="0,5")


def test_gpus_and_torchrun_exclude_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="--gpus 0,1 under torchrun"):
        init_device(gpus="0,1")


def test_sync_bn_needs_gpus():
    with pytest.raises(UsageError, match=r"--sync-bn needs GPUs .*--freeze-bn"):
        init_device("cpu").wrap(small_net(), sync_bn=True)


@pytest.mark.parametrize("flag", ["compile", "sync_bn"])
def test_several_gpus_in_one_process_exclude_some_flags(flag):
    run = distributed.Run(torch.device("cuda:0"), 0, 1, (0, 1), torch.float32, None, 0)
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} does not work with several --gpus; use torchrun"):
        run.wrap(small_net(), **{flag: True})


def test_threads_of_data_parallel_compute_in_the_precision_of_the_run():
    """A new thread does not inherit autocast, so the wrapped network enters it."""
    run, dtypes = init_device("cpu", precision="bf16"), []
    net = distributed._Autocast(nn.Linear(2, 2), run)
    with run.autocast():
        thread = threading.Thread(target=lambda: dtypes.append(net(torch.ones(1, 2)).dtype))
        thread.start()
        thread.join()
    assert dtypes == [torch.bfloat16]


def test_several_gpus_in_one_process_use_data_parallel(monkeypatch):
    calls = []
    monkeypatch.setattr(nn, "DataParallel", lambda module, device_ids: calls.append((module, device_ids)))
    net, run = small_net(), distributed.Run(torch.device("cuda:0"), 0, 1, (0, 1), torch.float32, None, 0)
    run.wrap(net)
    ((module, device_ids),) = calls
    assert module.net is net
    assert device_ids == [0, 1]


def test_a_batch_is_split_evenly_or_refused():
    assert distributed.init(small_run.flags("--device cpu --batch-size 8 --accumulate 4 --seed 5")).seed == 5
    with pytest.raises(UsageError, match=r"--batch-size 9 is no multiple of 4 .*; use --batch-size 12"):
        distributed.init(small_run.flags("--device cpu --batch-size 9 --accumulate 4"))


def in_one_of_two(rank, port, folder):
    """What each of two gloo processes checks; a failed assertion fails the test."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    run = init_device("cpu", seed=7)
    check_collectives(run, folder)
    check_gradients(run)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        check_gradients(run, compile=True)
    check_batch_norm(run)
    check_start(run)
    check_stop(run)
    check_run_folder(run, folder)
    check_non_finite_loss(run, folder)
    run.close()
    (folder / f"passed{rank}").touch()


def check_collectives(run, folder):
    rank = run.rank
    assert (run.world_size, run.is_main) == (2, rank == 0)
    assert float(run.mean(torch.tensor(rank))) == 0.5
    assert run.mean(torch.tensor([1.0, rank])).tolist() == [1.0, 0.5]
    value = torch.tensor(float(rank))
    run.mean(value)
    assert float(value) == rank
    assert run.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert run.max(rank) == 1
    with run.main_first():
        assert (folder / "cache").exists() == (rank == 1)
        (folder / "cache").touch()
    run.seed_step(1)
    first, second = run.gather(torch.rand(3).tolist())
    assert first != second


def check_gradients(run, compile=False):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    share = images[2 * run.rank : 2 * run.rank + 2]
    net = small_net()
    net[1].eval()
    wrapped = run.wrap(net, compile=compile)
    assert not wrapped.broadcast_buffers
    # Two forwards before a backward, and a normalizer that differs: process 1 has no objects.
    count = run.mean(torch.tensor(6 * (1 - run.rank))).clamp(min=1)
    loss = wrapped(share[:1]).square().sum() + wrapped(share[1:]).square().sum()
    (loss / count).backward()
    alone = small_net()
    alone[1].eval()
    (alone(images).square().sum() / 6).backward()
    for ours, whole in zip(net.parameters(), alone.parameters()):
        torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-5, atol=1e-6)


def check_batch_norm(run):
    net = small_net()
    wrapped = run.wrap(net)
    assert wrapped.broadcast_buffers
    wrapped(torch.rand(2, 3, 8, 8) + run.rank)
    before = run.gather(net[1].running_mean.tolist())
    run.set_eval_mode(net)
    after = run.gather(net[1].running_mean.tolist())
    assert before[0] != before[1]
    assert after == [before[0], before[0]]


def check_start(run):
    """All start from the weights and buffers of rank 0, which alone may have loaded a file, also if they are frozen."""
    net = small_net()
    net[1].eval().requires_grad_(False)
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.add_(run.rank)
    run.wrap(net)
    torch.testing.assert_close(dict(net.state_dict()), dict(small_net().state_dict()), rtol=0, atol=0)


def check_stop(run):
    with StopSignals(run) as stop:
        assert not stop.requested()
        if run.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
        assert stop.exit_code == 143


def check_run_folder(run, folder):
    run_folder.save(folder / f"{run.rank}", {"step": 5} if run.is_main else {"step": 0})
    with pytest.raises(UsageError, match=r"different steps \[5, 0\]; use a folder that all machines share"):
        run_folder.open_run(run, folder / f"{run.rank}", "auto")
    assert run_folder.open_run(run, folder / "0", "auto")["step"] == 5


def check_non_finite_loss(run, folder):
    """The process with the first one names it in all processes; the others have it one step later."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    with Logger(folder / "log", run, total_steps=2, image_path="{}.jpg".format) as log:
        log.add(1, {"loss": torch.tensor(math.nan if run.rank == 1 else 1.0)}, [run.rank])
        log.add(2, {"loss": torch.tensor(math.nan)}, [run.rank])
        with pytest.raises(NonFiniteLoss, match=r"non-finite loss at step 1: loss nan; images 1\.jpg"):
            log.log_losses(2, optimizer)
    if run.is_main:
        assert json.loads((folder / "log" / "nan_report.json").read_text())["images"] == [1]


@pytest.mark.slow
def test_two_processes_compute_what_one_would(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torch.multiprocessing.spawn(in_one_of_two, (port, tmp_path), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "cache", "log", "passed0", "passed1"]
