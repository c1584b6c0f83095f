"""Write a few random images in the layout of each data set, for configurations to be tried with."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

Random = np.random.Generator


class SmallCIFAR10(datasets.CIFAR10):
    """Take generated batches, which have no checksums that anyone knows."""

    train_list = [[name, None] for name, _ in datasets.CIFAR10.train_list]
    test_list = [[name, None] for name, _ in datasets.CIFAR10.test_list]
    meta = {**datasets.CIFAR10.meta, "md5": None}


class SmallCIFAR100(datasets.CIFAR100):
    """Take generated batches of the larger set."""

    train_list = [["train", None]]
    test_list = [["test", None]]
    meta = {**datasets.CIFAR100.meta, "md5": None}


def draw_image(path: Path, random: Random, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)


def write_folder(root: Path, random: Random) -> None:
    for part in ("train", "test"):
        for name in ("one", "two"):
            for i in range(20):
                draw_image(root / part / name / f"{i}.png", random, 40, 40)


def write_imagenette(root: Path, random: Random) -> None:
    for part, n in (("train", 4), ("val", 1)):
        for wnid in datasets.Imagenette._WNID_TO_CLASS:
            for i in range(n):
                draw_image(root / "imagenette2-160" / part / wnid / f"{i}.JPEG", random, 160, 180)


def write_cifar10(root: Path, random: Random) -> None:
    folder = root / SmallCIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in (*SmallCIFAR10.train_list, *SmallCIFAR10.test_list):
        images = random.integers(0, 256, (20, 3072), np.uint8)
        (folder / str(name)).write_bytes(pickle.dumps({"data": images, "labels": [*range(10)] * 2}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))


def write_cifar100(root: Path, random: Random) -> None:
    folder = root / SmallCIFAR100.base_folder
    folder.mkdir(parents=True)
    for name, count in (("train", 400), ("test", 100)):
        images, labels = random.integers(0, 256, (count, 3072), np.uint8), [i % 100 for i in range(count)]
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {k}" for k in range(100)]}))


def write_mnist(root: Path, random: Random, name: str = "MNIST") -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 20)):
        arrays = {"images": random.integers(0, 256, (n, 28, 28)), "labels": np.arange(n) % 10}
        for kind, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + b"".join(d.to_bytes(4, "big") for d in array.shape)
            path = raw / f"{part}-{kind}-idx{array.ndim}-ubyte"
            path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_fashion_mnist(root: Path, random: Random) -> None:
    write_mnist(root, random, "FashionMNIST")


# How each is written, and what a run that reads it has to be told beside its folder.
WRITERS: dict[str, tuple[Callable[[Path, Random], None], tuple[str, ...]]] = {
    "folder": (write_folder, ("data.batch_size=9", "data.workers=0")),
    "imagenette": (write_imagenette, ("data.batch_size=9", "data.workers=0", "data.download=false")),
    "mnist": (write_mnist, ("data.batch_size=9", "data.download=false")),
    "fashion_mnist": (write_fashion_mnist, ("data.batch_size=9", "data.download=false")),
    "cifar10": (
        write_cifar10,
        ("data.batch_size=9", "data.download=false", "data.dataset.path=tests.generated.SmallCIFAR10"),
    ),
    "cifar100": (
        write_cifar100,
        ("data.batch_size=9", "data.download=false", "data.dataset.path=tests.generated.SmallCIFAR100"),
    ),
}


def generate(data: str, root: Path) -> tuple[str, ...]:
    """Write a data set's images below `root`; returns the overrides that use them."""
    if data in ("digits", "shapes"):
        return ("data.batch_size=64",)
    write, options = WRITERS[data]
    write(root, np.random.default_rng(0))
    return (f"data.root={root}", *options)
