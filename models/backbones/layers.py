"""Layers and functions that several networks share."""

from torch import nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 0..255


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that is safe on maps one cell wide, such as the last ones of SSD and RetinaNet.

    With padding 1, only the middle column of the kernel meets such a map, so only that column is used: the same result
    with less work. It also avoids an error of torch's bf16 kernel on CPUs (seen with 2.11 and 2.15): with stride 2 the
    gradient of the weights is partly uninitialized memory, often NaN.
    """

    def __init__(self, inputs, outputs, stride=1, padding=1, groups=1, bias=True):
        super().__init__(inputs, outputs, 3, stride, padding, groups=groups, bias=bias)

    def forward(self, x):
        if x.shape[-1] > 1 or self.padding[1] != 1:
            return super().forward(x)
        return F.conv2d(x, self.weight[..., 1:2], self.bias, self.stride, (1, 0), groups=self.groups)


def initialize(module):
    """Kaiming normal (fan in, ReLU) for every convolution, zero biases, batch norm as identity; in place.

    It keeps the variance, also of a depthwise convolution, whose fan in is 9. Layers without a batch norm (VGG, the
    extra layers of SSD) would otherwise lose the signal before the last map.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def conv_norm(x, conv, norm):
    """norm(conv(x)) for a convolution without bias: [B,C,H,W] -> [B,C',H',W'].

    A batch norm that does not update its statistics (in evaluation, or frozen, as in most detectors) is folded into the
    weights of the convolution. That saves its passes over the maps, and a map less is stored for the backward pass.
    Gradients still reach the weights, and the parameters of the norm if they are trained.
    """
    if norm.training:
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [C']
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def separable(inputs, outputs, stride=1, padding=1):
    """SSD-lite's convolution on MobileNet v1 and SqueezeNet: depthwise 3x3, ReLU, pointwise; without batch norm."""
    depthwise = Conv3x3(inputs, inputs, stride, padding, groups=inputs)
    return nn.Sequential(depthwise, nn.ReLU(inplace=True), nn.Conv2d(inputs, outputs, 1))


def separable_bn(inputs, outputs):
    """SSD-lite's convolution on MobileNet v2: depthwise 3x3, batch norm, ReLU6, pointwise."""
    depthwise = Conv3x3(inputs, inputs, groups=inputs)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(inplace=True), nn.Conv2d(inputs, outputs, 1))


def flatten_cells(x, values):
    """Output of a head [B,S*values,h,w] -> [B,h*w*S,values], in the order row, column, shape.

    No size is read as a number, because an exported graph would keep that of its example.
    """
    return x.permute(0, 2, 3, 1).unflatten(3, (-1, values)).flatten(1, 3)
