"""Damaged and altered checkpoints: each is refused in one line, or what is loaded is what was saved.

A small run has last.pt and previous.pt. A case damages last.pt and gives it to one of four programs:

resume    train_backbone.py --resume auto, which goes on from previous.pt and says so
predict   predict.py
export    export.py
weights   train_backbone.py --weights last.pt
"""

import contextlib
import io
import random
import shutil
import zipfile

import torch

import export
import predict
import synthetic
import train_backbone
from training import checkpoint, cli
from utils import torch_files

CASES = 100
RUN = (
    "--arch mobilenet_v2 --width-mult 0.1 --resolution 32 --batch-size 4 --lr 0.01 --ema 0.9 --workers 0 --device cpu "
)
RUN += "--precision fp32 --log-level warning"
HOSTILE = (None, -1, 10**6, 10**18, 1.5, float("nan"), "text", [], {}, [1, "a"], {"a": 1}, {7: 1}, torch.zeros(2))
FIELDS = ("step", "epoch", "classes", "num_classes", "arguments", "architecture", "image_size", "image_mean", "model")
FIELDS += ("ema", "optimizer", "scaler", "flags", "best", "stale", "format_version", "checksum")


def prepare(folder):
    synthetic.draw_imagefolder(folder / "data", 24)
    with contextlib.redirect_stdout(io.StringIO()):
        train_backbone.main(words(folder, folder / "run", "--save-every-steps", 2, "--max-steps", 4))


def words(shared, out, *more):
    return [*RUN.split(), *map(str, ("--data", shared / "data", "--model-dir", out, *more))]


def flip_bits(data, rng):
    for _ in range(rng.choice((1, 1, 2, 5))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def invert_bytes_of_a_tensor(data, rng):
    return inverted(data, rng, fitting=False)


def rewrite_a_tensor(data, rng):
    """Four bytes inverted, and the checksums of the zip file made to fit."""
    return inverted(data, rng, fitting=True)


def inverted(data, rng, fitting):
    records, changed = unzip(data), bytearray(data)
    name = rng.choice([name for name, content in records.items() if "/data/" in name and len(content) >= 4])
    place = rng.randrange(len(records[name]) - 3)
    content = bytearray(records[name])
    content[place : place + 4] = bytes(255 - value for value in content[place : place + 4])
    if fitting:
        return zipped({**records, name: bytes(content)})
    start = bytes(data).index(records[name])
    changed[start : start + len(content)] = content
    return changed


def rewrite_the_pickle(data, rng):
    records = unzip(data)
    name = next(name for name in records if name.endswith("data.pkl"))
    return zipped({**records, name: bytes(flip_bits(bytearray(records[name]), rng))})


def exchange_two_tensors(data, rng):
    """Each under the other's name, in a whole zip file."""
    records, sizes = unzip(data), {}
    for name, content in records.items():
        if "/data/" in name:
            sizes.setdefault(len(content), []).append(name)
    first, second = rng.sample(rng.choice([names for names in sizes.values() if len(names) > 1]), 2)
    return zipped({**records, first: records[second], second: records[first]})


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def clear_a_sector(data, rng):
    start = 512 * rng.randrange(len(data) // 512)
    data[start : start + 512] = bytes(512)
    return data


def append(data, rng):
    return data + rng.randbytes(rng.randrange(1, 100))


def alter_a_field(data, rng):
    """A value of another kind or range in a file that is whole, with a checksum that fits."""
    contents = torch.load(io.BytesIO(data), weights_only=True)
    field = rng.choice(FIELDS)
    contents[field] = rng.choice(HOSTILE)
    if rng.random() < 0.2:
        del contents[field]
    return saved(contents)


def alter_a_tensor(data, rng):
    """NaN, infinity, another shape or type."""
    contents = torch.load(io.BytesIO(data), weights_only=True)
    state = rng.choice((contents["model"], contents["ema"]["model"]))
    name = rng.choice([name for name, value in state.items() if value.is_floating_point()])
    value = state[name]
    wrong = (value * float("nan"), value + float("inf"), value.reshape(-1)[:1], value[None], value.long(), None, "text")
    state[name] = rng.choice(wrong)
    return saved(contents)


DAMAGES = (flip_bits, invert_bytes_of_a_tensor, rewrite_a_tensor, rewrite_the_pickle, exchange_two_tensors, truncate)
DAMAGES += (clear_a_sector, append, alter_a_field, alter_a_tensor)
PROGRAMS = ("resume", "predict", "export", "weights")


def unzip(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def zipped(records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(contents):
    if "checksum" in contents and isinstance(contents["checksum"], str):
        contents["checksum"] = torch_files.checksum(contents)
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def launch(program, file, shared, folder):
    """(exit code, lines on stdout, lines on stderr) of a program that reads `file`."""
    if program == "predict":
        image = next((shared / "data").rglob("*.jpg"))
        commands = predict.main, [file, image, "--out", folder / "out", "--device", "cpu"]
    elif program == "export":
        commands = export.main, [file, "--state-dict", folder / "out.pth"]
    elif program == "weights":
        commands = train_backbone.main, words(shared, folder / "new", "--weights", file, "--max-steps", 1)
    else:
        commands = train_backbone.main, words(shared, file.parent, "--resume", "auto", "--max-steps", 5)
    main, arguments = commands
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            cli.run(lambda: main([str(word) for word in arguments]))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue().splitlines(), errors.getvalue().splitlines()


def tensors(value, name=""):
    """{names that lead to it: tensor} of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {place: inner for key, item in items for place, inner in tensors(item, f"{name}.{key}").items()}


def loaded_parts(contents, program):
    """What a program loads of a checkpoint: all of it, or the averaged weights."""
    return tensors(contents if program == "resume" else contents["ema"]["model"])


def case(number, seed, folder):
    program, damage = PROGRAMS[number % len(PROGRAMS)], DAMAGES[number // len(PROGRAMS) % len(DAMAGES)]
    rng, shared = random.Random(f"{seed} {number}"), folder.parent / "shared"
    run = folder / "run"
    run.mkdir()
    for name in ("last.pt", "previous.pt"):
        shutil.copy(shared / "run" / name, run / name)
    last, original = run / "last.pt", (shared / "run" / "last.pt").read_bytes()
    damaged = bytes(damage(bytearray(original), rng))
    last.write_bytes(damaged)
    code, out, errors = launch(program, last, shared, folder)
    what = f"{damage.__name__}, {program}: exit code {code}\n" + "\n".join(out[-5:] + errors[-5:])
    if code:
        messages = [line for line in errors if line.startswith("error: ")]
        assert code == 2 and len(messages) == 1 and str(last) in messages[0], what
        assert errors[-1] == messages[0] and not any("Traceback" in line for line in errors), what
        # What resume refuses in a whole file with a checksum that fits is the state of an optimizer.
        assert program != "resume" or damage is alter_a_field, f"not continued from previous.pt: {what}"
        return
    if program == "resume" and any("using" in line and "previous.pt" in line for line in out):
        assert any(str(last) in line for line in out), f"previous.pt without a reason: {what}"
        assert checkpoint.read(run / "last.pt")["step"] == 5, what
        return
    (folder / "damaged.pt").write_bytes(damaged)
    expected = loaded_parts(torch.load(io.BytesIO(original), weights_only=True), program)
    actual = loaded_parts(torch_files.read(folder / "damaged.pt"), program)
    assert actual.keys() == expected.keys(), f"other tensors were accepted: {what}"
    for name, value in expected.items():
        same = value.dtype == actual[name].dtype and torch.equal(value, actual[name])
        assert same, f"{name} is another one and was accepted: {what}"
