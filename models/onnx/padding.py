"""Images of several shapes in one input of fixed size: what is beyond an image changes none of its detections.

predict.py pads an image to multiples of 32, and every convolution pads its input with zeros. In a larger input it would
see other values there, because of biases and batch norms.

B batch, A anchors.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MULTIPLE = 32  # of the sides of an image padded alone


class PaddedImages(TorchFunctionMode):
    """A context in which convolutions and max pooling see zeros beyond each image and its maps, as if it were alone.

    sizes       float32 [B,2], (h, w) of each image at the top left of the input
    input_size  (H, W) of the input, multiples of MULTIPLE
    levels      of the maps, with stride 2**level, up to the last

    Max pooling is right only for maps without negative values. 1 x 1 convolutions mix no cells and see what is there.
    """

    def __init__(self, sizes, input_size, levels):
        super().__init__()
        self.sizes, self.padded = sizes, torch.ceil(sizes / MULTIPLE) * MULTIPLE
        self.cells, self.masks = {}, {}  # size of a map -> (h, w) of each image in it [B,2]; where these are [B,h,w]
        for level in range(max(levels) + 1):
            size = tuple(-(-side // 2**level) for side in input_size)
            self.cells[size] = torch.ceil(self.padded / 2**level) if level else sizes
            rows, columns = (
                (torch.arange(side, device=sizes.device) < cells[:, None]).float()
                for side, cells in zip(size, self.cells[size].unbind(1))
            )
            self.masks[size] = rows[:, :, None] * columns[:, None]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_conv = function is F.conv2d and max(args[1].shape[-2:]) > 1
        if is_conv or function is F.max_pool2d:
            args = (args[0] * self.masks[tuple(args[0].shape[-2:])][:, None], *args[1:])
        return function(*args, **(kwargs or {}))

    def contain_anchors(self, map_sizes, per_cell):
        """float32 [B,A], 1 for anchors in an image's own cells, else 0. map_sizes: (h, w) of each level's map."""
        return torch.cat([self.masks[size].flatten(1).repeat_interleave(per_cell, 1) for size in map_sizes], 1)

    def strides(self, map_sizes):
        """float32 [B,2] of each map: pixels of the padded image per cell, rounded down, as torchvision's anchors."""
        return [torch.floor(self.padded / self.cells[size].clamp(min=1)) for size in map_sizes]
