"""--compile: how often torch.compile compiles the network in a run of each script.

Its backend is one that runs the traced graph as it is: what has to be compiled again does not depend on the backend.
"""

import pytest
import torch

from tests.script_helpers import Script, fingerprint, last
from utils.errors import UsageError


@pytest.fixture
def compiled(monkeypatch):
    """Appended at each call of a compiled network: (shape of the images, number of graphs compiled so far)."""
    torch._dynamo.reset()
    compile_network, graphs, calls = torch.compile, [], []

    def count_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_and_count(net, **options):
        network = compile_network(net, backend=count_graph, **options)

        def call(images, **inputs):
            outputs = network(images, **inputs)
            calls.append((tuple(images.shape), len(graphs)))
            return outputs

        return call

    monkeypatch.setattr(torch, "compile", compile_and_count)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backbone", "ssd", "centerfusion"])
def test_images_of_one_size_compile_once(name, drawn, tmp_path, compiled):
    """Micro-batches, validation with the average of the weights, and ends of epochs do not change what was compiled."""
    more = ["--max-steps", 7, "--validation-steps", 3, "--accumulate", 2, "--ema", 0.9, "--precision", "bf16"]
    Script(name, drawn(name)).main(tmp_path, *more, "--compile")
    assert len(compiled) == 14
    assert {graphs for _, graphs in compiled} == {1}


@pytest.mark.slow
def test_images_of_many_sizes_compile_no_more_than_twice(drawn, tmp_path, compiled):
    """Where the second size differs from the first in one side only, the other side is not compiled again either."""
    more = ["--min-side", 140, 170, "--max-side", 250, "--batch-size", 2, "--freeze-stages", 2]
    Script("retinanet", drawn("retinanet")).main(
        tmp_path, *more, "--max-steps", 5, "--validation-steps", 3, "--compile"
    )
    shapes = [shape for shape, _ in compiled]
    second = next(n for n, shape in enumerate(shapes) if shape != shapes[0])
    assert len({height for *_, height, _ in shapes}) > 1 and len({width for *_, width in shapes}) > 1
    assert compiled[-1][1] == compiled[second][1] <= 2


@pytest.mark.slow
def test_a_compiled_run_saves_the_same_tensors_and_resumes(drawn, tmp_path, compiled):
    script, run = Script("ssd", drawn("ssd")), ["--max-steps", 4, "--save-every-steps", 2, "--ema", 0.9]
    run += ["--freeze-backbone", "--validation-epochs", 99]
    script.main(tmp_path / "plain", *run)
    assert not compiled
    script.main(tmp_path / "compiled", *run, "--compile")
    script.main(tmp_path / "resumed", *run, "--compile", "--resume", tmp_path / "compiled" / "step_000002.pt")
    assert len(compiled) == 6
    for name in ("compiled", "resumed"):
        assert fingerprint(tmp_path / name) == fingerprint(tmp_path / "plain")
        torch.testing.assert_close(last(tmp_path / name)["ema"], last(tmp_path / "plain")["ema"], rtol=0, atol=0)


def test_mask_rcnn_is_not_compiled(tmp_path):
    with pytest.raises(UsageError, match=r"--compile: Mask R-CNN, .* compiled every step; leave it out"):
        Script("maskrcnn", tmp_path).main(tmp_path / "run", "--compile")
    assert not (tmp_path / "run").exists()
