"""Scenes of 2D shapes as files in the layouts of real data sets.

Each `write_` function draws scenes 0 to images - 1 of a seed into the folder `out`. size: see synthetic.shapes.drawing.
"""

import itertools
import json

import numpy as np
from PIL import Image

from synthetic.shapes.drawing import CLASSES, draw_shapes, draw_single_shape
from utils import files

OPEN_IMAGES_COLUMNS = (
    *("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"),
    *("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside", "id", "ClassName"),
)
CATEGORY_IDS = (1, 3, 7, 10, 18)  # of CLASSES in COCO files: with gaps, as in COCO's own


def split(images, parts=("train", "val"), min_images=1):
    """{part: range of image indices}: every part after the first gets 15 % of the images, at least `min_images`."""
    count = max(min_images, round(0.15 * images))
    ends = [images - count * (len(parts) - 1 - number) for number in range(len(parts))]
    return {part: range(start, end) for part, start, end in zip(parts, [0, *ends], ends)}


def save_jpeg(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=90)


def write_voc(out, images, seed, size):
    """JPEGImages, Annotations, ImageSets/Main/{train,val,trainval,test}.txt and labels.txt."""
    (out / "Annotations").mkdir(exist_ok=True)
    for index in range(images):
        scene, name = draw_shapes(seed, index, size), f"{index:06d}"
        save_jpeg(out / "JPEGImages" / f"{name}.jpg", scene.image)
        (out / "Annotations" / f"{name}.xml").write_text(voc_xml(f"{name}.jpg", scene))
    parts = split(images, ("train", "val", "test"))
    for name, indices in {**parts, "trainval": [*parts["train"], *parts["val"]]}.items():
        files.write_text(out / "ImageSets/Main" / f"{name}.txt", "".join(f"{index:06d}\n" for index in indices))
    files.write_text(out / "labels.txt", "".join(f"{name}\n" for name in CLASSES))


def voc_xml(file_name, scene):
    """VOC annotation: pixels count from 1 and the last one belongs to the box. A crowd is `difficult`, the only way in
    VOC to mark a box as ignored."""
    height, width = scene.image.shape[:2]
    lines = ["<annotation>", "\t<folder>JPEGImages</folder>", f"\t<filename>{file_name}</filename>"]
    lines += ["\t<size>", f"\t\t<width>{width}</width>", f"\t\t<height>{height}</height>", "\t\t<depth>3</depth>"]
    lines += ["\t</size>", "\t<segmented>0</segmented>"]
    ignored = scene.difficult | scene.crowd
    for label, (x1, y1, x2, y2), truncated, difficult in zip(scene.labels, scene.boxes, scene.truncated, ignored):
        lines += ["\t<object>", f"\t\t<name>{CLASSES[label]}</name>", "\t\t<pose>Unspecified</pose>"]
        lines += [f"\t\t<truncated>{int(truncated)}</truncated>", f"\t\t<difficult>{int(difficult)}</difficult>"]
        corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
        lines += ["\t\t<bndbox>", *(f"\t\t\t<{key}>{value}</{key}>" for key, value in corners.items()), "\t\t</bndbox>"]
        lines += ["\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])


def write_open_images(out, images, seed, size):
    """{train,validation,test}/ID.jpg and sub-{train,validation,test}-annotations-bbox.csv, as jetson-inference writes
    them. As in Open Images, an image without objects has no row."""
    for part, indices in split(images, ("train", "validation", "test")).items():
        rows = [OPEN_IMAGES_COLUMNS]
        for index in indices:
            scene, name = draw_shapes(seed, index, size), f"{index:016x}"
            save_jpeg(out / part / f"{name}.jpg", scene.image)
            rows += open_images_rows(name, scene)
        files.write_csv(out / f"sub-{part}-annotations-bbox.csv", rows)


def open_images_rows(name, scene):
    """A row per object; corners from 0 to 1. Mostly hidden objects are IsOccluded, crowds IsGroupOf."""
    height, width = scene.image.shape[:2]
    rows = []
    for i, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[i].tolist()
        corners = [f"{value:.6f}" for value in (x1 / width, x2 / width, y1 / height, y2 / height)]
        flags = [int(scene.difficult[i]), int(scene.truncated[i]), int(scene.crowd[i]), 0, 0]
        code = f"/m/0drawn{label}"
        rows.append([name, "drawn", code, 1, *corners, *flags, code, CLASSES[label]])
    return rows


def write_coco(out, images, seed, size):
    """annotations/instances_{train,val}2017.json and {train,val}2017/ID.jpg. Image ids start at 101 and have gaps."""
    categories = [{"id": number, "name": name, "supercategory": "shape"} for number, name in zip(CATEGORY_IDS, CLASSES)]
    for part, indices in split(images).items():
        content = {"images": [], "annotations": [], "categories": categories}
        for index in indices:
            scene, image_id = draw_shapes(seed, index, size), 101 + 3 * index
            height, width = scene.image.shape[:2]
            image = {"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height}
            save_jpeg(out / f"{part}2017" / image["file_name"], scene.image)
            content["images"].append(image)
            content["annotations"] += coco_annotations(image_id, scene)
        files.write_text(out / "annotations" / f"instances_{part}2017.json", json.dumps(content) + "\n")


def coco_annotations(image_id, scene):
    """One annotation per object, with the segmentation and area of its mask; a crowd has iscrowd 1."""
    annotations = []
    for i, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[i].tolist()
        annotation = {"id": 100 * image_id + i, "image_id": image_id, "category_id": CATEGORY_IDS[label]}
        annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(scene.masks[i].sum())}
        annotation |= {"iscrowd": int(scene.crowd[i]), "segmentation": run_lengths(scene.masks[i])}
        annotations.append(annotation)
    return annotations


def run_lengths(mask):
    """A bool [H,W] as COCO's uncompressed RLE: lengths of runs down the columns, the first one outside the mask."""
    ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0, append=mask.size).tolist()}


def write_csv(out, images, seed, size):
    """train.csv and val.csv (`path,x1,y1,x2,y2,class`; `path,,,,,` without objects), classes.csv (`name,id`), images/.

    Crowds and mostly hidden objects are left out: this layout cannot mark a box as ignored."""
    for part, indices in split(images).items():
        rows = []
        for index in indices:
            scene, path = draw_shapes(seed, index, size), f"images/{index:06d}.jpg"
            save_jpeg(out / path, scene.image)
            annotated = np.flatnonzero(~(scene.crowd | scene.difficult))
            boxes = [[path, *scene.boxes[i].tolist(), CLASSES[scene.labels[i]]] for i in annotated]
            rows += boxes or [[path, "", "", "", "", ""]]
        files.write_csv(out / f"{part}.csv", rows)
    files.write_csv(out / "classes.csv", [[name, label] for label, name in enumerate(CLASSES)])


def write_imagefolder(out, images, seed, size):
    """{train,val}/CLASS/ID.jpg, one object per image."""
    for part, indices in split(images, min_images=len(CLASSES)).items():
        for index in indices:
            scene = draw_single_shape(seed, index, size)
            save_jpeg(out / part / CLASSES[scene.labels[0]] / f"{index:06d}.jpg", scene.image)


def write_pennfudan(out, images, seed, size):
    """PNGImages/NAME.png and PedMasks/NAME_mask.png: in a mask 0 is background, and 1, 2 .. are the objects.

    As in the real masks only visible pixels are marked: a later object covers an earlier one. The layout has no splits
    and no way to mark an object as ignored, so scenes with a crowd are skipped.
    """
    for folder in ("PNGImages", "PedMasks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    scenes = (draw_shapes(seed, index, size) for index in itertools.count())
    scenes = (scene for scene in scenes if not scene.crowd.any())
    for index, scene in enumerate(itertools.islice(scenes, images), start=1):
        mask = np.zeros(scene.image.shape[:2], np.uint8)
        for number, own in enumerate(scene.masks, start=1):
            mask[own] = number
        Image.fromarray(scene.image).save(out / "PNGImages" / f"Drawn{index:05d}.png", compress_level=1)
        Image.fromarray(mask).save(out / "PedMasks" / f"Drawn{index:05d}_mask.png")
