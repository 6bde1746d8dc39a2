"""Drawn scenes as files in the layouts of real sets; `data.drawn` says when and where.

Each `write_` function takes the out folder, (index, Scene) pairs and the indices of each part.
"""

import csv
import json

import numpy as np
from PIL import Image

from data.scenes import CLASSES

OPEN_IMAGES_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside,id,ClassName"
)
CATEGORY_IDS = (1, 3, 7, 10, 18)  # of CLASSES in coco: with gaps, as COCO's own have


def save_jpeg(path, image):
    Image.fromarray(image).save(path, quality=90)


def voc_xml(name, scene):
    """VOC annotation: corners count from 1 and the last pixel belongs to the box. A crowd is written as difficult:
    VOC has no other word for a box to ignore."""
    height, width = scene.image.shape[:2]
    lines = ["<annotation>", "\t<folder>JPEGImages</folder>", f"\t<filename>{name}</filename>"]
    lines += ["\t<size>", f"\t\t<width>{width}</width>", f"\t\t<height>{height}</height>", "\t\t<depth>3</depth>"]
    lines += ["\t</size>", "\t<segmented>0</segmented>"]
    ignored = scene.difficult | scene.crowd
    for label, (x1, y1, x2, y2), cut, difficult in zip(
        scene.labels, scene.boxes, scene.truncated, ignored, strict=True
    ):
        lines += ["\t<object>", f"\t\t<name>{CLASSES[label]}</name>", "\t\t<pose>Unspecified</pose>"]
        lines += [f"\t\t<truncated>{int(cut)}</truncated>", f"\t\t<difficult>{int(difficult)}</difficult>"]
        corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
        lines += ["\t\t<bndbox>", *(f"\t\t\t<{key}>{value}</{key}>" for key, value in corners.items()), "\t\t</bndbox>"]
        lines += ["\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])


def write_voc(out, scenes, parts):
    """JPEGImages, Annotations, ImageSets/Main/{train,val,trainval,test}.txt and labels.txt under out."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        save_jpeg(out / "JPEGImages" / f"{index:06d}.jpg", scene.image)
        (out / "Annotations" / f"{index:06d}.xml").write_text(voc_xml(f"{index:06d}.jpg", scene))
    lists = {**parts, "trainval": [*parts["train"], *parts["val"]]}
    for name, indices in lists.items():
        (out / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def write_open_images(out, scenes, parts):
    """{train,validation,test}/ID.jpg and sub-{train,validation,test}-annotations-bbox.csv under out. A picture without
    objects has no row, as in Open Images. A mostly hidden object is IsOccluded, a crowd IsGroupOf."""
    names = {"train": "train", "val": "validation", "test": "test"}
    split_of = {index: names[part] for part, indices in parts.items() for index in indices}
    rows = {split: [] for split in names.values()}
    for split in rows:
        (out / split).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        split, name = split_of[index], f"{index:016x}"
        save_jpeg(out / split / f"{name}.jpg", scene.image)
        rows[split] += open_images_rows(name, scene)
    for split, lines in rows.items():
        with open(out / f"sub-{split}-annotations-bbox.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([OPEN_IMAGES_COLUMNS.split(","), *lines])


def open_images_rows(name, scene):
    """One row an object, in the columns of OPEN_IMAGES_COLUMNS; corners relative to the picture, 0 to 1."""
    height, width = scene.image.shape[:2]
    rows = []
    for i, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[i].tolist()
        corners = [f"{value:.6f}" for value in (x1 / width, x2 / width, y1 / height, y2 / height)]
        facts = [int(scene.difficult[i]), int(scene.truncated[i]), int(scene.crowd[i]), 0, 0]
        code = f"/m/0drawn{label}"
        rows.append([name, "drawn", code, 1, *corners, *facts, code, CLASSES[label]])
    return rows


def write_coco(out, scenes, parts):
    """annotations/instances_{train,val}2017.json and {train,val}2017/ID.jpg under out. A crowd is iscrowd; the others,
    mostly hidden ones too, are not. Image ids begin at 101 and leave gaps."""
    category_of = [
        {"id": number, "name": name, "supercategory": "shape"} for number, name in zip(CATEGORY_IDS, CLASSES)
    ]
    sets = {part: {"images": [], "annotations": [], "categories": category_of} for part in parts}
    part_of = {index: part for part, indices in parts.items() for index in indices}
    for folder in ("annotations", *(f"{part}2017" for part in parts)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        part, image_id = part_of[index], 101 + 3 * index
        height, width = scene.image.shape[:2]
        image = {"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height}
        save_jpeg(out / f"{part}2017" / image["file_name"], scene.image)
        sets[part]["images"].append(image)
        sets[part]["annotations"] += coco_objects(image_id, scene)
    for part, content in sets.items():
        (out / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content) + "\n")


def coco_objects(image_id, scene):
    """One annotation an object; segmentation and area are of its mask."""
    objects = []
    for i, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[i].tolist()
        facts = {"id": 100 * image_id + i, "image_id": image_id, "category_id": CATEGORY_IDS[label]}
        facts |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(scene.masks[i].sum())}
        objects.append(facts | {"iscrowd": int(scene.crowd[i]), "segmentation": run_lengths(scene.masks[i])})
    return objects


def run_lengths(mask):
    """A bool [H,W] as COCO's uncompressed RLE: lengths of runs down the columns, the first of them outside."""
    ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0, append=mask.size).tolist()}


def write_csv(out, scenes, parts):
    """train.csv, val.csv (`path,x1,y1,x2,y2,class`; `path,,,,,` where nothing is annotated), classes.csv (`name,id`)
    and images/ under out. Crowds and mostly hidden objects are left out: csv has no word for a box to ignore."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = {}  # index -> lines
    for index, scene in scenes:
        path = f"images/{index:06d}.jpg"
        save_jpeg(out / path, scene.image)
        plain = np.flatnonzero(~(scene.crowd | scene.difficult))
        rows[index] = [[path, *scene.boxes[i].tolist(), CLASSES[scene.labels[i]]] for i in plain] or [[path, *[""] * 5]]
    tables = {part: [row for index in indices for row in rows[index]] for part, indices in parts.items()}
    tables["classes"] = [[name, label] for label, name in enumerate(CLASSES)]
    for name, lines in tables.items():
        with open(out / f"{name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def write_imagefolder(out, scenes, parts):
    """{train,val}/CLASS/ID.jpg under out; every scene has one object."""
    part_of = {index: part for part, indices in parts.items() for index in indices}
    for part in parts:
        for name in CLASSES:
            (out / part / name).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        save_jpeg(out / part_of[index] / CLASSES[scene.labels[0]] / f"{index:06d}.jpg", scene.image)


def write_pennfudan(out, scenes, parts):
    """PNGImages/NAME.png and PedMasks/NAME_mask.png under out: in a mask 0 is background, and 1, 2 .. are the objects,
    of all classes alike. As people painted the real masks they show what is seen: a later object's covers an earlier's.
    The layout has no parts and no word for an object to ignore; scenes with a crowd do not belong in it.
    """
    for folder in ("PNGImages", "PedMasks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        name, seen = f"Drawn{index + 1:05d}", np.zeros(scene.image.shape[:2], np.uint8)
        for number, mask in enumerate(scene.masks, start=1):
            seen[mask] = number
        Image.fromarray(scene.image).save(out / "PNGImages" / f"{name}.png", compress_level=1)
        Image.fromarray(seen).save(out / "PedMasks" / f"{name}_mask.png")
