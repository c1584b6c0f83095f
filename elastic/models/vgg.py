"""Build VGG-16 with batch norm for 32×32 images: Simonyan & Zisserman, arXiv 1409.1556, configuration D.

As is usual on CIFAR-10, one linear layer follows the convolutions. For 224×224 take torchvision's
`vgg16_bn`.
"""

from torch import nn

from elastic.ranges import Count

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels in units of `width`


def vgg16_bn(width: Count = 64, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Build thirteen 3×3 convolutions with batch norm and ReLU, a 2×2 max-pooling after each stage."""
    net, channels = nn.Sequential(), in_channels
    for i, stage in enumerate(STAGES, start=1):
        for j, multiple in enumerate(stage, start=1):
            net.add_module(f"conv{i}_{j}", nn.Conv2d(channels, multiple * width, 3, padding=1, bias=False))
            net.add_module(f"bn{i}_{j}", nn.BatchNorm2d(multiple * width))
            net.add_module(f"relu{i}_{j}", nn.ReLU())
            channels = multiple * width
        net.add_module(f"pool{i}", nn.MaxPool2d(2))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(channels, classes))
    return net
