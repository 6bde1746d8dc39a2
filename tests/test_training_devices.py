import socket

import pytest
import torch
import torch.multiprocessing
from torch import nn

from training import checkpoints, devices
from training.flags import UsageError


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


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_one_process_on_the_cpu(capsys):
    run = devices.setup(device="cpu", seed=3)
    first = torch.rand(2)
    devices.setup(device="cpu", seed=3)
    torch.testing.assert_close(torch.rand(2), first, rtol=0, atol=0)
    assert (run.device, run.rank, run.world, run.is_main, run.gpus) == (torch.device("cpu"), 0, 1, True, ())
    assert run.precision == torch.float32
    assert not run.scaler.is_enabled()
    net = small_net()
    assert run.wrap(net) is net
    assert run.gather({"a": 1}) == [{"a": 1}]
    assert run.any(True) is True
    assert run.any(False) is False
    run.barrier()
    run.share_statistics(net)
    run.close()
    run.say("once")
    assert capsys.readouterr().out == "once\n"
    assert devices.describe(run).startswith("cpu, ")
    assert devices.is_main()
    assert devices.peak_memory("cpu") == 0
    assert devices.peak_ram() > 2**20


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3), torch.tensor(3.0, requires_grad=True)])
def test_mean_of_one_process_is_the_value_as_float(value):
    mean = devices.setup(device="cpu").mean(value)
    assert mean.shape == ()
    assert mean.is_floating_point()
    assert not mean.requires_grad
    assert float(mean.clamp(min=1)) == 3.0


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_precision_on_the_cpu(precision, dtype):
    run = devices.setup(device="cpu", precision=precision)
    with run.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == getattr(torch, dtype)
    assert not run.scaler.is_enabled()


def test_fp16_scales_and_says_that_a_cpu_is_slow():
    with pytest.warns(UserWarning, match="slow"):
        run = devices.setup(device="cpu", precision="fp16")
    assert run.scaler.is_enabled()
    assert run.precision == torch.float16


def test_seed_step_depends_on_the_step_alone():
    run = devices.setup(device="cpu", seed=1)
    run.seed_step(5)
    first = torch.rand(3)
    torch.rand(10)
    run.seed_step(5)
    torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
    run.seed_step(6)
    assert not torch.equal(torch.rand(3), first)


def test_compile_is_unwrapped():
    net = small_net()
    run = devices.setup(device="cpu")
    wrapped = run.wrap(net, compile=True)
    assert wrapped is not net
    assert devices.unwrap(wrapped) is net
    assert devices.unwrap(nn.DataParallel(net)) is net
    assert devices.unwrap(net) is net


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
def test_impossible_wishes_without_a_gpu(flags, message):
    with pytest.raises(UsageError, match=message):
        devices.setup(**flags)


@pytest.mark.usefixtures("two_gpus")
def test_choice_of_gpus(monkeypatch):
    def choose(device="auto", gpus="", world=1):
        return devices._choose(device, gpus, world)

    assert choose() == (torch.device("cuda:0"), (0,))
    assert choose("cuda:1") == (torch.device("cuda:1"), (1,))
    assert choose(gpus="0") == (torch.device("cuda:0"), (0,))
    assert choose(gpus="1, 0") == (torch.device("cuda:1"), (1, 0))
    assert choose("cpu") == (torch.device("cpu"), ())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose("cuda", world=2) == (torch.device("cuda:1"), (1,))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=r"torchrun process 2: there is no GPU 2; .*smaller --nproc-per-node"):
        choose(world=4)
    with pytest.raises(UsageError, match="--device cuda:1 under torchrun"):
        choose("cuda:1", world=2)
    for bad in ("0,0", "a", "0,", "-1"):
        with pytest.raises(UsageError, match="different GPU numbers separated by commas"):
            choose(gpus=bad)
    with pytest.raises(UsageError, match="--gpus 0,5: there is no GPU 5; this machine has 2"):
        choose(gpus="0,5")


def test_gpus_do_not_go_with_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="--gpus 0,1 under torchrun"):
        devices.setup(gpus="0,1")


def test_sync_bn_needs_gpus():
    with pytest.raises(UsageError, match=r"--sync-bn needs GPUs .*--freeze-bn"):
        devices.setup(device="cpu").wrap(small_net(), sync_bn=True)


def test_memory_warnings_name_the_flag_and_a_value_that_fits():
    mb, gib = 2**20, 2**30
    assert devices.memory_warnings(4, 10 * mb, gib, 8 * gib) == []
    assert devices.memory_warnings(0, 10 * gib, mb, mb) == []
    assert devices.memory_warnings(4, 10 * mb, None, None) == []
    (shm,) = devices.memory_warnings(4, 10 * mb, 64 * mb, 8 * gib)
    assert "/dev/shm has 64 MB free" in shm
    assert "--workers 2," in shm
    (ram,) = devices.memory_warnings(8, 10 * mb, 8 * gib, gib)
    assert "1.0 GiB of RAM are free" in ram
    assert "--workers 3 " in ram
    assert isinstance(devices.check_machine(2, mb), list)
    assert "2 workers keep 40 MB" in devices.memory_peaks(devices.setup(device="cpu"), 2, 10 * mb)


def test_a_batch_parts_evenly_or_is_refused():
    run = devices.setup(device="cpu")
    devices.check_batch(run, 8, accumulate=4)
    with pytest.raises(UsageError, match=r"--batch-size 9 is no multiple of 4 .*; use --batch-size 12"):
        devices.check_batch(run, 9, accumulate=4)


def test_out_of_memory_hint_names_the_next_flag():
    run = devices.setup(device="cpu")
    assert "--accumulate 2" in devices.out_of_memory_hint(run, (300, 300), 8)
    assert "8 images of 300 x 512" in devices.out_of_memory_hint(run, (300, 512), 8)
    assert "--precision bf16" in devices.out_of_memory_hint(run, (300, 300), 8, accumulate=8)
    half = devices.setup(device="cpu", precision="bf16")
    assert "--batch-size 1" in devices.out_of_memory_hint(half, (300, 300), 8, accumulate=8)
    assert "smaller images" in devices.out_of_memory_hint(half, (300, 300), 1)


def in_one_of_two(rank, port, folder):
    """What each of two gloo processes checks; a failed assertion fails the test."""
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    run = devices.setup(device="cpu", seed=7)
    assert (run.rank, run.world, run.is_main, devices.is_main()) == (rank, 2, rank == 0, rank == 0)
    assert float(run.mean(torch.tensor(rank))) == 0.5
    assert run.mean(torch.tensor([1.0, rank])).tolist() == [1.0, 0.5]
    kept = torch.tensor(float(rank))
    run.mean(kept)
    assert float(kept) == rank
    assert run.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert run.any(rank == 1) is True
    assert run.any(False) is False

    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    share = images[2 * rank : 2 * rank + 2]
    net = small_net()
    net[1].eval()
    wrapped = run.wrap(net)
    assert not wrapped.broadcast_buffers
    assert devices.unwrap(wrapped) is net
    # Two forwards before a backward, and a normaliser that differs: process 1 has no objects.
    count = run.mean(torch.tensor(6 * (1 - rank))).clamp(min=1)
    loss = wrapped(share[:1]).square().sum() + wrapped(share[1:]).square().sum()
    (loss / count).backward()
    alone = small_net()
    alone[1].eval()
    (alone(images).square().sum() / 6).backward()
    for mine, whole in zip(net.parameters(), alone.parameters()):
        torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-5, atol=1e-6)

    learning = small_net()
    wrapped = run.wrap(learning)
    assert wrapped.broadcast_buffers
    wrapped(share)
    run.share_statistics(learning)
    means = run.gather(learning[1].running_mean.tolist())
    assert means[0] == means[1]
    checkpoints.save(folder / f"{rank}", {"progress": checkpoints.Progress(step=5)})
    with pytest.raises(UsageError, match=r"different steps \[5, 0\]; use a folder that all machines share"):
        checkpoints.open_run(folder / f"{rank}", "auto")
    assert checkpoints.open_run(folder / "0", "auto")["step"] == 5
    run.barrier()
    run.close()
    (folder / f"passed{rank}").touch()


def test_two_processes_compute_what_one_would(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torch.multiprocessing.spawn(in_one_of_two, (port, tmp_path), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "passed0", "passed1"]
