"""What several networks are made of: initialisation, and the separable convolutions of SSD-lite."""

from torch import nn
from torch.nn import functional as F


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, safe on a map one cell wide, where SSD's last maps end up.

    With padding 1 only the kernel's middle column meets such a map, so it alone is used: the same result, less work.
    With stride 2 torch's bf16 kernel on CPUs (seen with 2.11 and 2.15) otherwise returns memory it never wrote as the
    gradient of the weights: NaN, or worse, numbers.
    """

    def __init__(self, inputs, outputs, stride=1, padding=1, groups=1, bias=True):
        super().__init__(inputs, outputs, 3, stride, padding, groups=groups, bias=bias)

    def forward(self, x):
        if x.shape[-1] > 1 or self.padding[1] != 1:
            return super().forward(x)
        return F.conv2d(x, self.weight[..., 1:2], self.bias, self.stride, (1, 0), groups=self.groups)


def initialise(module):
    """Kaiming normal (fan in, ReLU) for every convolution, zero biases, batch norm as identity; in place.

    The fan of a depthwise convolution is its 9 own inputs, so the variance survives it as it does a dense one. Without
    this, the layers that no batch norm follows (VGG, the extras) lose the signal before the last map.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def conv_bn(inputs, outputs, kernel, stride, activation):
    """Dense convolution without bias, batch norm, activation: names 0, 1, 2."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), activation(inplace=True))


def separable(inputs, outputs, stride=1, padding=1):
    """SSD-lite's convolution of mb1 and sq: depthwise 3x3, ReLU, pointwise; no batch norm, no activation at the end."""
    depthwise = Conv3x3(inputs, inputs, stride, padding, groups=inputs)
    return nn.Sequential(depthwise, nn.ReLU(inplace=True), nn.Conv2d(inputs, outputs, 1))


def separable_bn(inputs, outputs):
    """SSD-lite's convolution of mb2: depthwise 3x3, batch norm, ReLU6, pointwise."""
    depthwise = Conv3x3(inputs, inputs, groups=inputs)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(inplace=True), nn.Conv2d(inputs, outputs, 1))
