"""Every script trains on a GPU: in each precision, like the CPU, without waiting, and a resume continues exactly."""

import math

import pytest

from tests import test_fake_cuda
from tests.gpu.conftest import DEVICE, RUN, STEPS
from tests.gpu.recording import record
from tests.script_helpers import FLAGS, Script, fingerprint, last
from training import checkpoint

needs_cuda = pytest.mark.needs_cuda
PRECISIONS = ["fp32", "bf16", pytest.param("fp16", marks=needs_cuda)]  # on a CPU fp16 only warns
# Maximum waits of a training step and of a batch of an evaluation.
WAITS = test_fake_cuda.WAITS  # per step, per batch of an evaluation
RESUMED = [(name, "bf16") for name in FLAGS] + [pytest.param("ssd", "fp16", marks=needs_cuda)]


@pytest.fixture(params=FLAGS)
def name(request):
    return request.param


def totals(seen):
    """The loss of each step."""
    return [sum(losses.values()) for losses in seen.losses]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_and_weights_are_finite(name, precision, trained):
    seen = trained(name, precision)
    checked = slice(STEPS // 2 if precision == "fp16" else 0, None)  # the GradScaler leaves out the first steps
    assert len(seen.losses) == STEPS
    assert all(map(math.isfinite, totals(seen)[checked])), totals(seen)
    saved, start = last(seen.out), checkpoint.read(seen.out / "step_000010.pt")
    assert saved["step"] == STEPS
    assert all(value.isfinite().all() for value in saved["model"].values())
    changed = [name for name in seen.gradients if not saved["model"][name].equal(start["model"][name])]
    assert len(changed) > 0.9 * len(seen.gradients)
    assert all(map(math.isfinite, seen.metrics.values()))


def test_first_losses_are_the_cpus(name, drawn, comparable, tmp_path):
    seen, words = comparable(name)
    cpu = record(Script(name, drawn(name)), tmp_path, *words, "--device", "cpu")
    # In Mask R-CNN rounding can put another region of interest into the batch.
    assert totals(seen) == pytest.approx(totals(cpu), rel=0.02 if name == "maskrcnn" else 1e-3)


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_waits_for_the_gpu(name, precision, trained):
    """Those that log may, and the first, which fills caches."""
    waits = {step: places for step, places in trained(name, precision).step_waits.items() if step > 1}
    assert len(waits) > STEPS / 2
    too_many = {step: places for step, places in waits.items() if len(places) > WAITS[name][0]}
    assert not too_many


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_waits_rarely_and_repeats_the_last_validation(name, precision, drawn, trained, tmp_path):
    seen = trained(name, precision)
    words = ["--resume", seen.out / "last.pt", "--eval-only", "--batch-size", 2]
    again = record(Script(name, drawn(name)), tmp_path, *RUN, *words, "--device", DEVICE, "--precision", precision)
    rel = 1e-3 if precision == "fp32" else 0.05  # kernels depend on the batch size
    assert again.metrics["loss"] == pytest.approx(seen.metrics["loss"], rel=rel)
    assert len(again.batch_waits) > 1
    too_many = [places for places in again.batch_waits[1:] if len(places) > WAITS[name][1]]
    assert not too_many


@pytest.mark.parametrize(("name", "precision"), RESUMED)
def test_resume(name, precision, drawn, trained, tmp_path):
    """It is exact, or close where training.distributed.why_inexact says that it cannot be."""
    seen = trained(name, precision)
    words = ["--resume", seen.out / "step_000010.pt", "--workers", 2, "--device", DEVICE, "--precision", precision]
    resumed = record(Script(name, drawn(name)), tmp_path, *RUN, *words)
    assert len(resumed.losses) == STEPS / 2
    if not resumed.run.inexact:
        assert fingerprint(tmp_path) == fingerprint(seen.out)
        assert totals(resumed) == totals(seen)[STEPS // 2 :]
    assert totals(resumed)[0] == pytest.approx(totals(seen)[STEPS // 2], rel=1e-3)
    assert totals(resumed) == pytest.approx(totals(seen)[STEPS // 2 :], rel=0.5)
    assert resumed.run.inexact == seen.run.inexact


@needs_cuda
@pytest.mark.parametrize("name", ["ssd", "centerfusion"])  # SGD and Adam
def test_a_run_moves_between_gpu_and_cpu(name, drawn, trained, tmp_path):
    script, gpu = Script(name, drawn(name)), trained(name, "fp32")
    words = ["--precision", "fp32", *RUN, "--max-steps", STEPS + 1]
    on_cpu = record(script, tmp_path / "cpu", *words, "--resume", gpu.out, "--device", "cpu")
    again = [STEPS + 2, "--resume", tmp_path / "cpu", "--device", DEVICE]
    on_gpu = record(script, tmp_path / "gpu", *words, "--max-steps", *again)
    for seen, step in ((on_cpu, STEPS + 1), (on_gpu, STEPS + 2)):
        assert last(seen.out)["step"] == step
        assert all(map(math.isfinite, totals(seen)))
