"""The output folder of predict.py: annotated images, a contact sheet of the first ones, and a line about the speed."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from utils.errors import DataError, UsageError
from visualize.draw2d import contact_sheet, thumbnail

SHEET = "sheet.jpg"
MAX_THUMBNAILS, THUMBNAIL_SIDE = 36, 320


class Gallery:
    """A folder of annotated images; UsageError if it cannot be created or written to."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self._thumbnails, self._written, self._errors = [], {self.out / SHEET}, []
        self._count, self._seconds, self._start = 0, 0.0, time.perf_counter()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: {error.strerror}; name another folder") from None
        if not os.access(self.out, os.W_OK):
            raise UsageError(f"--out {out}: no permission to write; name another folder")

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

    def add(self, image: torch.Tensor, stem: str) -> None:
        """Write uint8 [3,H,W] as STEM.jpg, or STEM_2.jpg ... if this run has written that already."""
        path, number = self.out / f"{stem}.jpg", 1
        while path in self._written:
            number += 1
            path = self.out / f"{stem}_{number}.jpg"
        self._written.add(path)
        F.to_pil_image(image).save(path, quality=92)
        if len(self._thumbnails) < MAX_THUMBNAILS:
            self._thumbnails.append(thumbnail(image, stem, THUMBNAIL_SIDE))

    def close(self, summary: str) -> None:
        """Write the contact sheet and print `summary` and the speed. UsageError if errors were reported."""
        if self._thumbnails:
            F.to_pil_image(contact_sheet(self._thumbnails)).save(self.out / SHEET, quality=92)
            rate, overall = self._count / self._seconds, self._count / (time.perf_counter() - self._start)
            print(f"{self._count} images, {rate:.1f} per second in the network, {overall:.1f} overall")
            print(f"{summary}; annotated images, {SHEET} and JSON are in {self.out}")
        if self._errors:
            count = f"{len(self._errors)} file{'s' * (len(self._errors) > 1)}"
            raise UsageError(f"{count} could not be read, see above; all others are done")
