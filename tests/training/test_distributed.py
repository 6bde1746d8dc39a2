import argparse
import contextlib
import functools
import io
import json
import math
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.multiprocessing
from torch import nn

from evaluation.nuscenes import NuScenesEvaluator, Score
from tests.training import small_run
from training import connection, distributed, run_folder
from training.distributed import init_device
from training.logger import Logger
from training.meter import NonFiniteLoss
from training.signals import StopSignals
from utils.errors import DataError, UsageError, UserError


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
    run = init_device("cpu", precision="fp32", seed=3)
    first = torch.rand(2)
    init_device("cpu", precision="fp32", seed=3)
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


@pytest.mark.parametrize(
    ("precision", "capabilities", "dtype"),
    [
        ("auto", {"avx512_bf16": False, "amx_bf16": False}, "float32"),
        ("auto", {"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ("auto", {"amx_bf16": True}, "bfloat16"),
        ("auto", {}, "float32"),
        ("fp32", {"avx512_bf16": True}, "float32"),
        ("bf16", {}, "bfloat16"),
    ],
)
def test_precision_on_the_cpu(precision, capabilities, dtype, monkeypatch):
    """auto is bf16 where the processor computes in it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
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


def flags(**changed):
    """The flags that `distributed.init` reads."""
    values = {"device": "cpu", "gpus": "", "precision": "fp32", "seed": 0, "arch": "mb1-ssd", "deterministic": None}
    values |= {"workers": 0, "batch_size": 4, "accumulate": 1}
    return argparse.Namespace(**values | changed)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [
        ("cuda", 16, 1, 16),
        ("cuda", 16, 4, 4),
        ("cuda", 64, 2, 16),
        ("cuda", 2, 8, 1),
        ("cpu", 16, 1, 2),
        ("cpu", 1, 1, 1),
    ],
)
def test_automatic_number_of_workers(device, cores, processes, workers, monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    number, reason = distributed.choose_workers(torch.device(device))
    assert number == workers
    assert reason.startswith(f"{cores} cores" + (f" for {processes} processes" if processes > 1 else ""))


def test_the_automatic_number_of_workers_is_printed_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    args = flags(workers=None)
    distributed.init(args)
    assert args.workers == 2
    assert capsys.readouterr().out == "--workers 2: 8 cores, which the network on the CPU needs too\n"


def test_cores_are_those_of_the_affinity_mask():
    every = os.sched_getaffinity(0)
    assert 1 <= distributed.cores() <= len(every)
    try:
        os.sched_setaffinity(0, {min(every)})
        assert distributed.cores() == 1
    finally:
        os.sched_setaffinity(0, every)


@pytest.mark.usefixtures("two_gpus")
def test_idle_gpus_are_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/train_ssd.py"])
    line = "2 GPUs are visible, 1 is used: torchrun --nproc-per-node 2 train_ssd.py ... uses all"
    assert distributed.idle_gpus(flags(device="auto"), 1).startswith(line)
    for device, gpus, world_size in (("cuda:1", "", 1), ("auto", "0,1", 1), ("auto", "", 2), ("cpu", "", 1)):
        assert not distributed.idle_gpus(flags(device=device, gpus=gpus), world_size)


def state_of_kernels():
    cudnn = torch.backends.cudnn
    return (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32)


@pytest.mark.parametrize(
    ("changed", "expected", "state"),
    [
        ({}, True, (True, True, False, False)),
        ({"deterministic": False}, False, (False, False, True, True)),
        ({"deterministic": False, "min_side": [800]}, False, (False, False, False, True)),
        ({"arch": "maskrcnn_resnet50", "deterministic": True}, True, (True, True, False, False)),
        ({"arch": "maskrcnn_resnet50"}, True, (True, True, False, False)),  # on a CPU
    ],
)
def test_deterministic_kernels(changed, expected, state):
    args = flags(**changed)
    distributed.init(args)
    assert args.deterministic is expected
    assert state_of_kernels() == state
    assert torch.backends.cuda.matmul.allow_tf32 is not expected
    init_device("cpu")
    assert state_of_kernels() == (True, True, False, False)


@pytest.mark.parametrize(
    ("device", "world_size", "changed", "reason"),
    [
        ("cpu", 1, {"arch": "maskrcnn_resnet50"}, ""),
        ("cpu", 2, {}, ""),
        ("cpu", 3, {}, "more than two processes"),
        ("cuda", 1, {}, ""),
        ("cuda", 2, {"arch": "retinanet_resnet50"}, ""),
        ("cuda", 1, {"deterministic": False}, "--no-deterministic"),
        ("cuda", 1, {"arch": "maskrcnn_resnet50"}, "RoIAlign"),
        ("cuda", 1, {"arch": "centerfusion_dla34", "deterministic": True}, "deformable"),
        ("cuda", 1, {"arch": "centerfusion_resnet18"}, ""),
        ("cuda", 1, {"arch": "vgg16_bn", "resolution": 200}, "adaptive pooling"),
        ("cuda", 1, {"arch": "vgg16_bn", "resolution": 224}, ""),
        ("cuda", 1, {"arch": "vgg16-ssd", "resolution": 300}, ""),
    ],
)
def test_reasons_for_a_resume_that_is_not_exact(device, world_size, changed, reason):
    run = replace(init_device("cpu"), device=torch.device(device), world_size=world_size)
    given = distributed.why_inexact(run, flags(**changed))
    assert given.startswith(reason) if reason.startswith(("--", "more")) else reason in given
    assert bool(given) == bool(reason)


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
    assert choose(gpus="-1") == (torch.device("cpu"), ())
    for bad in ("0,0", "a", "0,", "-2"):
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


@pytest.mark.parametrize(("world_size", "expected"), [(1, []), (2, [0, 1])])
def test_gradients_are_exchanged_in_the_last_micro_batch_only(world_size, expected):
    exchange = [True]

    class Wrapped:
        @contextlib.contextmanager
        def no_sync(self):
            exchange.append(False)
            yield
            exchange.pop()

    run = replace(init_device("cpu"), world_size=world_size)
    parts = [(part, exchange[-1]) for part in run.sync_last(Wrapped(), range(3))]
    assert [part for part, exchanges in parts if not exchanges] == expected
    assert [part for part, _ in parts] == [0, 1, 2]


def test_a_batch_is_split_evenly_or_refused():
    assert distributed.init(small_run.flags("--device cpu --batch-size 8 --accumulate 4 --seed 5")).seed == 5
    with pytest.raises(UsageError, match=r"--batch-size 9 is no multiple of 4 .*; use --batch-size 12"):
        distributed.init(small_run.flags("--device cpu --batch-size 9 --accumulate 4"))


def in_one_of_two(rank, ports, folder):
    """What each of two gloo processes checks; a failed assertion fails the test."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = ports[0]
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
    check_an_evaluation_while_a_training_saves(run, folder)
    check_full_disk(run, folder)
    check_errors(run)
    check_non_finite_loss(run, folder)
    run.close()
    os.environ["MASTER_PORT"] = ports[1]
    connection.STEP_TIMEOUT = timedelta(seconds=3)
    run = init_device("cpu")
    check_waits(run)
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
    own = folder / f"{run.rank}"
    run_folder.save(own, {"step": 5} if run.is_main else {"step": 0})
    with pytest.raises(UsageError, match=r"different steps \[5, 0\]; use a folder that all machines share"):
        run_folder.open_run(run, own, "auto", read_only=True)
    run_folder.SHARED_SECONDS = 0.2
    for flags in ({"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(
            UsageError, match=rf"{folder}/1 is not the folder of process 0, {folder}/0 on .*--model-dir"
        ):
            run_folder.open_run(run, own, **flags)
    with pytest.raises(UsageError, match=r"^.*/0: it already has a run; continue it with --resume auto"):
        run_folder.open_run(run, folder / "0")
    assert [path.name for path in own.iterdir()] == ["last.pt"], "a refusal changes nothing"
    assert run_folder.open_run(run, folder / "0", "auto")["step"] == 5
    run_folder.open_run(run, folder / "shared")
    run.gather(None)
    assert not list((folder / "shared").iterdir())
    with pytest.raises(UserError, match=r"last\.pt/x/.*: not written: Not a directory; .* or choose another folder"):
        run_folder.open_run(run, folder / "0" / "last.pt" / "x", "auto")


def check_an_evaluation_while_a_training_saves(run, folder):
    """Processes that have read different checkpoints read again."""
    real, calls = run_folder._find, []

    def find(*arguments):
        saved, damaged = real(*arguments)
        calls.append(saved["step"])
        return {**saved, "step": saved["step"] + run.rank * (len(calls) == 1)}, damaged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "_find", find)
        assert run_folder.open_run(run, folder / "0", "auto", read_only=True)["step"] == 5
    assert len(calls) == 2


def check_full_disk(run, folder):
    """What the main process cannot write is an error in all processes, none of which waits for another."""
    with Logger(folder / "full", run, total_steps=2) as log:
        if run.is_main:
            log._metrics.close()
            log._metrics = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)  # noqa: SIM115
        with pytest.raises(UserError, match=r"metrics\.jsonl: not written: No space left on device"):
            log.log(1, {"x": 1.0})


def check_errors(run):
    """An error in the block of any process is raised in all, and printed by one."""

    def fail_in(rank, error):
        with run.main_first():
            if run.rank == rank:
                raise error

    with pytest.raises(UserError, match=r"^a\.jpg: cut off$") as raised:
        fail_in(0, DataError("a.jpg", reason="cut off"))
    assert raised.value.is_printed == run.is_main
    prefix = f"process 1 on {socket.gethostname()}: " if run.is_main else ""
    with pytest.raises(UserError, match=rf"^{prefix}a\.jpg: cut off$") as raised:
        fail_in(1, DataError("a.jpg", reason="cut off"))
    assert raised.value.is_printed == run.is_main
    with pytest.raises(KeyError if run.is_main else SystemExit, match="mistake" if run.is_main else "^1$"):
        fail_in(0, KeyError("mistake"))


def check_waits(run):
    """One process may take longer than the timeout of a step before a block of `main_first`, in it, and to score."""
    slow = 4 if run.is_main else 0
    with run.main_first():
        time.sleep(slow)
    evaluator = NuScenesEvaluator("", "", "")
    evaluator._score = lambda *_: time.sleep(slow) or Score({"NDS": 0.5})
    assert evaluator.compute(run.gather, run.is_main) == {"NDS": 0.5}
    assert run.max(run.rank) == 1


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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_compute_what_one_would(tmp_path):
    ports = free_port(), free_port()
    torch.multiprocessing.spawn(in_one_of_two, (ports, tmp_path), nprocs=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["0", "1", "cache", "full", "log", "passed0", "passed1", "shared"]
