"""Offer image data as Lightning data modules, with augmentation on the device."""

from elastic.data.arrays import ArrayData
from elastic.data.folders import ImageFolderData, Imagenette
from elastic.data.huggingface import HuggingFaceImages
from elastic.data.images import ImageData
from elastic.data.joined import JoinedImages
from elastic.data.sets import Digits, TorchvisionImages
from elastic.data.shapes import Shapes
from elastic.data.table import ImageTableData
from elastic.errors import DataError

__all__ = [
    "ArrayData",
    "DataError",
    "Digits",
    "HuggingFaceImages",
    "ImageData",
    "ImageFolderData",
    "ImageTableData",
    "Imagenette",
    "JoinedImages",
    "Shapes",
    "TorchvisionImages",
]
