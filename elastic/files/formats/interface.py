"""Say what a format is: how a network is written in it, and how a file of it is run."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from elastic.errors import FileError
from elastic.widths.tracing import PassingChecks

Inputs = tuple[Tensor, ...]
Outputs = list[Tensor]
Axes = tuple[dict[int, Any], ...]  # of each input, names of dimensions
Run = Callable[..., Outputs]  # of inputs


@dataclass(frozen=True)
class Source:
    """Hold what a file is written from.

    Attributes:
        net: in evaluation mode, its tensors contiguous.
        example: one sample of each input, batch first; what is one for all samples is whole.
        has_batch: which inputs have a sample each, and so a batch axis.
        about: what the file says of the network, in plain containers.
        calibration: batches of all inputs that say which values occur, for 8 bits; without any it stays fp32.
    """

    net: nn.Module
    example: Inputs
    has_batch: Sequence[bool]
    about: Mapping[str, Any] = field(default_factory=dict)
    calibration: Sequence[Inputs] = ()

    @property
    def texts(self) -> dict[str, str]:
        """Write each entry of `about` as JSON."""
        return {name: json.dumps(value) for name, value in self.about.items()}

    def repeat_example(self, batch: int) -> Inputs:
        """Repeat the example along the batch."""
        pairs = zip(self.example, self.has_batch, strict=True)
        return tuple(x.repeat(batch, *[1] * (x.dim() - 1)) if has_batch else x for x, has_batch in pairs)

    def name_axes(self, batch_axis: Any) -> Axes:
        """Name the batch axis of each input that has one."""
        return tuple({0: batch_axis} if has_batch else {} for has_batch in self.has_batch)

    def make_program(self, batch_axis: Any, batch: int = 2) -> ExportedProgram:
        """Trace the network for any batch size; one of 1 would be taken for granted."""
        return trace(self.net, self.repeat_example(batch), self.name_axes(batch_axis))


@dataclass(frozen=True)
class Format:
    """Hold what is known of a format.

    Attributes:
        extra: of this package, that brings what it needs; None where torch is enough.
        packages: that are imported, in that case.
        write: writes a file, and perhaps others beside it.
        open: opens a file, to be run on so many threads, or as many as its runtime likes.
        has_int8: whether it can be written in 8 bits.
    """

    extra: str | None
    packages: Sequence[str]
    write: Callable[[Source, Path], None]
    open: Callable[[Path, int | None], Run]
    has_int8: bool = True

    def require(self) -> None:
        """Import what the format needs.

        Raises:
            FileError: a package is missing.
        """
        for package in self.packages:
            try:
                import_module(package)
            except ImportError as error:
                raise FileError(f"{error.name} is not installed: install the extra `{self.extra}`") from error


def trace(net: nn.Module, inputs: Inputs, axes: Axes) -> ExportedProgram:
    """Trace a network by torch.export."""
    with warnings.catch_warnings():
        # Of what kernel activation modules note of their last input.
        warnings.filterwarnings("ignore", ".*were assigned during export", UserWarning)
        with PassingChecks():  # which the file leaves out
            return torch.export.export(net, inputs, dynamic_shapes=axes)
