"""Predictions in the formats of predict.py's JSON files: dicts of plain values.

names   of the classes, in label order
info    about an image: {"id", "file_name"} and, of a video, "frame"
"""

from collections.abc import Mapping, Sequence

import torch

from ops import rle


def coco(detections: Mapping[str, torch.Tensor], names: Sequence[str], info: Mapping) -> list[dict]:
    """COCO's results format, one dict per detection, with the class name and the file added.

    detections   boxes [N,4] xyxy in pixels of the file, labels and scores [N] and, if there are any, masks bool
                 [N,H,W]. Category k + 1 is label k
    """
    low, high = detections["boxes"].double().split(2, dim=1)
    columns = {
        "category_id": (detections["labels"] + 1).tolist(),
        "bbox": [[round(value, 2) for value in box] for box in torch.cat([low, high - low], dim=1).tolist()],
        "score": [round(score, 5) for score in detections["scores"].tolist()],
    }
    if "masks" in detections:
        size, runs = list(detections["masks"].shape[1:]), rle.encode(detections["masks"])
        columns["segmentation"] = [{"size": size, "counts": counts.decode("ascii")} for counts in runs]
    columns["category_name"] = [names[label] for label in detections["labels"].tolist()]
    return [{"image_id": info["id"], **dict(zip(columns, row)), **_file(info)} for row in zip(*columns.values())]


def classification(predictions: Mapping[str, torch.Tensor], names: Sequence[str], info: Mapping) -> dict:
    """Labels and scores [N] of an image: {"image_id", "file_name", "answers": [{"label", "name", "score"}]}."""
    rows = zip(predictions["labels"].tolist(), predictions["scores"].tolist())
    answers = [{"label": label, "name": names[label], "score": round(score, 5)} for label, score in rows]
    return {"image_id": info["id"], **_file(info), "answers": answers}


def _file(info):
    return {name: info[name] for name in ("file_name", "frame") if name in info}
