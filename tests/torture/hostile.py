"""Hostile flags and files: exit code 2 and one line, in bounded time and memory, and nothing written elsewhere.

Each case starts a program in a folder of its own, with the data that `prepare` has drawn or a changed copy of it.
"""

import binascii
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch

import models
import synthetic
from tests.model_helpers import checkpoint
from tests.script_helpers import COMMON, FLAGS, ROOT
from tests.small_nuscenes import SmallNuScenes, pcd

MAX_SECONDS = 60  # of a CPU core; starting Python and importing torch takes five
MAX_WAIT = 400  # by the clock, for a busy machine
MAX_MEMORY = 3 << 30  # bytes of resident memory
MAX_LINE = 5000  # characters of a line on stderr
DATA = {"backbone": "folders", "retinanet": "coco", "ssd": "voc", "centerfusion": "nuscenes", "maskrcnn": "pennfudan"}
ZEROS = zlib.compress(bytes(1 << 27))
PASSWORDS = "../../../../../../../../etc/passwd"


def prepare(folder):
    for name, draw in (("voc", synthetic.draw_voc), ("coco", synthetic.draw_coco), ("csv", synthetic.draw_csv)):
        draw(folder / name, images=6, seed=1, size=(96, 64))
    synthetic.draw_pennfudan(folder / "pennfudan", images=5, seed=1, size=(96, 64))
    synthetic.draw_imagefolder(folder / "folders", images=10, seed=1)
    SmallNuScenes(folder / "nuscenes", frames=1)
    net = models.build("mobilenet_v2", 3, width_mult=0.1)
    torch.save(checkpoint(net, image_size=(64, 64)), folder / "net.pt")


# ---- flags: words after those of a small run of a script


def train(script, *words, file=None):
    """A function of (folder, shared) that returns the command; file(data) changes a copy of the data."""

    def command(folder, shared):
        data = shared / DATA[script]
        if file:
            data = Path(shutil.copytree(data, folder / "data"))
            file(data)
        start = [ROOT / f"train_{script}.py", *FLAGS[script].split(), *COMMON.split(), "--data", data]
        return [*start, "--model-dir", "run", *words]

    return command


def program(name, *words, file=None):
    """The same of predict.py, export.py or `-m synthetic`; file(folder) writes a file into the working folder."""

    def command(folder, shared):
        if file:
            file(folder)
        start = ["-m", "synthetic"] if name == "synthetic" else [ROOT / f"{name}.py", shared / "net.pt"]
        image = next((shared / "folders").rglob("*.jpg"))
        return [*start, *(image if word == "IMAGE" else word for word in words)]

    return command


def recipe(text, script="ssd"):
    """A training whose recipe is `text`."""

    def command(folder, shared):
        (folder / "recipe.toml").write_text(text)
        return [*train(script)(folder, shared), "--config", "recipe.toml"]

    return command


def fifo(script, flag, name="pipe"):
    def command(folder, shared):
        os.mkfifo(folder / name)
        return [*train(script)(folder, shared), flag, name]

    return command


# ---- files


def replace(pattern, old, new, count=1):
    """A function that replaces text in the first file that matches `pattern`."""

    def change(folder):
        path = next(path for path in sorted(folder.glob(pattern)) if old in path.read_text())
        path.write_text(path.read_text().replace(old, new, count))

    return change


def write(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def table(name, **values):
    """A function that changes the last record of a nuScenes table."""

    def change(folder):
        path = folder / f"v1.0-mini/{name}.json"
        records = json.loads(path.read_text())
        record = next(r for r in reversed(records) if "samples/CAM" in r.get("filename", "samples/CAM"))
        record |= values
        path.write_text(json.dumps(records))

    return change


def objects(key, **values):
    """A function that changes the first item of a list of COCO's training file."""

    def change(folder):
        path = next(folder.glob("annotations/*train*.json"))
        content = json.loads(path.read_text())
        content[key][0] |= values
        path.write_text(json.dumps(content))

    return change


def xml(text):
    """A function that replaces the annotation of every image."""

    def change(folder):
        for path in folder.glob("Annotations/*.xml"):
            path.write_text(text)

    return change


def png(width, height, *chunks, bits=8):
    """A PNG file of zeros of this size, its pixels not all there."""
    pixels = zlib.compress(bytes(1 << 20))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), *chunks, (b"IDAT", pixels)]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in [*parts, (b"IEND", b"")]:
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", binascii.crc32(name + body))
    return content


def laughs():
    entities = ['<!ENTITY a0 "ha">', *(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))]
    return f"<!DOCTYPE a [{''.join(entities)}]><annotation><object><name>&a9;</name></object></annotation>"


def radar_files(content):
    def change(folder):
        for path in folder.glob("samples/RADAR*/*.pcd"):
            path.write_bytes(content)

    return change


def class_folder(folder):
    (folder / "train/disc").rename(folder / "train/\x1b[2Jdisc")


def large_masks(folder):
    path = next(folder.glob("annotations/*train*.json"))
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": 10**6, "width": 10**6}
    for item in content["annotations"]:
        item["segmentation"] = {"size": [10**6, 10**6], "counts": [10**12]}
    path.write_text(json.dumps(content))


def masks_of(file):
    """A Mask R-CNN on COCO with a changed annotation file."""

    def command(folder, shared):
        data = Path(shutil.copytree(shared / "coco", folder / "data"))
        file(data)
        words = [ROOT / "train_maskrcnn.py", "--dataset", "coco", *FLAGS["maskrcnn"].split(), *COMMON.split()]
        return [*words, "--data", data, "--model-dir", "run", "--bad-boxes", "error"]

    return command


def csv_of(rows):
    def command(folder, shared):
        data = Path(shutil.copytree(shared / "csv", folder / "data"))
        (data / "train.csv").write_text(rows)
        words = [word if word != "voc" else "csv" for word in FLAGS["ssd"].split()]
        words = [ROOT / "train_ssd.py", *words, *COMMON.split(), "--data", data, "--model-dir", "run"]
        return [*words, "--bad-boxes", "error"]

    return command


ALL_BAD = ("--bad-boxes", "error")
PROGRAMS = (
    train("ssd", "--resolution", "100000"),
    train("ssd", "--resolution", "1"),
    train("backbone", "--resolution", "100000"),
    train("backbone", "--resolution", "1"),
    train("ssd", "--seed", str(10**23)),
    train("backbone", "--seed", "-1"),
    train("retinanet", "--model-dir", "/proc/x"),
    train("backbone", "--model-dir", "m" * 5000),
    train("ssd", "--milestones", "nan"),
    train("ssd", "--t-max", "1e308"),
    train("backbone", "--epochs", str(10**18)),
    train("backbone", "--batch-size", str(10**12)),
    train("ssd", "--workers", str(10**6)),
    train("ssd", "--lr", "nan"),
    train("backbone", "--lr", "inf"),
    train("retinanet", "--min-side", "1"),
    train("retinanet", "--max-side", str(10**9)),
    train("maskrcnn", "--val-share", "nan"),
    train("maskrcnn", "--proposals", str(10**12)),
    train("ssd", "--gpus", "99999999999999"),
    train("centerfusion", "--input-size", "32", str(10**9)),
    train("centerfusion", "--pillar-dims", "nan,1,1"),
    train("centerfusion", "--max-pc-dist", "inf"),
    train("ssd", "--warmup-steps", str(10**30)),
    train("ssd", "--data", "d" * 5000),
    train("retinanet", "--coco-train", "../../../../etc/" + "x" * 300),
    recipe("data = " + "[" * 100_000),
    recipe("seed = " + "9" * 1_000_000),
    recipe('data = ["a\\u0000b"]'),
    train("ssd", "--config", "."),
    train("ssd", "--config", "/dev/zero"),
    train("ssd", "--config", "9" * 100_000),
    fifo("ssd", "--config"),
    program("predict", "IMAGE", "--classes", "\x1b[2Jx"),
    program("predict", "IMAGE", "--threshold", "nan"),
    program("predict", "IMAGE", "--size", str(10**6)),
    program("predict", "IMAGE", "--labels", "labels.txt", file=write("labels.txt", "a\x1b[31m\nb\nc\n")),
    program("predict", "bomb.png", file=write("bomb.png", png(50_000, 50_000))),
    program("predict", "line.png", file=write("line.png", png(1_000_000_000, 1))),
    program("predict", "text.png", file=write("text.png", png(8, 8, (b"zTXt", b"a\0\0" + ZEROS)))),
    program("predict", "IMAGE", "--annotations", "deep.json", file=write("deep.json", "[" * 1_000_000)),
    program("export", "--size", str(10**9)),
    program("export", "--opset", str(10**9)),
    program("synthetic", "voc", "out", "--images", str(10**12)),
    program("synthetic", "voc", "out", "--size", "1000000x1000000"),
    program("synthetic", "voc", "o" * 5000),
    program("synthetic", "voc", "out", "--seed", "-1"),
    train("centerfusion", file=table("sample_data", filename=PASSWORDS)),
    train("centerfusion", file=table("sample_data", filename="/etc/passwd")),
    train("centerfusion", file=table("sample", token=[7])),
    train("centerfusion", file=table("calibrated_sensor", rotation=[0, 0, 0, 0])),
    train("centerfusion", "--check-data", file=radar_files(pcd([], POINTS=10**18))),
    train("ssd", file=write("ImageSets/Main/trainval.txt", f"{PASSWORDS}\n")),
    train("ssd", file=xml(laughs())),
    train("ssd", file=write("labels.txt", "".join(f"{number}\n" for number in range(1_000_000)))),
    train("retinanet", *ALL_BAD, file=objects("annotations", bbox=[1e308, 1e308, 1e308, 1e308])),
    train("retinanet", file=objects("categories", name="\ud800\x1b[31m")),
    masks_of(large_masks),
    csv_of("images/000000.jpg,0,0,9,9," + "x" * 200_000 + "\n"),
    train("backbone", file=class_folder),
)
CASES = len(PROGRAMS)


def case(number, seed, folder):
    """The cases do not depend on the seed."""
    shared, work = folder.parent / "shared", folder / "work"
    work.mkdir()
    before = listing(shared), sorted(os.listdir(ROOT))
    words = [str(word) for word in PROGRAMS[number](work, shared)]
    before = before if before[0] == listing(shared) else (listing(shared), before[1])
    status, seconds, memory, text = launch(words, folder)
    shown = " ".join(words)[:300]
    reason = check(status, seconds, memory, text)
    assert not reason, f"{shown}\n{reason}\n{text[-2000:]}"
    assert (listing(shared), sorted(os.listdir(ROOT))) == before, f"{shown}\nfiles outside its folder have changed"
    assert sorted(os.listdir(folder)) == ["stderr", "work"], f"{shown}\nwrote {os.listdir(folder)}"


def launch(words, folder):
    """(exit code, seconds of a CPU core, bytes of memory, stderr) of a Python program in folder/work."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    with open(folder / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder / "work", env=environment, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        while time.monotonic() < start + MAX_WAIT:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
    finally:
        process.returncode = 0  # it has been waited for
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, memory, text


def check(status, seconds, memory, text):
    """What is wrong with the end of a program, or ""."""
    errors = [line for line in text.splitlines() if "error: " in line]
    if seconds > MAX_SECONDS:
        return f"took {seconds:.0f} s"
    if "Traceback" in text:
        return "a traceback"
    if status != 2 or len(errors) != 1:
        return f"exit code {status} with {len(errors)} lines of errors"
    if memory > MAX_MEMORY:
        return f"{memory >> 20} MiB of memory"
    if len(errors[0]) > MAX_LINE or "\x1b" in text or "\0" in text:
        return f"an error of {len(errors[0])} characters, or with control characters"
    return ""


def listing(folder):
    """{path: date} of all files but caches of the data."""
    files = (path for path in folder.rglob("*") if path.is_file() and "/.sightline" not in str(path))
    return {str(path): path.stat().st_mtime_ns for path in files}
