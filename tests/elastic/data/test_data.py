"""Data modules: on digits for real, on small generated sets in torchvision's layouts, on MNIST and CIFAR-10
where ELASTIC_DATA holds them."""

import hashlib
import os
import pickle
import socket
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

import elastic.data
from elastic.data import Digits, ImageFolderData, Imagenette, TorchvisionImages, fetch
from elastic.data.augment import AlternatingFlip, RandomAffine
from elastic.data.folders import list_folder
from elastic.data.images import scale_bytes
from elastic.data.split import split_stratified
from elastic.errors import DataError, OptionError

CONF = Path(elastic.data.__file__).parents[2] / "conf" / "data"
REPLACE = "delete or replace it"
WNIDS = sorted(datasets.Imagenette._WNID_TO_CLASS)


# --- generated sets -----------------------------------------------------------------------------------------


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """60 training and 20 test images of random bytes."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{part}-images-idx3-ubyte", random.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR10 class and a root that go together: 100 training and 20 test images of random bytes."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name):
        images = random.integers(0, 256, (20, 3072), np.uint8)
        return write(name, {"data": images, "labels": [*range(10)] * 2})

    class SmallCIFAR(datasets.CIFAR10):
        train_list = [batch(f"data_batch_{i}") for i in range(1, 6)]
        test_list = [batch("test_batch")]
        meta = {"filename": "batches.meta", "key": "label_names"}

    SmallCIFAR.meta["md5"] = write("batches.meta", {"label_names": [*"abcdefghij"]})[1]
    return SmallCIFAR, tmp_path


def write_images(folder, classes, per_class, size=(24, 20), suffix=".png"):
    """Plain images whose red is the class and whose green is the number within it."""
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, (20 * k, 10 * i, 0)).save(folder / name / f"{i}{suffix}")
    return folder


def mnist(root, **options):
    options = {"batch_size": 16, "download": False, **options}
    return TorchvisionImages(datasets.MNIST, (1, 28, 28), 10, root=str(root), **options)


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def training(data, world_size=1, global_rank=0):
    """As if attached to a trainer that is training."""
    data.trainer = SimpleNamespace(
        training=True,
        current_epoch=0,
        world_size=world_size,
        global_rank=global_rank,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(convert_input=lambda x: x),
    )
    return data


def labels(part):
    return part.__getitems__(range(len(part)))[1]


def order(loader, epoch):
    """The labels of an epoch in their order, which for hundreds of samples tells two orders apart."""
    loader.sampler.set_epoch(epoch)
    return torch.cat([y for _, y in loader]).tolist()


def refused(call):
    """The message of the DataError that `call` raises, which must be one line."""
    with pytest.raises((DataError, OptionError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the split ----------------------------------------------------------------------------------------------


def test_digits_parts_are_disjoint_and_complete():
    data = ready(Digits())
    images = torch.from_numpy(load_digits().images)
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [1293, 144, 360]
    found = torch.cat([part.__getitems__(range(len(part)))[0] for part in parts])[:, 0]
    greys = (found.double() * 16 / 255).round()
    assert sorted(map(bytes, greys.byte().numpy())) == sorted(map(bytes, images.byte().numpy()))
    assert torch.equal(found, (greys * 255 / 16).round().byte())
    assert set(data.train_set.indices).isdisjoint(data.val_set.indices)


def test_every_part_has_the_mix_of_classes_of_the_whole():
    data = ready(Digits(val_fraction=0.2))
    whole = np.bincount(load_digits().target) / 1797
    for part in (data.train_set, data.val_set, data.test_set):
        counts = torch.bincount(labels(part), minlength=10).numpy()
        assert np.abs(counts - whole * len(part)).max() < 2


@pytest.mark.parametrize("sizes", [[50] * 4, [3, 30, 300], [7, 11, 13, 1], [1, 1]])
@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.5])
def test_stratified_split_takes_each_class_its_share(sizes, fraction):
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    count = round(fraction * len(y))
    rest, part = split_stratified(y, count, seed=5)
    assert len(part) == count
    assert sorted(rest.tolist() + part.tolist()) == list(range(len(y)))
    taken = torch.bincount(y[part], minlength=len(sizes))
    for size, k in zip(sizes, taken.tolist(), strict=True):
        assert abs(k - size * count / len(y)) < 1


def test_validation_split_follows_the_split_seed_and_not_the_run_seed():
    first, second = ready(Digits(seed=1)), ready(Digits(seed=2))
    assert first.val_set.indices == second.val_set.indices
    assert torch.equal(labels(first.test_set), labels(second.test_set))
    other = ready(Digits(seed=1, split_seed=1))
    assert first.val_set.indices != other.val_set.indices


# --- loaders ------------------------------------------------------------------------------------------------


def test_training_order_follows_from_seed_and_epoch():
    data = ready(Digits(seed=3))
    loader = data.train_dataloader()
    first, second = order(loader, 0), order(loader, 1)
    assert first != second
    assert order(loader, 0) == first
    assert order(ready(Digits(seed=3)).train_dataloader(), 1) == second
    assert order(ready(Digits(seed=4)).train_dataloader(), 0) != first


def test_processes_that_fetch_ahead_fetch_the_epoch_that_the_sampler_is_told_of():
    """Lightning asks for an iterator of a run that goes on before it says which epoch that goes on with."""
    loader = ready(Digits(batch_size=1000, workers=1)).train_dataloader()
    batches = iter(loader)
    loader.sampler.set_epoch(3)
    first = next(batches)[1].tolist()
    loader._iterator._shutdown_workers()  # left to the garbage collector it takes 5 s
    assert first == order(ready(Digits(batch_size=1000)).train_dataloader(), 3)


def test_batches_are_whole_and_only_training_drops_the_last():
    data = ready(Digits(batch_size=100))
    assert [len(y) for _, y in data.train_dataloader()] == [100] * 12
    assert [len(y) for _, y in data.val_dataloader()] == [100, 44]
    assert [len(y) for _, y in data.test_dataloader()] == [100, 100, 100, 60]
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.dtype) == ((100, 1, 8, 8), torch.uint8, torch.int64)


def test_a_process_whose_share_is_below_one_batch_keeps_it():
    data = training(ready(Digits(batch_size=800)), world_size=2)
    assert [len(y) for _, y in data.train_dataloader()] == [647]


def test_evaluation_is_not_shuffled():
    data = ready(Digits())
    assert order(data.val_dataloader(), 0) == labels(data.val_set).tolist()
    assert order(data.test_dataloader(), 1) == labels(data.test_set).tolist()


def test_processes_share_an_epoch_out():
    data = ready(Digits(batch_size=10))
    for make in (data.train_dataloader, data.val_dataloader):
        seen = []
        for rank in range(2):
            training(data, world_size=2, global_rank=rank)
            seen += list(make().sampler)
        count = len(make().sampler.dataset)
        assert set(seen) == set(range(count))
        assert len(seen) == count + count % 2


def test_loading_leaves_the_global_generator_alone():
    data = Digits()
    state = torch.get_rng_state()
    ready(data)
    for make in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        next(iter(make()))
    data.sample(10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


# --- what happens on the device -----------------------------------------------------------------------------


def test_normalisation_inverts_to_the_bytes(cifar):
    dataset, root = cifar
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    options = {"root": str(root), "batch_size": 8, "mean": mean, "std": std}
    data = ready(TorchvisionImages(dataset, (3, 32, 32), 10, **options))
    x, y = next(iter(data.test_dataloader()))
    z, same_y = data.on_after_batch_transfer((x, y), 0)
    assert z.dtype == torch.float32
    assert same_y is y
    bytes_again = (z * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255
    torch.testing.assert_close(bytes_again, x.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("named", [False, True], ids=["in a list", "by name"])
def test_augmentation_runs_in_order_on_unit_images_while_training_only(named):
    seen = []

    def halve(x):
        seen.append(x)
        return x / 2

    changes = {"halve": halve, "brighten": lambda x: x + 1}
    data = ready(Digits(augment=changes if named else changes.values(), mean=(0.5,), std=(0.25,)))
    batch = next(iter(data.val_dataloader()))
    unit = scale_bytes(batch[0])
    assert unit.min() == 0 and unit.max() == 1
    plain = data.on_after_batch_transfer(batch, 0)[0]
    torch.testing.assert_close(plain, (unit - 0.5) / 0.25)
    assert not seen
    augmented = training(data).on_after_batch_transfer(batch, 0)[0]
    assert torch.equal(seen[0], unit)
    torch.testing.assert_close(augmented, (unit / 2 + 1 - 0.5) / 0.25)
    data.trainer.training = False
    assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], plain)


def test_a_flip_alternates_with_the_trainers_epochs():
    data = training(ready(Digits(augment=[AlternatingFlip()])))
    batch, sides = next(iter(data.val_dataloader())), []
    for data.trainer.current_epoch in (4, 5):
        sides.append(data.on_after_batch_transfer(batch, 0)[0])
    assert torch.equal(sides[0], sides[1].flip(3)) and not torch.equal(*sides)


def test_all_training_images_come_in_their_order_as_in_an_epoch():
    data = training(ready(Digits(augment=[AlternatingFlip(), lambda x: x / 2], batch_size=500)))
    x, _ = data.train_set.__getitems__(range(len(data.train_set)))
    flip = AlternatingFlip()
    for flip.epoch in (0, 1):
        batches = list(data.iterate_train(flip.epoch, torch.device("cpu")))
        assert [len(batch) for batch in batches] == [500, 500, 293]
        torch.testing.assert_close(torch.cat(batches), flip(scale_bytes(x)) / 2)


def test_sample_is_part_of_the_training_images_as_validation_sees_them():
    data = Digits(augment=[RandomAffine(90)], mean=(0.3,), std=(0.4,))
    x, y = data.sample(50, seed=7)  # before setup, too
    assert (x.shape, y.shape) == ((50, 1, 8, 8), (50,))
    train_x, train_y = data.train_set.__getitems__(range(len(data.train_set)))
    bytes_again = ((x * 0.4 + 0.3) * 255).round().byte()
    known = {(bytes(image.flatten().tolist()), int(k)) for image, k in zip(train_x, train_y, strict=True)}
    found = {(bytes(image.flatten().tolist()), int(k)) for image, k in zip(bytes_again, y, strict=True)}
    assert found <= known and len(found) == 50
    again, other = training(data).sample(50, seed=7), data.sample(50, seed=8)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x, other[0])
    assert "ask for 1 to 1293" in refused(lambda: data.sample(1294, seed=0))


class Watcher(L.LightningModule):
    """Keeps every batch it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, _):
        self.trained.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch, _):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, epochs=2, ckpt_path=None, **options):
    watcher = Watcher()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet = {"enable_checkpointing": False, "accelerator": "cpu", **quiet}
    trainer = L.Trainer(max_epochs=epochs, **quiet, **options)
    trainer.fit(watcher, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return watcher, trainer


def test_trainer_shuffles_anew_and_augments_training_but_not_validation():
    data = Digits(batch_size=431, augment=[RandomAffine(30)])
    watcher, _ = fit(data)
    assert [len(y) for _, y in watcher.trained] == [431] * 6
    epochs = [torch.cat([y for _, y in watcher.trained[k : k + 3]]) for k in (0, 3)]
    assert not torch.equal(*epochs)
    assert torch.equal(*(torch.sort(y).values for y in epochs))
    for e in (0, 1):
        assert order(data.train_dataloader(), e) == epochs[e].tolist()
    plain = scale_bytes(data.val_set.__getitems__(range(144))[0])
    assert all(torch.equal(x, plain) for x, _ in watcher.validated)
    known = {image.numpy().tobytes() for image in scale_bytes(data.train_set.__getitems__(range(1293))[0])}
    assert not any(image.numpy().tobytes() in known for image in watcher.trained[0][0])


def test_resumed_run_sees_the_batches_it_would_have_seen(tmp_path):
    straight, _ = fit(Digits(batch_size=431, seed=5), epochs=2)
    _, trainer = fit(Digits(batch_size=431, seed=5), epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fit(Digits(batch_size=431, seed=5), epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert len(resumed.trained) == 3
    for mine, theirs in zip(resumed.trained, straight.trained[3:], strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_batches_take_the_precision_of_the_trainer():
    watcher, _ = fit(Digits(batch_size=431), epochs=1, precision="64-true")
    assert watcher.trained[0][0].dtype == watcher.validated[0][0].dtype == torch.float64
    assert watcher.trained[0][1].dtype == torch.int64


# --- the sets -----------------------------------------------------------------------------------------------


def test_mnist_layout_is_read_as_it_lies(mnist_root):
    data = ready(mnist(mnist_root, val_fraction=0.2))
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [48, 12, 20]
    assert torch.bincount(labels(data.test_set)).tolist() == [2] * 10
    raw = (mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.test_set.images.shape == (20, 1, 28, 28)
    assert data.test_set.images.numpy().tobytes() == raw


def test_cifar_layout_is_read_channels_first(cifar):
    dataset, root = cifar
    data = ready(TorchvisionImages(dataset, (3, 32, 32), 10, root=str(root), batch_size=8))
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [90, 10, 20]
    stored = pickle.loads((root / "cifar-10-batches-py" / "test_batch").read_bytes())  # noqa: S301  (our own)
    assert data.test_set.images.numpy().tobytes() == stored["data"].tobytes()
    assert labels(data.test_set).tolist() == stored["labels"]


@pytest.mark.parametrize("test_part", ["test", "val"])
def test_image_folder(tmp_path, test_part):
    write_images(tmp_path / "train", ["ant", "bee", "cat"], per_class=10)
    write_images(tmp_path / test_part, ["ant", "bee", "cat"], per_class=2)
    data = ImageFolderData(size=16, root=str(tmp_path), batch_size=4)
    assert (data.shape, data.classes) == ((3, 16, 16), 3)  # before setup
    ready(data)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [27, 3, 6]
    seen = set()
    for part in (data.train_set, data.val_set):
        x, y = part.__getitems__(range(len(part)))
        assert (x.shape[1:], x.dtype) == ((3, 16, 16), torch.uint8)
        assert torch.equal(x, x[:, :, :1, :1].expand_as(x)), "plain images stay plain"
        assert torch.equal(x[:, 0, 0, 0], (20 * y).byte())
        seen |= {(k, g // 10) for k, g in zip(y.tolist(), x[:, 1, 0, 0].tolist(), strict=True)}
    assert seen == {(k, i) for k in range(3) for i in range(10)}
    assert labels(data.test_set).tolist() == [0, 0, 1, 1, 2, 2]


def test_image_is_scaled_by_its_shorter_side_and_cut_at_the_centre(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part, ["a", "b"], per_class=3)
        wide = np.zeros((20, 60, 3), np.uint8)
        wide[:, 20:40] = 255  # the central square
        Image.fromarray(wide).save(tmp_path / part / "a" / "0.png")
    data = ready(ImageFolderData(size=10, root=str(tmp_path), batch_size=1))
    image = data.test_set[0][0]
    assert image.shape == (3, 10, 10)
    assert (image[:, :, 1:-1] == 255).all()


def test_imagenette_layout_in_worker_processes(tmp_path):
    folder = tmp_path / "imagenette2-160"
    write_images(folder / "train", WNIDS, per_class=4, suffix=".JPEG")
    write_images(folder / "val", WNIDS, per_class=2, suffix=".JPEG")
    data = Imagenette(size=16, root=str(tmp_path), batch_size=8, workers=1)
    assert (data.shape, data.classes) == ((3, 16, 16), 10)
    ready(data)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [36, 4, 20]
    batches = list(data.test_dataloader())
    assert [len(y) for _, y in batches] == [8, 8, 4]
    assert torch.cat([y for _, y in batches]).tolist() == [k for k in range(10) for _ in range(2)]
    (folder / "val" / WNIDS[9] / "1.JPEG").write_bytes(b"\xff\xd8garbage")
    loader = data.test_dataloader()
    message = refused(lambda: list(loader))
    assert message.startswith(str(folder)) and message.endswith(f"1.JPEG is not a readable image: {REPLACE}")
    loader._iterator._shutdown_workers()  # left to the garbage collector it takes 5 s


def test_without_a_validation_part_all_is_trained_on():
    data, split = ready(Digits(val_fraction=0)), ready(Digits(val_fraction=0.1))
    assert sorted(data.train_set.indices) == list(range(len(split.train_set) + len(split.val_set)))
    assert data.val_set.indices == split.val_set.indices, "images that are trained on, too"
    assert sum(len(y) for _, y in data.test_dataloader()) == len(split.test_set)


# --- failing well -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5])
def test_val_fraction_must_leave_two_parts(fraction):
    message = refused(lambda: Digits(val_fraction=fraction))
    assert f"val_fraction={fraction} cannot be: set it to a number" in message


def test_batch_size_must_fit():
    assert "set data.batch_size to 1293 or less" in refused(lambda: ready(Digits(batch_size=1294)))
    assert "set it to a whole number, 1 or more" in refused(lambda: Digits(batch_size=0))
    assert sum(1 for _ in ready(Digits(batch_size=1293)).train_dataloader()) == 1


def test_mean_and_std_are_one_number_a_channel():
    assert "set data.std to 1, one a channel" in refused(lambda: ready(Digits(std=(1.0, 1.0, 1.0))))


def test_images_of_ones_own_are_bytes():
    """Floats from 0 to 1 would all be nearly black."""

    class Floats(Digits):
        def load(self, download):
            parts = super().load(download)
            for part in parts:
                part.images = part.images / 255
            return parts

    with pytest.raises(
        DataError, match=r"images are torch\.float32, not bytes: let the data give torch\.uint8"
    ):
        Floats().sample(2, seed=0)


def test_labels_are_of_the_classes():
    class Mislabelled(Digits):
        def load(self, download):
            train, test = super().load(download)
            train.labels[3] = label
            return train, test

    for label in (10, -1):
        assert f"there is a label {label} where 10 classes are 0 … 9" in refused(lambda: ready(Mislabelled()))


def test_one_class_is_nothing_to_learn(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part, ["a"], per_class=3)
    data = ImageFolderData(size=10, root=str(tmp_path), batch_size=1)
    assert "images of 1 class alone: name data of 2 or more" in refused(lambda: ready(data))


def test_loaders_before_setup():
    assert "call prepare_data() and setup() first" in refused(Digits().train_dataloader)


def test_missing_data_is_named_with_the_remedy(tmp_path):
    message = refused(lambda: ready(mnist(tmp_path)))
    folder = tmp_path / "MNIST" / "raw"
    assert message.startswith(f"MNIST not found in {folder}: set data.root (or ELASTIC_DATA) to a folder")
    assert "data.download=true" in message
    assert "Imagenette not found" in refused(lambda: ready(Imagenette(root=str(tmp_path), download=False)))


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.mark.parametrize("dataset", [datasets.MNIST, datasets.CIFAR10, datasets.CIFAR100])
def test_failed_download_names_the_remedy_and_leaves_nothing(tmp_path, offline, dataset):
    root = tmp_path / "new"
    shape = (1, 28, 28) if dataset is datasets.MNIST else (3, 32, 32)
    message = refused(lambda: ready(TorchvisionImages(dataset, shape, 10, root=str(root))))
    assert f"{dataset.__name__} not found in {root}" in message
    assert "no route to host" in message and "set data.root (or ELASTIC_DATA)" in message
    assert not root.exists()


def test_failed_imagenette_download(tmp_path, offline):
    message = refused(lambda: ready(Imagenette(root=str(tmp_path))))
    assert f"Imagenette not found in {tmp_path / 'imagenette2-160'} and not downloaded" in message
    assert list(tmp_path.iterdir()) == []


def test_silent_server_does_not_hang_the_download(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts and never answers
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror])
        monkeypatch.setattr(fetch, "SILENCE_S", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "not downloaded" in refused(lambda: ready(mnist(tmp_path, download=True)))
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("keep", [0, 10, 1000])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"])
def test_truncated_mnist_is_corrupt_and_not_missing(mnist_root, name, keep):
    path = mnist_root / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(lambda: ready(mnist(mnist_root, download=True)))
    assert f"MNIST in {path.parent} is incomplete or corrupt" in message
    assert "delete that folder" in message


def test_garbage_where_mnist_should_be(mnist_root):
    raw = mnist_root / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes(b"<html>404</html>")
    assert "incomplete or corrupt" in refused(lambda: ready(mnist(mnist_root)))
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(60))
    assert "labels run from 0 to 59, not within 10 classes" in refused(lambda: ready(mnist(mnist_root)))
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(50) % 10)
    assert "60 images but 50 labels" in refused(lambda: ready(mnist(mnist_root)))
    (raw / "train-labels-idx1-ubyte").unlink()
    assert "incomplete or corrupt" in refused(lambda: ready(mnist(mnist_root)))


def test_shape_other_than_declared(mnist_root):
    data = TorchvisionImages(datasets.MNIST, (1, 32, 32), 10, root=str(mnist_root), batch_size=8)
    assert "(1, 28, 28), not bytes (1, 32, 32)" in refused(lambda: ready(data))


def test_corrupt_cifar(cifar, offline):
    dataset, root = cifar
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    for download in (False, True):
        data = TorchvisionImages(dataset, (3, 32, 32), 10, root=str(root), batch_size=8, download=download)
        message = refused(lambda data=data: ready(data))
        assert f"SmallCIFAR in {path.parent} is incomplete or corrupt" in message


def test_image_folders_that_cannot_be_used(tmp_path):
    root = tmp_path / "mine"
    assert f"{root / 'train'} holds no images" in refused(lambda: ImageFolderData(size=8, root=str(root)))
    write_images(root / "train", ["a", "b"], per_class=4)
    (root / "train" / "empty").mkdir()
    assert "none is in empty" in refused(lambda: ImageFolderData(size=8, root=str(root)))
    (root / "train" / "empty").rmdir()
    data = ImageFolderData(size=8, root=str(root), batch_size=2)
    assert f"{root / 'test'} holds no images" in refused(lambda: ready(data))
    write_images(root / "test", ["a", "c"], per_class=1)
    assert "differ in the class folder b" in refused(lambda: ready(data))


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "garbage", "truncated"])
def test_corrupt_image_is_named(tmp_path, content):
    for part in ("train", "test"):
        write_images(tmp_path / part, ["a", "b"], per_class=4)
    path = tmp_path / "test" / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    data = ready(ImageFolderData(size=8, root=str(tmp_path), batch_size=2))
    assert refused(lambda: list(data.test_dataloader())) == f"{path} is not a readable image: {REPLACE}"


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part, ("cat", "dog"), 3)
        write_images(tmp_path / part, (".ipynb_checkpoints",), 2)
        write_images(tmp_path / part / "cat", (".ipynb_checkpoints",), 2)
        (tmp_path / part / "dog" / "._0.png").write_bytes(b"of another system")
    data = ready(ImageFolderData(8, root=str(tmp_path), batch_size=2))
    assert data.classes == 2 and len(data._train) == len(data.test_set) == 6
    assert refused(lambda: ImageFolderData(8, root=str(tmp_path / "train"))).startswith(f"{tmp_path}")


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16)
    folder = tmp_path / "train" / "grey"
    folder.mkdir(parents=True)
    Image.fromarray(values).save(folder / f"0{suffix}")
    (x_BCHW, _) = list_folder(tmp_path / "train", 2).__getitems__([0])
    assert x_BCHW[0].tolist() == [[[0, 1], [128, 255]]] * 3


def test_values_of_an_unknown_range_are_refused(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part, ("cat",), 3)
    path = tmp_path / "train" / "cat" / "9.tiff"
    Image.fromarray(np.ones((9, 9), np.float32)).save(path)
    message = refused(lambda: list_folder(tmp_path / "train", 8).__getitems__(range(4)))
    assert str(path) in message and "save it with 8 or 16 bits" in message


def test_half_of_imagenette(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / "imagenette2-160" / part, WNIDS[:5], per_class=1, suffix=".JPEG")
    assert "incomplete (5 of 10 classes)" in refused(lambda: ready(Imagenette(root=str(tmp_path))))


# --- configuration ------------------------------------------------------------------------------------------


def configured(name, **changes):
    group = OmegaConf.load(CONF / f"{name}.yaml")
    for base in group.pop("defaults", [])[:-1]:  # before what the file itself says
        group = OmegaConf.merge(OmegaConf.load(CONF / f"{base}.yaml"), group)
    group = OmegaConf.merge(group, changes)
    return instantiate(OmegaConf.create({"seed": 11, "data": group}).data)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1, 8, 8), 10),
        ("shapes", (3, 16, 16), 4),
        ("shapes_labels", (3, 16, 16), 4),
        ("shapes_masks", (3, 16, 16), 2),
        ("shapes_places", (3, 16, 16), 3),
        ("mnist", (1, 28, 28), 10),
        ("fashion_mnist", (1, 28, 28), 10),
        ("cifar10", (3, 32, 32), 10),
        ("cifar100", (3, 32, 32), 100),
        ("cifar10_mnist", (3, 32, 32), 20),
        ("imagenette", (3, 160, 160), 10),
        ("folder", (3, 160, 160), 2),
        ("csv", (3, 160, 160), 2),
    ],
)
def test_every_configuration_makes_its_data(name, shape, classes, tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_DATA", str(tmp_path))
    write_images(tmp_path / "train", ["a", "b"], per_class=1)
    (tmp_path / "train.csv").write_text("path,label\ntrain/a/0.png,a\ntrain/b/0.png,b\n")
    data = configured(name)
    assert (data.shape, data.classes, data.seed) == (shape, classes, 11)
    if not name.startswith(("digits", "shapes")):
        assert data.root == str(tmp_path)
    x = torch.rand(2, *shape)
    assert data.normalise(x).shape == x.shape
    assert bool(data.augment) == ("_" not in name or name.endswith("_mnist"))
    for change in data.augment:
        assert change(x).shape == x.shape


def test_all_configurations_are_tested():
    tested = test_every_configuration_makes_its_data.pytestmark[0].args[1]
    names = {path.stem for path in CONF.glob("*.yaml")} - {"huggingface"}  # whose extra may be missing
    assert names == {name for name, *_ in tested}


def test_digits_are_normalised_by_their_own_statistics():
    data = configured("digits")
    x, _ = data.sample(1293, seed=0)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01


def test_shapes_are_the_same_in_every_run_and_tell_their_classes():
    one, two = configured("shapes"), configured("shapes")
    (x, y), (again, _) = (data.sample(1080, seed=0) for data in (one, two))
    assert torch.equal(x, again)
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert y.bincount().min() > 200
    # By how much they fill their box: squares most, crosses least.
    bright = (x - x.mean((2, 3), keepdim=True) > 0).float().mean((1, 2, 3))
    filled = [float(bright[y == k].mean()) for k in range(4)]
    assert filled[1] > filled[0] > max(filled[2:])


# --- the real things ----------------------------------------------------------------------------------------


def real(name, folder):
    if not Path(os.environ.get("ELASTIC_DATA", "data"), folder).is_dir():
        pytest.skip(f"ELASTIC_DATA holds no {folder}")
    return ready(configured(name, download=False))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder", "train", "val"),
    [("mnist", "MNIST/raw", 54000, 6000), ("cifar10", "cifar-10-batches-py", 45000, 5000)],
)
def test_real_data(name, folder, train, val):
    data = real(name, folder)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [train, val, 10000]
    assert set(data.train_set.indices).isdisjoint(data.val_set.indices)
    official = torch.bincount(data.train_set.dataset.labels)
    counts = torch.bincount(labels(data.val_set))
    assert (counts - official / 10).abs().max() < 1
    x, _ = data.sample(2000, seed=0)
    assert x.mean().abs() < 0.03 and (x.std() - 1).abs() < 0.03
    batch = next(iter(data.train_dataloader()))
    augmented, _ = training(data).on_after_batch_transfer(batch, 0)
    assert augmented.shape == (128, *data.shape)
    black = data.normalise(torch.zeros(1, *data.shape)).amin()
    assert augmented.min() >= black - 1e-6
