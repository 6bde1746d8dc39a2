"""What several networks are made of: initialisation, folded norms, and the separable convolutions of SSD-lite."""

from torch import nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 0..255


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


def conv_norm(x, conv, norm):
    """norm(conv(x)) for a convolution without bias: [B,C,H,W] -> [B,C',H',W']; one convolution where it can be.

    A batch norm that does not update its statistics (evaluation, or frozen in training, as detectors do) is an affine
    map with known numbers. Scaling the weights by it costs a pass over the weights instead of several over the maps,
    and no map is kept for it. Gradients flow through the scaling to the weights, and to the norm's if they learn.
    """
    if norm.training:
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [C']
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


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


def flat(x, values):
    """A head's map [B,S*values,h,w] -> [B,h*w*S,values]: rows, columns, shapes. No length is read: an exported graph
    would keep that of its example."""
    return x.permute(0, 2, 3, 1).unflatten(3, (-1, values)).flatten(1, 3)
