"""Videos of annotated frames, by PyAV, an optional dependency."""

import contextlib
from fractions import Fraction
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F

from utils import files

TICKS = 90000  # per second, of the times of frames


class VideoWriter:
    """An mp4 (H.264) that is written as its frames come, in constant memory. To be closed, or discarded.

    path   the file, which is replaced by `close`; until then it has the suffix .tmp
    rate   frames per second. Each frame is shown at its own time, so that cameras may leave some out

    WriteError if it cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction):
        import av  # at first use

        self._av, self._rate, self._last, self._size = av, rate, -1, None
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        with files.writing(path):
            self._container = av.open(str(self._temporary), "w", format="mp4")

    def add(self, image: torch.Tensor, seconds: float) -> None:
        """Append uint8 [3,H,W], `seconds` after the first frame; resized to that frame's size if it has another."""
        if self._size is None:
            self._open(*image.shape[-2:])
        height, width = self._size
        if image.shape[1] - height not in (0, 1) or image.shape[2] - width not in (0, 1):
            image = F.resize_image(image, [height, width], antialias=True)
        image = image[:, :height, :width].permute(1, 2, 0).contiguous()
        frame = self._av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
        self._last = max(round(seconds * TICKS), self._last + 1)  # times that do not increase are refused
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        with files.writing(self._path):
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the end of the video and give it its name."""
        try:
            with files.writing(self._path):
                if self._size:
                    self._container.mux(self._stream.encode(None))
                self._container.close()
                self._temporary.replace(self._path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the unfinished video."""
        with contextlib.suppress(OSError):
            self._container.close()
        files.remove(self._temporary)

    def _open(self, height, width):
        self._size = (max(2, height // 2 * 2), max(2, width // 2 * 2))  # H.264 as all players know it has even sides
        self._stream = self._container.add_stream("h264", rate=self._rate)
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)
