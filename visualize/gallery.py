"""The output folder of predict.py: annotated images and videos, a contact sheet, and a line about the speed."""

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from utils import files
from utils.errors import DataError, UsageError, WriteError
from visualize.draw2d import contact_sheet, thumbnail
from visualize.video import VideoWriter

SHEET, OWN_FILES = "sheet.jpg", ".predict_files"  # the latter names our files, one a line
MAX_THUMBNAILS, THUMBNAIL_SIDE = 36, 320
MAX_STEM = 230  # characters; a name has 255 bytes on most disks
_UNFIT = re.compile(r"[/\\\x00-\x1f\x7f]")  # for the name of a file


class Gallery:
    """A folder of annotated images and videos.

    overwrite     delete the files of an earlier prediction in it, and no others
    save_frames   write the frames of a video as images too

    To be used by `with`: after an error no unfinished video remains. UsageError if the folder is not empty otherwise,
    WriteError if it or a file in it cannot be written.
    """

    def __init__(self, out: str | Path, overwrite: bool = False, save_frames: bool = False):
        self.out, self._save_frames = Path(out), save_frames
        self._thumbnails, self._added, self._step = [], 0, 1
        self._video, self._video_key, self._kinds = None, None, set()
        self._errors, self._count, self._seconds, self._start = [], 0, 0.0, time.perf_counter()
        with files.writing(f"--out {out}"):
            if self.out.exists() and not self.out.is_dir():
                raise UsageError(f"--out {out}: is a file; name a folder")
            self.out.mkdir(parents=True, exist_ok=True)
            self._clear(overwrite)
            self._sheet = self.claim(SHEET)

    def _clear(self, overwrite):
        record = self.out / OWN_FILES
        names = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        own = {Path(name).name + suffix for name in names for suffix in ("", ".tmp")}
        present = {path.name for path in self.out.iterdir()} - {OWN_FILES}
        if not overwrite and present:
            what = "an earlier prediction" if present & own else "other files"
            raise UsageError(
                f"--out {self.out}: contains {what}; name another folder, or give --overwrite, which "
                "deletes the files of an earlier prediction and no others"
            )
        for name in present & own:
            (self.out / name).unlink()
        record.unlink(missing_ok=True)

    def claim(self, name: str) -> Path:
        """The path of a new file, recorded as one of ours. UsageError if there is a file of that name."""
        path = self.out / name
        if path.exists():
            raise UsageError(
                f"--out {self.out}: contains {name}, which is not of an earlier prediction; move it away, or name "
                "another folder"
            )
        with (
            files.writing(self.out / OWN_FILES),
            open(self.out / OWN_FILES, "a", encoding="utf-8", errors="surrogateescape") as record,
        ):
            record.write(f"{name}\n")
        return path

    def _claim_free(self, stem, suffix):
        """The path of STEM.suffix, or of STEM_2.suffix ... if there is that already."""
        name, number = f"{stem}{suffix}", 1
        while name == SHEET or (self.out / name).exists():
            number += 1
            name = f"{stem}_{number}{suffix}"
        return self.claim(name)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._video and kind is not None:
            self._video.discard()

    def report(self, error: DataError) -> None:
        """Print an error of a file that is left out; `close` then fails."""
        tqdm.write(str(error), file=sys.stderr)
        self._errors.append(error)

    @contextmanager
    def timed(self, count: int) -> Iterator[None]:
        """Measure the time that the network takes for `count` images, until their predictions are on the CPU."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        self._count += count

    def add(self, image: torch.Tensor, stem: str, frame: Any = None, video: object = None) -> None:
        """Write uint8 [3,H,W] as STEM.jpg, or as STEM_2.jpg ... where there is such a file.

        The stem may come from an annotation: what a name cannot have becomes _, so that the file is in the folder.

        frame   of an animation or video, see data.video_input.Frame: its number is added to the name. With a time it is
                appended to the video STEM.mp4 instead, a new one whenever `video` changes
        """
        stem = _UNFIT.sub("_", stem)[:MAX_STEM]
        is_part = frame is not None and frame.number is not None
        caption = f"{stem}_{frame.number:06d}" if is_part else stem
        if is_part and frame.seconds is not None:
            self._add_to_video(image, stem, frame, video)
        if not is_part or frame.seconds is None or self._save_frames:
            caption = self._save(image, caption)
        self._add_thumbnail(image, caption)

    def _save(self, image, stem):
        path = self._claim_free(stem, ".jpg")
        _write_jpeg(path, image)
        self._kinds.add("images")
        return path.stem

    def _add_to_video(self, image, stem, frame, key):
        if key != self._video_key:
            self._close_video()
            self._video, self._video_key = VideoWriter(self._claim_free(stem, ".mp4"), frame.rate), key
            self._kinds.add("videos")
        self._video.add(image, frame.seconds)

    def _close_video(self):
        if self._video:
            self._video.close()
        self._video = self._video_key = None

    def _add_thumbnail(self, image, caption):
        """Keep every image's at first, and when there are too many every second one's, and so on."""
        if self._added % self._step == 0:
            if len(self._thumbnails) == MAX_THUMBNAILS:
                self._thumbnails, self._step = self._thumbnails[::2], 2 * self._step
            if self._added % self._step == 0:
                self._thumbnails.append(thumbnail(image, caption, THUMBNAIL_SIDE))
        self._added += 1

    def close(self, summary: str) -> None:
        """Write the contact sheet and the end of a video, and print `summary` and the speed. UsageError if errors were
        reported."""
        self._close_video()
        if self._thumbnails:
            _write_jpeg(self._sheet, contact_sheet(self._thumbnails))
        if self._count:
            rate, overall = self._count / self._seconds, self._count / (time.perf_counter() - self._start)
            images = f"{self._count} image{'s' * (self._count > 1)}"
            print(f"{images}, {rate:.1f} per second in the network, {overall:.1f} overall")
            print(f"{summary}; annotated {' and '.join(sorted(self._kinds))}, {SHEET} and JSON are in {self.out}")
        if self._errors:
            count = f"{len(self._errors)} file{'s' * (len(self._errors) > 1)}"
            raise UsageError(f"{count} could not be read, see above; all others are done")


def _write_jpeg(path, image):
    """Write uint8 [3,H,W]. Not by Pillow, which does not notice that a disk takes a part of the file only."""
    encoded = io.BytesIO()
    F.to_pil_image(image).save(encoded, "JPEG", quality=92)
    try:
        with files.writing(path):
            path.write_bytes(encoded.getbuffer())
    except WriteError:
        files.remove(path)  # the beginning of an image
        raise
