"""Data of one's own: folders, tables, arrays, data sets of Hugging Face; what is damaged is found before."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from elastic.data import ArrayData, HuggingFaceImages, ImageData, ImageFolderData, ImageTableData
from elastic.data import files as image_files
from elastic.errors import DataError
from elastic.models import convnet
from elastic.training.module import ElasticClassifier

CONF = Path(__file__).parents[3] / "conf" / "data"


def write_image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (value, 0, 0)).save(path)
    return path


def write_parts(root: Path, suffix: str = ".png") -> Path:
    for part in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            for i in range(4):
                write_image(root / part / name / f"{i}{suffix}", 100 * k)
    return root


def ready(data: ImageData) -> ImageData:
    data.prepare_data()
    data.setup()
    return data


def fit(data: ImageData) -> None:
    """Begin to train."""
    net = convnet([4], (), data.shape[0], data.classes)
    module = ElasticClassifier(net, data.shape, data.classes, lambda p: torch.optim.SGD(p, 0.1))
    L.Trainer(fast_dev_run=True, logger=False, enable_progress_bar=False, accelerator="cpu").fit(module, data)


def refused(call: Any) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tga", ".jp2", ".ico", ".JPEG"])
def test_what_pillow_reads_is_read(tmp_path: Path, suffix: str) -> None:
    data = ready(ImageFolderData(8, root=str(write_parts(tmp_path, suffix)), batch_size=2))
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [0, 0] and len(data.test_set or ()) == 8


def test_what_is_skipped_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_parts(tmp_path)
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/dog/more").mkdir()
    (root / "train/dog/more/labels.xml").write_text("no image")
    write_image(root / "train/dog/more/9.png")
    data = ImageFolderData(8, root=str(root), batch_size=2)
    assert f"{root / 'train'}: 2 files are no images and are skipped (.txt, .xml)" in caplog.text
    assert len(data._train) == 9


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-30])
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_a_damaged_image_is_found_before_training(tmp_path: Path, suffix: str) -> None:
    root = write_parts(tmp_path, suffix)
    path = damage(root / f"test/dog/3{suffix}")
    data = ImageFolderData(8, root=str(root), batch_size=2)
    assert refused(lambda: fit(data)) == f"{path} is not a readable image: delete or replace it"
    first = damage(root / f"test/cat/1{suffix}")
    message = refused(lambda: fit(ImageFolderData(8, root=str(root), batch_size=2)))
    assert message.startswith(f"2 of 8 images cannot be used, the first: {first}")


def test_a_large_set_is_not_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_parts(tmp_path)
    damage(root / "test/dog/3.png")
    monkeypatch.setattr(image_files, "CHECKED", 7)
    fit(ImageFolderData(8, root=str(root), batch_size=2))  # which does not come to the test part


# --- tables -------------------------------------------------------------------------------------------------


def write_tables(root: Path, **rows: str) -> ImageTableData:
    write_parts(root / "images")
    for part in ("train", "test"):
        lines = [
            f"{i},images/{part}/{label}/{i}.png,{'a cat' if label == 'cat' else label}"
            for label in ("dog", "cat")
            for i in range(4)
        ]
        text = "\n".join(["number,path,label", *lines, *([rows[part]] if part in rows else [])])
        (root / f"{part}.csv").write_text(text + "\n")
    return ImageTableData(8, root=str(root), batch_size=2)


def test_a_table_lists_images_and_labels(tmp_path: Path) -> None:
    data = ready(write_tables(tmp_path))
    assert data.class_names == ["a cat", "dog"] and data.classes == 2
    images, labels = next(iter(data.test_dataloader()))
    assert labels.tolist() == [1, 1] and images[0, 0].unique().tolist() == [100]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"train": "9,images/none.png,dog"}, "lists 1 files that are not there, the first is"),
        ({"train": f"9,{'a' * 5000},dog"}, "lists 1 files that are not there, the first is"),
        ({"test": "9,images/test/cat/0.png,bird"}, "has the label 'bird', which"),
        ({"test": "9,images/test/cat/0.png"}, "test.csv, line 10, lacks a path or a label"),
    ],
)
def test_a_table_with_faults_is_refused(tmp_path: Path, rows: dict[str, str], text: str) -> None:
    assert text in refused(lambda: ready(write_tables(tmp_path, **rows)))


@pytest.mark.parametrize("text", [None, "", "file,class\n1.png,cat\n"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "train.csv").write_text(text)
    assert str(tmp_path / "train.csv") in refused(lambda: ImageTableData(8, root=str(tmp_path)))


# --- arrays -------------------------------------------------------------------------------------------------

LABELS = np.arange(6) % 3


@pytest.mark.parametrize(
    ("images", "range", "shape", "first"),
    [
        (np.full((6, 5, 4), 7, np.uint8), None, (1, 5, 4), 7),
        (np.full((6, 5, 4, 3), 0.5), (0, 1), (3, 5, 4), 128),
        (torch.full((6, 3, 5, 4), -1.0), (-1, 1), (3, 5, 4), 0),
        (np.full((6, 5, 4), 65535, np.uint16), (0, 65535), (1, 5, 4), 255),
    ],
)
def test_arrays_become_bytes(images: Any, range: Any, shape: Any, first: int) -> None:
    data = ready(ArrayData((images, LABELS), (images, LABELS), range, ("a", "b", "c"), batch_size=2))
    assert (data.shape, data.classes, data.class_names) == (shape, 3, ["a", "b", "c"])
    x_BCHW, y_B = next(iter(data.test_dataloader()))
    assert x_BCHW.dtype == torch.uint8 and x_BCHW.shape == (2, *shape) and x_BCHW.unique().tolist() == [first]
    assert y_B.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("images", "labels", "range", "text"),
    [
        (np.ones((6, 5, 4)), LABELS, None, "have no range: set range, say to"),
        (np.full((6, 5, 4), 2.0), LABELS, (0, 1), "have values from 2 to 2"),
        (np.full((6, 5, 4), np.nan), LABELS, (0, 1), "have values from nan"),
        (
            np.ones((6, 3, 50, 40), np.uint8),
            LABELS,
            None,
            "give tensors as N, C, H, W and arrays as N, H, W, C",
        ),
        (np.ones((6, 20), np.uint8), LABELS, None, "are not understood"),
        (np.ones((6, 5, 4), np.uint8), LABELS[:5], None, "6 images have 5 labels"),
        (np.ones((6, 5, 4), np.uint8), LABELS - 1, None, "labels from -1"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(images: Any, labels: Any, range: Any, text: str) -> None:
    assert text in refused(lambda: ArrayData((images, labels), (images, labels), range))


# --- Hugging Face -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # its own
def test_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    root, common = write_parts(tmp_path / "set"), {"root": str(tmp_path / "cache"), "batch_size": 2}
    data = ready(HuggingFaceImages(str(root), 8, **common))
    assert data.class_names == ["cat", "dog"]
    images, labels = zip(*data.test_dataloader(), strict=True)
    values = torch.cat(images).amax((1, 2, 3))
    assert torch.cat(labels).tolist() == [0] * 4 + [1] * 4 and values.tolist() == [0] * 4 + [100] * 4
    wrong = refused(lambda: HuggingFaceImages(str(root), 8, label="kind", **common))
    assert "set data.image and data.label to two of image, label" in wrong
    missing = refused(lambda: HuggingFaceImages(str(tmp_path / "none"), 8, **common))
    assert "none cannot be loaded" in missing


def test_its_configuration_names_what_the_class_takes() -> None:
    node = OmegaConf.load(CONF / "huggingface.yaml")
    names = HuggingFaceImages.__init__.__annotations__.keys() | {"root", "batch_size", "val_fraction", "seed"}
    assert set(node) - {"_target_", "workers", "augment", "mean", "std"} <= names
