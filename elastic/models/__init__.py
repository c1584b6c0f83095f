"""Build plain PyTorch CNNs. Nothing in the library knows their names; any other model serves as well."""

from elastic.models.alexnet import alexnet
from elastic.models.convnet import convnet
from elastic.models.resnet import resnet20, resnet56
from elastic.models.separable import separable
from elastic.models.timm import from_timm
from elastic.models.torchvision import from_torchvision
from elastic.models.unet import unet
from elastic.models.vgg import vgg16_bn

__all__ = [
    "alexnet",
    "convnet",
    "from_timm",
    "from_torchvision",
    "resnet20",
    "resnet56",
    "separable",
    "unet",
    "vgg16_bn",
]
