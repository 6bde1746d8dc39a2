"""What is left of pictures looked at: a folder of the drawn ones, a sheet of them, and how quick it was."""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from training.flags import UsageError
from training.pictures import contact_sheet, thumbnail

SHEET = "sheet.jpg"


class Album:
    """A folder of drawn pictures; the first `most` of them come on the sheet too, at most `side` pixels wide."""

    def __init__(self, out, most=36, side=320):
        self.out, self.most, self.side = Path(out), most, side
        self.cells, self.taken, self.faults = [], {self.out / SHEET}, []
        self.count, self.seconds, self.begun = 0, 0.0, time.perf_counter()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UsageError(f"--out {out}: {fault.strerror}; name another folder") from None

    def tell(self, fault):
        """Say at once what cannot be read, and go on."""
        tqdm.write(str(fault), file=sys.stderr)
        self.faults.append(fault)

    @contextmanager
    def clock(self, count):
        """Around what the network does with `count` pictures; its answers must have come to the CPU."""
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun
        self.count += count

    def add(self, drawn, stem, caption):
        """Write uint8 [3,H,W] as STEM.jpg, or STEM_2.jpg ... where this run has written that already."""
        path, number = self.out / f"{stem}.jpg", 1
        while path in self.taken:
            number += 1
            path = self.out / f"{stem}_{number}.jpg"
        self.taken.add(path)
        F.to_pil_image(drawn).save(path, quality=92)
        if len(self.cells) < self.most:
            self.cells.append(thumbnail(drawn, caption, self.side))

    def close(self, found):
        """Write the sheet and say how quick it was; UsageError where something could not be read."""
        if self.cells:
            F.to_pil_image(contact_sheet(self.cells)).save(self.out / SHEET, quality=92)
            whole = self.count / (time.perf_counter() - self.begun)
            print(f"{self.count} pictures, {self.count / self.seconds:.1f} a second in the network, {whole:.1f} in all")
            print(f"{found}; drawn pictures, {SHEET} and json are in {self.out}")
        if self.faults:
            raise UsageError(f"{len(self.faults)} could not be read, each told above; all others are done")
