"""Videos of annotated frames, by PyAV, an optional dependency."""

from fractions import Fraction
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F

TICKS = 90000  # per second, of the times of frames


class VideoWriter:
    """An mp4 (H.264) that is written as its frames come, in constant memory. To be closed.

    path   the file, which is replaced
    rate   frames per second. Each frame is shown at its own time, so that cameras may leave some out

    OSError if it cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction):
        import av  # at first use

        self._av, self._rate, self._last, self._size = av, rate, -1, None
        self._container = av.open(str(path), "w", format="mp4")

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
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the end of the video."""
        with self._container:
            if self._size:
                self._container.mux(self._stream.encode(None))

    def _open(self, height, width):
        self._size = (max(2, height // 2 * 2), max(2, width // 2 * 2))  # H.264 as all players know it has even sides
        self._stream = self._container.add_stream("h264", rate=self._rate)
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)
