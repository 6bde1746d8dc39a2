"""Make the images in docs/images: train small networks on synthetic data, predict, arrange what predict.py has drawn.

python -m docs.draw_images        75 minutes on two busy CPU cores; finished runs in runs/docs are used again
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import synthetic

WORK, OUT = Path("runs/docs"), Path("docs/images")
GAP = 8  # pixels between images
BACKGROUND = (255, 255, 255)
KEY_FRAME = 3  # the one that is shown, of eight
MIN_SCORE = 0.6  # of all detections in a shown image
# name of the run -> layout of its synthetic data, number of images, script, further flags
RUNS = {
    "shapes": ("imagefolder", 3000, "backbone", ""),
    "detector": ("coco", 500, "retinanet", f"--backbone-weights {WORK}/shapes/backbone.pt"),
    "people": ("pennfudan", 300, "maskrcnn", f"--backbone-weights {WORK}/shapes/backbone.pt"),
    "fusion": ("nuscenes", 1920, "centerfusion", f"--weights {WORK}/shapes/backbone.pt"),
}


def run(script: str, *words: object) -> None:
    """Run a script of this project; CalledProcessError if it fails."""
    command = [sys.executable, f"{script}.py", *map(str, words)]
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def train(name: str) -> None:
    layout, images, script, flags = RUNS[name]
    data = synthetic.draw(layout, WORK / "data" / layout, images)
    where = ["--data", data, "--model-dir", WORK / name, "--resume", "auto"]
    run(f"train_{script}", "--config", f"configs/{script}_small.toml", *where, *flags.split())


def predict(name: str, *words: object) -> Path:
    """The folder that predict.py has filled with the best checkpoint of a run."""
    out = WORK / "predictions" / name
    run("predict", WORK / name / "best.pt", *words, "--out", out, "--overwrite")
    return out


def with_most_objects(out: Path, count: int = 6) -> list[Path]:
    """The images in a folder of predict.py with the most detections, all with a score of at least MIN_SCORE."""
    detections = json.loads((out / "detections.json").read_text())
    unsure = {detection["file_name"] for detection in detections if detection["score"] < MIN_SCORE}
    counts = Counter(detection["file_name"] for detection in detections)
    names = [Path(name).stem for name, _ in counts.most_common() if name not in unsure]
    return [out / f"{name}.jpg" for name in names[:count]]


def scaled(image: Image.Image, height: int) -> Image.Image:
    """The image at this height, its aspect ratio unchanged."""
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)


def row(images: Sequence[Image.Image], height: int) -> Image.Image:
    """Images beside each other, all of this height."""
    images = [scaled(image, height) for image in images]
    canvas = Image.new("RGB", (sum(i.width for i in images) + GAP * (len(images) - 1), height), BACKGROUND)
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + GAP
    return canvas


def column(images: Sequence[Image.Image], width: int) -> Image.Image:
    """Images below each other, all of this width."""
    images = [image.resize((width, round(image.height * width / image.width))) for image in images]
    canvas = Image.new("RGB", (width, sum(i.height for i in images) + GAP * (len(images) - 1)), BACKGROUND)
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + GAP
    return canvas


def grid(paths: Sequence[Path], columns: int, width: int) -> Image.Image:
    """The first images of `paths` in rows of `columns`, `width` pixels wide in all."""
    images = [Image.open(path) for path in paths]
    rows = [row(images[first : first + columns], 240) for first in range(0, len(images), columns)]
    return column(rows, width)


def save(image: Image.Image, name: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    image.save(OUT / name, quality=85, optimize=True)
    print(OUT / name, image.size, f"{(OUT / name).stat().st_size / 1000:.0f} KB")


def main() -> None:
    for name in RUNS:
        train(name)
    detections = with_most_objects(predict("detector", WORK / "data/coco/val2017"))
    held_out = (WORK / "people/held_out.txt").read_text().splitlines()
    masks = with_most_objects(predict("people", *(WORK / "data/pennfudan/PNGImages" / name for name in held_out)))
    key_frames = sorted(predict("fusion", WORK / "data/nuscenes", "--samples", 8).glob("scene*.jpg"))
    save(grid(detections, 3, 960), "detections.jpg")
    save(grid(masks, 3, 960), "masks.jpg")
    with Image.open(key_frames[KEY_FRAME]) as image:
        save(column([image], 1800), "cameras_radar.jpg")
        save(column([grid([*detections[:3], *masks[:3]], 6, 1600), image], 1600), "strip.jpg")


if __name__ == "__main__":
    main()
