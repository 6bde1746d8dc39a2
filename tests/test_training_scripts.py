"""What the training scripts promise in the same words, before they look at any data."""

import importlib

import pytest

from data import drawn
from training.flags import UsageError

WEIGHTS = {"backbone": "--weights", "retinanet": "--pretrained", "ssd": "--pretrained-ssd", "maskrcnn": "--weights"}
WEIGHTS |= {"centerfusion": "--load_model"}


def script(name):
    return importlib.import_module(f"train_{name}")


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_untrained_network_is_not_scored(name, tmp_path):
    with pytest.raises(UsageError, match=f"--eval-only: no weights; give --resume auto or {WEIGHTS[name]} FILE"):
        script(name).main(["--eval-only", "--device", "cpu", "--model-dir", str(tmp_path)])


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_default_rates_are_for_the_default_batch(name):
    args = script(name).parse_args([])
    assert args.lr_batch_size == args.batch_size


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("words", ["--lr -1", "--lr inf", "--momentum 2"])
def test_numbers_out_of_range_are_refused(name, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).parse_args(words.split())
    assert stopped.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_weights_that_were_not_written_are_not_named(tmp_path, capsys):
    """A run that goes on in another folder and never gets better writes no backbone.pt there."""
    shapes = drawn.draw_imagefolder(tmp_path / "shapes", images=20, seed=1)
    words = ["--data", str(shapes), "--resolution", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    words += ["--lr", "0", "--freeze-bn", "--log-level", "warning"]
    for folder, more in (
        ("first", ["--max-steps", "1"]),
        ("second", ["--max-steps", "2", "--resume", tmp_path / "first"]),
    ):
        script("backbone").main([*words, *map(str, more), "--model-dir", str(tmp_path / folder)])
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("best top1"))
    assert first.endswith("backbone.pt") and second.endswith("at step 1")
