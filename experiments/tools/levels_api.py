"""Answer requests over HTTP by LitServe: images in, classes out, by the level that is fast enough now."""

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import HTTPException
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import elastic
from elastic.errors import FileError
from elastic.levels import Runtime, make_alone

NEEDED = ("input", "mean", "std", "classes")  # of what a file says, to make its input and name its outputs


class LevelsAPI(litserve.LitAPI):  # type: ignore[misc]
    """Classify the images of a request: `{"images": [<base64 of an image file>, …]}`.

    Args:
        source: of the network, as `elastic.load` takes it.
        deadline_ms: of a request's computation; the largest level that is expected to meet it answers.
        level: the one that always answers; without it, the deadline decides.
        images: that a request usually has, to measure each level with.
    """

    def __init__(self, source: str, deadline_ms: float, level: int | None, images: int) -> None:
        super().__init__()
        self.source, self.deadline_ms, self.level, self.images = source, deadline_ms, level, images

    def setup(self, device: str) -> None:
        """Load the network and measure its levels, in the process that answers."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        network = elastic.load(self.source)
        network.reject_modules(Path(self.source))
        if missing := [name for name in NEEDED if name not in network.about]:
            raise FileError(f"{self.source} does not say its {missing[0]}: save it with that in `about`")
        self.about = network.about
        levels = network.nets if self.level is None else [network.plain(self.level)]
        channels, height, width = self.about["input"]
        self.mode = "L" if channels == 1 else "RGB"
        self.prepare = v2.Compose([v2.Resize((height, width)), v2.PILToTensor()])
        self.mean, self.std = (torch.tensor(self.about[name])[:, None, None] for name in ("mean", "std"))
        example = torch.zeros(self.images, channels, height, width)
        self.runtime = Runtime([make_alone(level, example) for level in levels], example)
        if self.level is None:
            try:
                self.runtime.within(latency_ms=self.deadline_ms)
            except elastic.ElasticError:  # not even the smallest: it is the best that there is
                self.runtime.deadline_ms, self.runtime.level = self.deadline_ms, 0

    def decode_request(self, request: Mapping[str, Any], **_: Any) -> Tensor:
        """Decode the images of a request, scaled and normalised as the network was trained."""
        try:
            images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in request["images"]]
            bytes_BCHW = torch.stack([self.prepare(image.convert(self.mode)) for image in images])
        except (KeyError, TypeError, ValueError, OSError, RuntimeError, binascii.Error) as error:
            raise HTTPException(422, "send {'images': [base64 of an image file, …]}") from error
        return (bytes_BCHW.float() / 255 - self.mean) / self.std

    def predict(self, x_BCHW: Tensor, **_: Any) -> tuple[Tensor, int]:
        """Classify images, and say by which level."""
        y_BK, level = self.runtime.answer(x_BCHW)
        return y_BK, level if self.level is None else self.level

    def encode_response(self, output: tuple[Tensor, int], **_: Any) -> dict[str, Any]:
        """Name the classes."""
        logits_BK, level = output
        labels = logits_BK.argmax(1).tolist()
        return {"labels": labels, "classes": [self.about["classes"][k] for k in labels], "level": level}
