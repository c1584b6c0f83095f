"""Data of one's own: folders, tables, arrays, data sets of Hugging Face; what is damaged is found before."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from elastic.data import ArrayData, HuggingFaceImages, ImageData, ImageFolderData, ImageTableData
from elastic.data import files as image_files
from elastic.data.decoding import read_rgb
from elastic.errors import DataError
from elastic.models import convnet
from elastic.training.module import ElasticClassifier

CONF = Path(__file__).parents[3] / "conf" / "data"


def write_image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, 0, 0)).save(path)
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


def test_what_systems_leave_is_no_class_and_a_link_upwards_no_images(tmp_path: Path) -> None:
    root = write_parts(tmp_path)
    for name in ("__MACOSX", "@eaDir", "__pycache__", ".ipynb_checkpoints"):
        write_image(root / "train" / name / "0.png")
        write_image(root / "train/cat" / name / "0.png")
    (root / "train/cat/again").symlink_to(root / "train/cat")
    (root / "train/cat/above").symlink_to("..")
    (root / "train/cat/cache.h5").write_bytes(b"which Pillow knows by name alone")
    train = ImageFolderData(8, root=str(root), batch_size=2)._train
    assert train.class_names == ["cat", "dog"] and len(train) == 8


def write_grey(path: Path) -> None:
    grey = np.linspace(0, 65535, 64).astype(">u2").reshape(8, 8)
    path.write_bytes(b"P5 8 8 65535\n" + grey.tobytes())


def write_alpha(path: Path) -> None:
    """A black square whose form is in its transparency alone."""
    alpha = Image.fromarray(np.linspace(255, 0, 64).astype(np.uint8).reshape(8, 8))
    Image.merge("LA", [Image.new("L", (8, 8)), alpha]).save(path)


def write_palette(path: Path) -> None:
    grey = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    grey.putdata(list(range(64)))
    grey.putpalette([0, 0, 0] * 64)
    grey.save(path, transparency=bytes(255 - 4 * k for k in range(64)))


def write_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    Image.fromarray(np.linspace(255, 0, 64).astype(np.uint8).reshape(8, 8)).save(path, exif=exif)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.pgm", write_grey), ("a.png", write_alpha), ("p.png", write_palette), ("t.png", write_turned)],
)
def test_an_image_is_read_as_one_sees_it(tmp_path: Path, name: str, write: Any) -> None:
    """All are a ramp from black to white."""
    write(tmp_path / name)
    ramp = np.asarray(read_rgb(tmp_path / name), dtype=int)[..., 0].flatten()
    assert ramp[0] <= 2 and ramp[-1] >= 250 and (np.diff(ramp) > 0).all()


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
        (
            {"train": "9,images/train/cat/0.png,cat, black"},
            "train.csv, line 10, has more values than the first",
        ),
        (
            {"train": "9,images/train/cat/0.png,dog"},
            "gives images/train/cat/0.png the labels 'a cat' and 'dog'",
        ),
        ({"train": '9,images/train/cat/0.png,"cat'}, "train.csv, line 10, cannot be read"),
    ],
)
def test_a_table_with_faults_is_refused(tmp_path: Path, rows: dict[str, str], text: str) -> None:
    assert text in refused(lambda: ready(write_tables(tmp_path, **rows)))


def test_a_table_as_others_write_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Semicolons, spaces, blank lines, numbers as labels, and a line twice."""
    lines = [f"{write_image(tmp_path / f'{k}.png')}; {k} " for k in range(12)]
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("\n".join(["path;label", *lines, "  ", lines[3], ""]))
    data = ready(ImageTableData(8, root=str(tmp_path), batch_size=2))
    assert data.class_names == [str(k) for k in range(12)] and len(data.test_set or ()) == 12
    assert "train.csv: 1 lines list a file again and are skipped" in caplog.text


@pytest.mark.parametrize("text", [None, "", "file,class\n1.png,cat\n", "path,label,label\n1.png,cat,dog\n"])
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
        (np.full((6, 5, 4), 65535, ">u2"), (0, 65535), (1, 5, 4), 255),
        (np.full((6, 5, 4, 3), 7, np.uint8)[:, ::-1, :, ::-1], None, (3, 5, 4), 7),
        (np.broadcast_to(np.uint8(7), (6, 5, 4)), None, (1, 5, 4), 7),
        (np.full((6, 5, 4), 1 + 1e-7), (0, 1), (1, 5, 4), 255),
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
        (np.ones((6, 3, 8, 8), np.uint8), LABELS, None, "give tensors as N, C, H, W"),
        (torch.ones((6, 8, 8, 1), dtype=torch.uint8), LABELS, None, "give tensors as N, C, H, W"),
        (np.linspace(0, 1, 120).reshape(6, 5, 4), LABELS, (0, 255), "two levels at most"),
        (np.ones((6, 5, 4)), LABELS, (0, 1, 2), "set it to two numbers"),
        (np.ones((6, 5, 4)), LABELS, (0, np.inf), "set it to what is black and what is white"),
        (np.ones((0, 5, 4), np.uint8), LABELS[:0], None, "are no array of numbers"),
        (np.ones((6, 5, 4), np.uint8), list("abcabc"), None, "labels are no array of numbers"),
        (np.ones((6, 5, 4), np.uint8), LABELS + 0.5, None, "labels are no whole numbers"),
        (np.ones((6, 5, 4), np.uint8), np.eye(3)[LABELS], None, "give a class number an image"),
        (np.ones((6, 5, 4), np.uint8), LABELS + 1, None, "no training image has the label 0 of 0 … 3"),
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


class Split:
    """A split as `datasets` has it, in memory."""

    def __init__(self, images: list[Any], labels: list[int], names: str = "ab") -> None:
        self.features = {
            "image": type("Images", (), {"decode_example": None}),
            "label": type("", (), {"names": names}),
        }
        self.columns = {"image": images, "label": labels}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        if self.columns["image"][key] is None:
            raise OSError("cut short")
        return {name: column[key] for name, column in self.columns.items()}

    def __len__(self) -> int:
        return len(self.columns["label"])


def test_splits_in_memory_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    image = Image.fromarray(np.full((9, 9), 257 * 7, np.uint16))
    good = Split([image] * 6, [0, 1] * 3)
    x_BCHW, _ = ready(HuggingFaceImages({"train": good, "test": good}, 8, batch_size=2)).sample(2, seed=0)
    assert (x_BCHW * 255).round().unique().tolist() == [7]
    damaged = Split([image] * 5 + [None], [0, 1] * 3)
    data = HuggingFaceImages({"train": good, "test": damaged}, 8, batch_size=2)
    assert "image 5 of the data set is not readable" in refused(lambda: fit(data))
    turned = {"train": good, "test": Split([image] * 6, [0, 1] * 3, "ba")}
    assert "name their classes differently" in refused(lambda: HuggingFaceImages(turned, 8))


def test_its_configuration_names_what_the_class_takes() -> None:
    node = OmegaConf.load(CONF / "huggingface.yaml")
    names = HuggingFaceImages.__init__.__annotations__.keys() | {"root", "batch_size", "val_fraction", "seed"}
    assert set(node) - {"_target_", "workers", "augment", "mean", "std"} <= names
