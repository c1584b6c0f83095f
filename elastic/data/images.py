"""Give all image data the split, the loaders, normalisation and a place for augmentation.

A set is read into bytes once; one that is held in memory is held in a GPU's, where it trains on one. Loaders
hand over whole batches of bytes, and everything done in floating point (scaling, augmentation, normalisation)
runs after the transfer, on the device, a batch at a time.

Shapes: B samples of a batch, C channels, H rows, W columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from elastic.data.imageset import Batch, ImageSet, InMemory
from elastic.data.split import find_strata, is_class_number, split_stratified
from elastic.errors import DataError
from elastic.ranges import Count, Positive, Range, Seed, checked

MOST_NAMES = 10  # of classes, that are told
ROOM = 0.1  # of a GPU's free memory, that a set of images may take
Change = Callable[[Tensor], Tensor]
Part = TypeVar("Part", bound=Dataset[Batch])


@checked
class ImageData(L.LightningDataModule, ABC):
    """Provide train, validation and test batches of one set of images; a subclass says how to `load` it.

    The validation part is cut from the official training data, class by class, by `split_seed`; runs that
    differ in `seed` therefore share it. The test part is the official one.

    Args:
        root: folder of all data sets, in torchvision's layouts.
        batch_size: samples in a batch of one process.
        val_fraction: of the official training data; at 0 all of it is trained on, and what stands in the
            validation's place is a tenth of the same images: for runs whose decisions have been taken.
        seed: of the training order.
        split_seed: of the validation split.
        augment: callables x_BCHW -> x_BCHW on images in [0, 1], with names or without; used in order, while
            training only. One that has an attribute `epoch` is told the epoch by it before each batch.
        mean, std: one number a channel, of images in [0, 1].
        workers: processes that read batches; sets held in memory are fastest with none.
        download: fetch what is missing.

    Attributes:
        shape: (C, H, W).
        classes: their number; that of labels or values where targets are such.
        known_names: of the classes, where they are known before the data is read.
        train_set, val_set, test_set: after `setup`.
    """

    shape: tuple[int, int, int]
    classes: int
    known_names: Sequence[str] = ()

    def __init__(
        self,
        root: str = "data",
        batch_size: Count = 128,
        val_fraction: Annotated[float, Range(0, 1, below=True)] = 0.1,
        seed: Seed = 0,
        split_seed: Seed = 0,
        augment: Mapping[str, Change] | Iterable[Change] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[Positive] = (1.0,),
        workers: Annotated[int, Range(0, 1024)] = 0,
        download: bool = True,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.val_fraction = root, batch_size, val_fraction
        self.seed, self.split_seed = seed, split_seed
        self.augment = tuple(augment.values() if isinstance(augment, Mapping) else augment or ())
        self.mean, self.std = tuple(mean), tuple(std)
        self.workers, self.download = workers, download
        self.train_set: Subset[Batch] | None = None
        self.val_set: Subset[Batch] | None = None
        self.test_set: ImageSet | None = None

    @abstractmethod
    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Load the official training and test data.

        Raises:
            DataError: they are missing or corrupt.
        """

    def prepare_data(self) -> None:
        """Download if need be, and look for damage before training.

        Only the first process of a machine comes here; it keeps what it has read.
        """
        self._read(self.download)
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            for part in (self._require(self.train_set).dataset, self._require(self.test_set)):
                assert isinstance(part, ImageSet)
                part.check()

    def setup(self, stage: str | None = None) -> None:
        """Read the data, in every process."""
        self._read(download=False)
        self._hold()

    def _hold(self) -> None:
        """Hold what is in memory where it is looked at, so that no batch has to be sent there."""
        if self.trainer is None or self.workers:  # processes of their own cannot share a GPU's memory
            return
        device = self.trainer.strategy.root_device
        for part in (self._require(self.train_set).dataset, self._require(self.test_set)):
            if isinstance(part, InMemory):
                part.to(device if has_room(device, part.images.nbytes) else torch.device("cpu"))

    def _read(self, download: bool) -> None:
        if self.test_set is not None:
            return
        for name in ("mean", "std"):  # three numbers would otherwise make three channels of one
            if (count := len(getattr(self, name))) not in (1, self.shape[0]):
                raise DataError(
                    f"{name} has {count} numbers: set data.{name} to {self.shape[0]}, one a channel"
                )
        official, test = self.load(download)
        if self.augment and official.labels.dim() > 2:
            raise DataError("augmentation would move images and not their masks: set data.augment=null")
        self._check_labels(official.labels)
        self._check_labels(test.labels, least=1)
        val_count = min(max(1, round(len(official) * (self.val_fraction or 0.1))), len(official) - 1)
        train, val = split_stratified(find_strata(official.labels), val_count, self.split_seed)
        if self.val_fraction == 0:
            train = torch.arange(len(official))
        if len(train) < self.batch_size:
            raise DataError(
                f"batch_size {self.batch_size} is more than the {len(train)} training images: "
                f"set data.batch_size to {len(train)} or less"
            )
        self.train_set, self.val_set = Subset(official, train.tolist()), Subset(official, val.tolist())
        self.test_set = test

    @property
    def class_names(self) -> list[str]:
        """Name the classes, by their numbers where the set has no names or has not been read."""
        names = self.known_names if self.test_set is None else self.test_set.class_names
        return list(names) or [str(k) for k in range(self.classes)]

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse other classes than those that a network has been trained on, or another order of them.

        Raises:
            DataError: both are known by more than their numbers, and differ.
        """
        data_names = self.class_names
        if list(names) == data_names or _are_numbers(data_names) or _are_numbers(names):
            return
        here, there = ", ".join(data_names[:MOST_NAMES]), ", ".join(names[:MOST_NAMES])
        raise DataError(
            f"the data in {self.root} has other classes ({here}) than the network was trained on ({there}): "
            "set data.root (or ELASTIC_DATA) to the right folder, or name the classes as they were"
        )

    # A run goes on with the classes that it was started with.

    def state_dict(self) -> dict[str, Any]:
        return {"classes": [str(name) for name in self.class_names]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_names(state_dict["classes"])

    def _check_labels(self, y_N: Tensor, least: int = 2) -> None:
        """Refuse labels that are none of the classes, or of fewer than `least` of them.

        Raises:
            DataError: they are.
        """
        if not is_class_number(y_N):
            return
        labels = y_N.unique().tolist()
        outside = [label for label in labels if not 0 <= label < self.classes]
        if outside:
            raise DataError(
                f"there is a label {outside[0]} where {self.classes} classes are 0 … {self.classes - 1}: set "
                "data.classes to their number, or mend the labels"
            )
        if len(labels) < least:
            raise DataError(f"there are images of {len(labels)} class alone: name data of {least} or more")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load training images, shuffled anew in each epoch."""
        # A DistributedSampler in one process too: its order follows from (seed, epoch) alone, so that a
        # resumed run sees the batches it would have seen.
        sampler = self._sampler(self._require(self.train_set), shuffle=True)
        return self._loader(sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load validation images in their order."""
        return self._loader(self._sampler(self._require(self.val_set), shuffle=False))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load test images in their order."""
        return self._loader(self._sampler(self._require(self.test_set), shuffle=False))

    def _require(self, part: Part | None) -> Part:
        if part is None:
            raise DataError(f"{type(self).__name__} has no data yet: call prepare_data() and setup() first")
        return part

    def _sampler(self, part: Dataset[Batch], shuffle: bool) -> "DistributedSampler[Batch]":
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DistributedSampler(part, num_replicas=world, rank=rank, shuffle=shuffle, seed=self.seed)

    def _loader(self, sampler: "DistributedSampler[Batch]", drop_last: bool = False) -> DataLoader[Batch]:
        return LateLoader(
            sampler.dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self._is_sent(sampler.dataset),
            collate_fn=_pass_through,
            # Without one of its own, every pass over a loader draws from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _is_sent(self, part: Dataset[Batch]) -> bool:
        """Tell whether batches go from the CPU's memory to a GPU's."""
        dataset = part.dataset if isinstance(part, Subset) else part
        is_held = isinstance(dataset, InMemory) and dataset.images.device.type != "cpu"
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return on_gpu and not is_held

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn bytes into normalised floats, on the device; augment while the trainer is training."""
        x_BCHW, y_B = batch
        trainer = self.trainer
        epoch = trainer.current_epoch if trainer is not None and trainer.training else None
        return self._prepare(x_BCHW, epoch), y_B

    def iterate_train(self, epoch: int, device: torch.device) -> Iterator[Tensor]:
        """Yield all training images in their order, by the batch, augmented as in an epoch."""
        train: Any = self._require(self.train_set)
        for index in torch.arange(len(train)).split(self.batch_size):
            x_BCHW, _ = train.__getitems__(index.tolist())
            yield self._prepare(x_BCHW.to(device), epoch)

    def _prepare(self, x_BCHW: Tensor, epoch: int | None) -> Tensor:
        """Turn bytes into normalised floats, augmented as in an epoch of training where one is given."""
        x_BCHW = scale_bytes(x_BCHW)
        if epoch is not None:
            for augment in self.augment:
                if hasattr(augment, "epoch"):
                    cast(Any, augment).epoch = epoch
                x_BCHW = augment(x_BCHW)
        x_BCHW = self.normalise(x_BCHW)
        if self.trainer is not None:  # Lightning has looked for floats to cast already, and found bytes
            x_BCHW = self.trainer.precision_plugin.convert_input(x_BCHW)
        return x_BCHW

    def normalise(self, x_BCHW: Tensor) -> Tensor:
        """Subtract the mean and divide by the sd, a channel each, of images in [0, 1]."""
        return (x_BCHW - _make_channels(self.mean, x_BCHW.device)) / _make_channels(self.std, x_BCHW.device)

    def sample(self, n: int, seed: int) -> Batch:
        """Draw x_BCHW and y_B of `n` training images as validation would see them, on the CPU.

        The choice depends on `seed` alone and leaves the global generator as it was.
        """
        if self.train_set is None:
            self.prepare_data()
        train = self._require(self.train_set)
        if not 1 <= n <= len(train):
            raise DataError(f"cannot sample {n} of {len(train)} training images: ask for 1 to {len(train)}")
        index = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:n]
        batch: Any = train.__getitems__(index.tolist())  # torch's types say a list, it is what the set gives
        x_BCHW, y_B = batch
        return self.normalise(scale_bytes(x_BCHW.cpu())), y_B.cpu()


class LateLoader(DataLoader[Batch]):
    """Begin to fetch when the first batch is asked for.

    A run that goes on makes its iterator before Lightning tells the sampler which epoch it is, and processes
    that fetch ahead would fetch the first epoch's batches.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(k) for k in range(len(names))]


def has_room(device: torch.device, size: int) -> bool:
    """Tell whether a GPU has room for so many bytes, with most of it left for training."""
    return device.type == "cuda" and size < ROOM * torch.cuda.mem_get_info(device)[0]


def scale_bytes(x_BCHW: Tensor) -> Tensor:
    """Scale bytes to floats in [0, 1].

    Raises:
        DataError: they are none, and may have any range.
    """
    if x_BCHW.dtype != torch.uint8:
        raise DataError(
            f"images are {x_BCHW.dtype}, not bytes: let the data give torch.uint8 from 0 to 255, or use "
            "ArrayData and say their range"
        )
    return x_BCHW.float() / 255


def _pass_through(batch: Any) -> Any:
    """Collate what is a batch already; here, where a worker process can import it."""
    return batch


@lru_cache(maxsize=16)
def _make_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Make a tensor of shape C, 1, 1, once: copying it to the device anew would make every batch wait."""
    with torch.inference_mode(False):  # the first use may be validation, a later one needs a gradient
        return torch.tensor(values, device=device)[:, None, None]
