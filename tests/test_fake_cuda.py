"""What the programs do with tensors on a GPU: no operation on two devices, and how often they wait for it."""

import pytest
import torch

import models
import predict
import train_ssd
from data import loader
from models import onnx
from tests import fake_cuda
from tests.export_helpers import generated_images, randomize
from tests.script_helpers import Script
from training import checkpoint, optim, run_folder
from training.logger import Logger

RUN = ["--device", "cuda", "--max-steps", 3, "--batch-size", 2, "--log-every", 99, "--validation-epochs", 99]
# How often a training step and a batch of an evaluation wait for the GPU, at most; the first of each may fill caches.
WAITS = {"backbone": (0, 3), "ssd": (0, 3), "retinanet": (0, 3), "centerfusion": (0, 3), "maskrcnn": (2, 3)}


MORE = {"ssd": ["--validation-mean-ap"], "centerfusion": ["--flip-test"]}
SIZES = {  # network -> size of its images in predict.py
    "resnet18": {"image_size": (32, 32)},
    "mb1-ssd": {"image_size": (96, 96)},
    "retinanet_resnet18": {"min_side": 64, "max_side": 96},
    "maskrcnn_resnet18": {"min_side": 64, "max_side": 96},
    "centerfusion_resnet18": {"image_size": (64, 128)},
}
SMALLER = {"maskrcnn_resnet18": {"width": 8, "hidden": 16, "proposals": 20}}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    fake_cuda.install(monkeypatch)


@pytest.fixture(params=WAITS)
def script(request, drawn):
    return Script(request.param, drawn(request.param))


@pytest.mark.slow
def test_waits_of_training_and_evaluation(script, tmp_path, monkeypatch):
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
        script.main(tmp_path, *RUN, *MORE.get(script.name, []))
    of_step, of_batch = steps[1], batches[1]  # the last step also logs and validates
    assert len(of_step) <= WAITS[script.name][0], "\n".join(of_step)
    assert len(of_batch) <= WAITS[script.name][1], "\n".join(of_batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_predict(name, drawn, tmp_path, monkeypatch):
    net = models.build(name, 10 if "centerfusion" in name else 3, **SMALLER.get(name, {}))
    net.classes = [f"class {label}" for label in range(net.num_classes)]
    if net.name == "retinanet":
        randomize(net, (64, 96))
    checkpoint.write(tmp_path / "net.pt", {**models.describe(net, **SIZES[name]), "model": net})
    data, folder = {"centerfusion": ("centerfusion", ""), "maskrcnn": ("maskrcnn", "PNGImages")}.get(
        name.partition("_")[0], ("ssd", "JPEGImages")
    )
    images = drawn(data) / folder
    batches = []
    with fake_cuda.FakeCuda() as gpu:
        original = predict.batches

        def counted(items, size):
            for batch in original(items, size):
                before = len(gpu.waits)
                yield batch
                batches.append(gpu.waits[before:])

        monkeypatch.setattr(predict, "batches", counted)
        words = [tmp_path / "net.pt", images, "--out", tmp_path / "out", "--device", "cuda", "--threshold", 0.02]
        words += ["--samples", 4] if data == "centerfusion" else []
        predict.main([*map(str, words), "--batch-size", "2"])
    assert len(batches) > 2
    assert len(batches[1]) <= 3, "\n".join(batches[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mb1-ssd", "retinanet_resnet18"])
def test_graphs_of_export(name):
    size = (64, 96)
    with fake_cuda.FakeCuda(), torch.no_grad():
        graph = onnx.graph(models.build(name, 3), size, with_nms=name != "resnet18").to("cuda").eval()
        sizes = [torch.tensor([[64, 96], [33, 64]]).float().to("cuda")] * ("sizes" in graph.inputs)
        outputs = graph(generated_images(size, 2).float().to("cuda"), *sizes)
        assert all(output.is_cuda for output in outputs)


def test_only_the_tensors_of_a_batch_are_pinned():
    """torch would pack the masks of the targets again, to copy them."""
    target = {"boxes": torch.rand(2, 4), "labels": torch.zeros(2, dtype=torch.int64), "ignore": torch.zeros(2) > 0}
    with fake_cuda.FakeCuda() as gpu:
        _, targets = loader.collate([(torch.zeros(3, 4, 4, dtype=torch.uint8), target)])
        pinned = torch.utils.data._utils.pin_memory.pin_memory((None, targets))[1]
        assert pinned[0] is targets[0]
        assert pinned.tensors["boxes"] is not targets.tensors["boxes"]
        assert all(tensor.is_cuda for tensor in pinned.to("cuda").values())
        assert not gpu.waits


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_an_optimizer_on_the_gpu_has_one_kernel(name):
    words = ["--optimizer", name, "--lr", "0.1"]
    with fake_cuda.FakeCuda() as gpu:
        net = torch.nn.Linear(2, 2).to("cuda")
        optimizer = optim.build(train_ssd.parse_args(words), {"all": net.parameters()}, {"all": None})
        net(torch.ones(1, 2, device="cuda")).sum().backward()
        gpu.waits.clear()
        optimizer.step()
        assert all(group["fused"] for group in optimizer.param_groups)
        assert not gpu.waits
