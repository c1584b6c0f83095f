"""Plain PyTorch CNNs. Nothing in the library knows their names; any other model serves as well."""

from elastic.models.convnet import convnet
from elastic.models.resnet import resnet20, resnet56

__all__ = ["convnet", "resnet20", "resnet56"]
