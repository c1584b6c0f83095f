"""Offer image data as Lightning data modules, with augmentation on the device."""

from elastic.data.folders import ImageFolderData, Imagenette
from elastic.data.images import ImageData
from elastic.data.sets import Digits, TorchvisionImages
from elastic.data.shapes import Shapes
from elastic.errors import DataError

__all__ = ["DataError", "Digits", "ImageData", "ImageFolderData", "Imagenette", "Shapes", "TorchvisionImages"]
