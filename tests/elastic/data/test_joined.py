"""Two sets of images in one: every image is there, as it was, under its own class."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic.data import DataError, JoinedImages, TorchvisionImages


def make_class(shape: tuple[int, ...], count: int, seed: int) -> Any:
    """A class such as torchvision's, of random bytes."""
    generator = torch.Generator().manual_seed(seed)

    def make(root: str, train: bool, download: bool) -> Any:
        n = count if train else count // 2
        images = torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8)
        return SimpleNamespace(data=images, targets=torch.arange(n) % 3, classes=["a", "b", "c"])

    make.__name__ = "Made"
    return make


def joined(*shapes: tuple[int, int, int]) -> JoinedImages:
    sets: dict[str, Any] = {}
    for i, (C, H, W) in enumerate(shapes):
        laid_out = (H, W) if C == 1 else (H, W, C)
        sets[f"set{i}"] = TorchvisionImages(make_class(laid_out, 12, i), (C, H, W), 3)
    return JoinedImages(sets, batch_size=4)


def test_each_set_has_classes_of_its_own_and_its_images_are_padded_and_repeated() -> None:
    data = joined((3, 8, 8), (1, 6, 5))
    assert (data.shape, data.classes) == ((3, 8, 8), 6)
    train, test = data.load(download=False)
    assert len(train) == 24 and len(test) == 12
    assert train.class_names == ["set0 a", "set0 b", "set0 c", "set1 a", "set1 b", "set1 c"]
    assert train.labels.bincount().tolist() == [4] * 6
    x_NCHW, y_N = train.__getitems__(range(12, 24))
    own: Tensor = make_class((6, 5), 12, seed=1)("", True, False).data
    assert y_N.min() == 3 and torch.equal(x_NCHW[:, 0, 1:-1, 1:-2], own)
    assert torch.equal(x_NCHW[:, 0], x_NCHW[:, 1]) and torch.equal(x_NCHW[:, 0], x_NCHW[:, 2])
    assert not x_NCHW[:, :, 0].any() and not x_NCHW[:, :, -1].any()
    assert not x_NCHW[..., 0].any() and not x_NCHW[..., -2:].any()


def test_images_whose_channels_cannot_be_brought_together_are_refused() -> None:
    with pytest.raises(DataError, match="images of set1 have neither 1 nor 3 channels"):
        joined((3, 8, 8), (2, 8, 8))
