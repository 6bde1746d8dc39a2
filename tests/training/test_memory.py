import types
from multiprocessing import connection, resource_sharer

import pytest
import torch

from tests.training import small_run
from training import distributed, memory
from utils.errors import UsageError

MB, GIB = 2**20, 2**30


def cpu(precision="fp32"):
    return distributed.init_device("cpu", precision=precision)


def test_peaks_without_a_gpu():
    memory.reset_peak()
    assert memory.peak_gpu() == 0
    assert memory.peak_ram() > MB
    assert memory.peaks().startswith("peak GPU memory 0 MB, RAM ")


def test_peaks_with_a_gpu(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * MB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    assert memory.peak_gpu() == 5 * MB
    memory.reset_peak()
    assert resets == [1]


def test_warnings_name_the_flag_and_a_value_that_fits():
    assert memory.loader_warnings(4, 10 * MB, GIB, 8 * GIB) == []
    assert memory.loader_warnings(0, 10 * GIB, MB, MB) == []
    assert memory.loader_warnings(4, 10 * MB, None, None) == []
    (shm,) = memory.loader_warnings(4, 10 * MB, 64 * MB, 8 * GIB)
    assert "/dev/shm has 64 MB free" in shm
    assert "--workers 2," in shm
    (ram,) = memory.loader_warnings(8, 10 * MB, 8 * GIB, GIB)
    assert "1.0 GiB of RAM are free" in ram
    assert "--workers 3 " in ram


def test_warnings_count_the_workers_of_all_processes_on_the_machine():
    assert memory.loader_warnings(2, 10 * MB, 64 * MB, 8 * GIB) == []
    (shm,) = memory.loader_warnings(2, 10 * MB, 64 * MB, 8 * GIB, processes=2)
    assert "4 workers keep 80 MB" in shm
    assert "--workers 1," in shm
    (ram,) = memory.loader_warnings(2, 10 * MB, GIB, GIB, processes=4)
    assert "8 workers take about 2.2 GiB: use --workers 0 " in ram


def test_free_ram_is_the_lesser_of_machine_and_container(monkeypatch, tmp_path):
    contents = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   4096 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "1000\n",
    }

    def path(name):
        file = tmp_path / name.replace("/", "_")
        if name in contents:
            file.write_text(contents[name])
        return file

    monkeypatch.setattr(memory, "Path", path)
    assert memory.free_ram() == 4096 * 1024
    contents["/sys/fs/cgroup/memory.max"] = "3000\n"
    assert memory.free_ram() == 2000
    contents.clear()
    for file in tmp_path.iterdir():
        file.unlink()
    assert memory.free_ram() is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible",
            r"process 7, .*'Bus error': .*shm-size",
        ),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", r"--check-data --workers 0"),
        ("DataLoader worker (pid 7) is killed by signal: Terminated. ", r"by 'Terminated': .*--workers 0"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", r"process 7, 8, was ended: .*--workers 0"),
    ],
)
def test_the_hint_for_a_killed_worker_names_the_signal_and_the_flag(text, hint):
    with pytest.raises(UsageError, match=hint), memory.explain_killed_worker():
        raise RuntimeError(text)


def test_a_worker_that_is_killed_while_it_sends_a_batch(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionRefusedError(111, "Connection refused")

    sent = resource_sharer.DupFd(0)  # as torch passes the memory of a batch on
    monkeypatch.setattr(connection, "Client", refuse)
    line = r"a data loading worker was ended while it sent a batch: .*fewer --workers"
    with pytest.raises(UsageError, match=line), memory.explain_killed_worker():
        sent.detach()
    with pytest.raises(ConnectionRefusedError), memory.explain_killed_worker():
        refuse()

    def handler_of_torch(_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(memory.traceback, "extract_tb", handler_of_torch)
    with pytest.raises(UsageError, match="process 7, was ended by 'Killed'"), memory.explain_killed_worker():
        refuse()


def test_another_error_of_a_worker_stays_what_it_is():
    with pytest.raises(RuntimeError, match="Caught"), memory.explain_killed_worker():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")


def test_the_signal_of_a_killed_worker_may_be_in_the_cause():
    cause = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    line = "process 7, was ended by 'Killed': probably by the system"
    with pytest.raises(UsageError, match=line), memory.explain_killed_worker():
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from cause


def test_advice_prints_warnings_and_the_memory_of_batches(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_ram", lambda: MB)
    with memory.advice(cpu(), small_run.flags("--preflight --workers 2 --batch-size 4"), (1024, 1024)):
        pass
    printed = capsys.readouterr().out
    assert "WARNING: 0.0 GiB of RAM are free and 2 workers take about 0.5 GiB: use --workers 0" in printed
    assert "2 workers keep up to 48 MB of batches in shared memory" in printed


def test_a_full_gpu_becomes_an_error_that_names_the_next_flag():
    with (
        pytest.raises(UsageError, match=r"cpu is out of memory: .* with 4 images of 30 x 50 .* try --accumulate 2 "),
        memory.advice(cpu(), small_run.flags("--workers 0"), (30, 50)),
    ):
        raise torch.OutOfMemoryError


def test_out_of_memory_hint_names_the_next_flag(monkeypatch):
    run = cpu("fp32")
    assert "--accumulate 2" in memory.out_of_memory_hint(run, (300, 300), 8)
    assert "--accumulate 3" in memory.out_of_memory_hint(run, (300, 300), 6, accumulate=2)  # 4 does not divide 6
    assert "8 images of 300 x 512" in memory.out_of_memory_hint(run, (300, 512), 8)
    for native, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(memory, "computes_bf16", lambda device, native=native: native)
        assert f"--precision {precision}" in memory.out_of_memory_hint(run, (300, 300), 8, accumulate=8)
    half = cpu("bf16")
    assert "--batch-size 1" in memory.out_of_memory_hint(half, (300, 300), 8, accumulate=8)
    assert "smaller images" in memory.out_of_memory_hint(half, (300, 300), 1)


def test_out_of_memory_hint_counts_gpus_and_reads_their_memory(monkeypatch):
    monkeypatch.setattr(memory, "peak_gpu", lambda: GIB)
    properties = types.SimpleNamespace(total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    run = types.SimpleNamespace(device=torch.device("cuda:0"), world_size=2, gpus=(0, 1), precision=torch.float32)
    hint = memory.out_of_memory_hint(run, (300, 300), 16)
    assert hint.startswith("cuda:0 is out of memory: peak 1.0 of 16.0 GiB with 4 images of 300 x 300 at a time")
