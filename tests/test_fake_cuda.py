"""What the scripts do with tensors on a GPU: no operation on two devices, and how often they wait for it."""

import pytest

from tests import fake_cuda
from tests.script_helpers import Script
from training import run_folder
from training.logger import Logger

RUN = ["--device", "cuda", "--max-steps", 3, "--batch-size", 2, "--log-every", 99, "--validation-epochs", 99]
# How often a training step and a batch of an evaluation wait for the GPU, at most; the first of each may fill caches.
WAITS = {"backbone": (2, 6), "ssd": (3, 99), "retinanet": (3, 99), "maskrcnn": (4, 3)}


@pytest.fixture(params=WAITS)
def script(request, drawn):
    return Script(request.param, drawn(request.param))


@pytest.mark.slow
def test_waits_of_training_and_evaluation(script, tmp_path, monkeypatch):
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(run_folder, "save", lambda *args, **options: None)  # it reads all weights
    steps, batches = [], []
    with fake_cuda.FakeCuda() as gpu:
        original_steps, evaluate = Logger.steps, script.module.evaluate

        def counted(items, counts):
            for item in items:
                before = len(gpu.waits)
                yield item
                counts.append(gpu.waits[before:])

        monkeypatch.setattr(Logger, "steps", lambda self, loader: counted(original_steps(self, loader), steps))
        monkeypatch.setattr(
            script.module,
            "evaluate",
            lambda net, loader, *args, **options: evaluate(net, counted(loader, batches), *args, **options),
        )
        script.main(tmp_path, *RUN)
    of_step, of_batch = steps[1], batches[1]  # the last step also logs and validates
    assert len(of_step) <= WAITS[script.name][0], "\n".join(of_step)
    assert len(of_batch) <= WAITS[script.name][1], "\n".join(of_batch)
