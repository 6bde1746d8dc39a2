"""What a network found, in the forms that other programs read.

about   of a picture: {"id", "file_name"} and, of a video, "frame"
names   of the classes, in label order
"""

from evaluation import nuscenes
from ops import run_lengths


def as_coco(found, names, about):
    """A list of COCO's results, dicts of plain values, one a detection: boxes [N,4] xyxy pixels of the file, labels and
    scores [N] and, if there are any, masks bool [N,H,W]. Category k + 1 is label k. Name and file stand beside."""
    columns = {"category_id": (found["labels"] + 1).tolist()}
    low, high = found["boxes"].double().split(2, dim=1)
    columns["bbox"] = [
        [round(side, 2) for side in (*corner, *size)] for corner, size in zip(low.tolist(), (high - low).tolist())
    ]
    columns["score"] = [round(score, 5) for score in found["scores"].tolist()]
    if "masks" in found:
        size = list(found["masks"].shape[1:])
        runs = run_lengths.encode(found["masks"])
        columns["segmentation"] = [{"size": size, "counts": counts.decode("ascii")} for counts in runs]
    columns["category_name"] = [names[label] for label in found["labels"].tolist()]
    place = {name: about[name] for name in ("file_name", "frame") if name in about}
    return [{"image_id": about["id"], **dict(zip(columns, row)), **place} for row in zip(*columns.values())]


def as_answers(found, names, about):
    """Of a picture with labels and scores [N]: {"image_id", "file_name", "answers": [{"label", "name", "score"}]}."""
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    answers = [{"label": label, "name": names[label], "score": round(score, 5)} for label, score in zip(labels, scores)]
    place = {name: about[name] for name in ("file_name", "frame") if name in about}
    return {"image_id": about["id"], **place, "answers": answers}


def as_submission(targets, detections, modalities):
    """nuScenes' results json of cameras' pictures: two lists of dicts of the same length, see evaluation.nuscenes."""
    boxes = [nuscenes.to_global(found, target) for target, found in zip(targets, detections, strict=True)]
    told = {"image_id": [target["image_id"] for target in targets], "sample": [t["sample_token"] for t in targets]}
    told |= {"camera": [t["camera"] for t in targets], "count": [len(found["labels"]) for found in detections]}
    kept = nuscenes.stacked([told], nuscenes.PICTURES), nuscenes.stacked(boxes, nuscenes.BOXES)
    return nuscenes.submission(*nuscenes.each_once(*kept), modalities)
