"""Build residual networks for 32×32 images: He et al., arXiv 1512.03385, section 4.2, with projections.

Shortcuts that change shape are 1×1 convolutions (option B there): zero-padding shortcuts (option A) tie a
channel's meaning to its position, which no surgery could keep.
"""

from torch import Tensor, nn

from elastic.ranges import Count


class BasicBlock(nn.Module):
    """Add two 3×3 convolutions to a shortcut: y = ReLU(f(x) + s(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        return self.relu(self.bn2(self.conv2(h_BCHW)) + self.shortcut(x_BCHW))


def resnet(blocks: int, width: Count = 16, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Build three stages of `blocks` basic blocks at `width`, 2·`width` and 4·`width` channels."""
    stages, inputs = [], width
    for stage in range(3):
        outputs, stride = width * 2**stage, 1 if stage == 0 else 2
        first = BasicBlock(inputs, outputs, stride)
        stages.append(nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))))
        inputs = outputs
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
    net.add_module("bn", nn.BatchNorm2d(width))
    net.add_module("relu", nn.ReLU())
    for i, stage_blocks in enumerate(stages, start=1):
        net.add_module(f"stage{i}", stage_blocks)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(inputs, classes))
    return net


def resnet20(width: Count = 16, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Build three stages of three blocks."""
    return resnet(3, width, in_channels, classes)


def resnet56(width: Count = 16, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Build three stages of nine blocks."""
    return resnet(9, width, in_channels, classes)
