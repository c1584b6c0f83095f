"""Answer requests over HTTP by LitServe: images in, classes out, by the level that is fast enough now."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import HTTPException
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import elastic
from elastic.data.decoding import convert_rgb
from elastic.errors import DataError, FileError
from elastic.levels import RefiningRuntime, Runtime, make_alone

MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
NEEDED = ("input", "mean", "std", "classes")  # of what a file says, to make its input and name its outputs


def read_levels(source: str, level: int | None) -> tuple[list[nn.Module], Mapping[str, Any]]:
    """Read the levels of a network, or one of them, and what is said of it.

    Raises:
        FileError: it has kernel activation modules, does not say what is needed, or says what it does not do.
        OptionError: there is no such level.
    """
    network = elastic.load(source)
    network.reject_modules(Path(source))
    if missing := [name for name in NEEDED if name not in network.about]:
        raise FileError(f"{source} does not say its {missing[0]}: save it with that in `about`")
    check_images(source, network.about, network.plain(level))
    return list(network.nets) if level is None else [network.plain(level)], network.about


@torch.no_grad()
def check_images(source: str, about: Mapping[str, Any], net: nn.Module) -> None:
    """Refuse a network that does not tell the classes of images as what is said of it has them.

    Raises:
        FileError: it is one.
    """
    sizes, classes = about["input"], len(about["classes"])
    if len(sizes) != 3 or sizes[0] not in [*MODES]:
        raise FileError(f"{source} takes inputs of {sizes}: name a network of images of 1 or 3 channels")
    if any(len(about[name]) not in (1, sizes[0]) for name in ("mean", "std")):
        raise FileError(f"{source} has no mean and sd for each of {sizes[0]} channels: save it with such")
    shape = getattr(net(torch.zeros(1, *sizes)), "shape", None)
    if shape != (1, classes):
        answer = "no tensor" if shape is None else f"a tensor of {tuple(shape)}"
        raise FileError(f"{source} says {classes} classes, and answers with {answer}: name a classifier")


class LevelsAPI(litserve.LitAPI):  # type: ignore[misc]
    """Classify the images of a request: `{"images": [<base64 of an image file>, …]}`.

    Args:
        source: of the network, as `elastic.load` takes it.
        deadline_ms: of a request's computation; the largest level that is expected to meet it answers.
        level: the one that always answers; without it, the deadline decides.
        images: that a request usually has, to measure each level with.
        refine: let the smallest level answer, and the largest what it is least sure of while there is time.
    """

    def __init__(
        self, source: str, deadline_ms: float, level: int | None, images: int, refine: bool = False
    ) -> None:
        super().__init__()
        self.source, self.deadline_ms, self.level, self.images = source, deadline_ms, level, images
        self.make_runtime = RefiningRuntime if refine else Runtime

    def setup(self, device: str) -> None:
        """Load the network and measure its levels, in the process that answers."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        levels, self.about = read_levels(self.source, self.level)
        channels, height, width = self.about["input"]
        self.mode = MODES[channels]
        # A square is cut out of the middle, as of images that networks are trained on.
        cut = [v2.Resize(height), v2.CenterCrop(height)] if height == width else [v2.Resize((height, width))]
        self.prepare = v2.Compose([*cut, v2.PILToTensor()])
        self.mean, self.std = (torch.tensor(self.about[name])[:, None, None] for name in ("mean", "std"))
        example = torch.zeros(self.images, channels, height, width)
        self.runtime = self.make_runtime([make_alone(level, example) for level in levels], example)
        if self.level is None:
            try:
                self.runtime.within(latency_ms=self.deadline_ms)
            except elastic.ElasticError:  # not even the smallest: it is the best that there is
                self.runtime.deadline_ms, self.runtime.level = self.deadline_ms, 0

    def decode_request(self, request: Mapping[str, Any], **_: Any) -> Tensor:
        """Decode the images of a request, scaled and normalised as the network was trained."""
        try:
            bytes_BCHW = torch.stack([self._decode(text) for text in request["images"]])
        except DataError as error:
            raise HTTPException(422, str(error)) from error
        except Exception as error:  # Pillow's decoders fail with OSError, SyntaxError, struct.error, …
            raise HTTPException(422, "send {'images': [base64 of an image file, …]}") from error
        return (bytes_BCHW.float() / 255 - self.mean) / self.std

    def _decode(self, text: str) -> Tensor:
        """Decode an image as those that networks are trained on."""
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            bytes_CHW: Tensor = self.prepare(convert_rgb(image, "an image").convert(self.mode))
        return bytes_CHW

    def predict(self, x_BCHW: Tensor, **_: Any) -> tuple[Tensor, int]:
        """Classify images, and say by which level."""
        y_BK, level = self.runtime.answer(x_BCHW)
        return y_BK, level if self.level is None else self.level

    def encode_response(self, output: tuple[Tensor, int], **_: Any) -> dict[str, Any]:
        """Name the classes."""
        logits_BK, level = output
        labels = logits_BK.argmax(1).tolist()
        return {"labels": labels, "classes": [self.about["classes"][k] for k in labels], "level": level}
