"""Build AlexNet for 32×32 images: Krizhevsky's five convolutions and three linear layers, scaled.

Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012, section 3.5;
strides and kernels are reduced for small images. For 224×224 take torchvision's `alexnet`.
"""

from torch import nn

from elastic.ranges import Count

CHANNELS = (1, 3, 6, 4, 4)  # of the convolutions, in units of `width`
POOLS = (0, 1, 4)  # the convolutions that a pooling follows


def alexnet(
    width: Count = 64, in_channels: int = 3, classes: int = 10, hidden: Count = 1024
) -> nn.Sequential:
    """Build 3×3 convolutions with ReLU and no norm, three 2×2 max-poolings, two hidden linear layers.

    Weights start as large as ReLU needs (He et al., arXiv 1502.01852): with torch's, and no norm to make up
    for it, what the last layers see is so small that they hardly learn at first.
    """
    net, channels = nn.Sequential(), in_channels
    for i, multiple in enumerate(CHANNELS):
        net.add_module(f"conv{i + 1}", nn.Conv2d(channels, multiple * width, 3, padding=1))
        net.add_module(f"relu{i + 1}", nn.ReLU())
        if i in POOLS:
            net.add_module(f"pool{i + 1}", nn.MaxPool2d(2))
        channels = multiple * width
    net.add_module("flatten", nn.Flatten())
    for i, (inputs, outputs) in enumerate(((16 * channels, hidden), (hidden, hidden)), start=6):
        net.add_module(f"dropout{i}", nn.Dropout(0.5))
        net.add_module(f"fc{i}", nn.Linear(inputs, outputs))
        net.add_module(f"relu{i}", nn.ReLU())
    net.add_module("fc8", nn.Linear(hidden, classes))
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net
