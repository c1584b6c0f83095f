"""Write and run torch.export's own files."""

import io
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from elastic.files.formats.interface import Format, Outputs, Run, Source
from elastic.widths.leaves import list_tensors


@torch.no_grad()
def write(source: Source, path: Path) -> None:
    """Write the network, and what is said of it as the extra file `about.json`."""
    buffer = io.BytesIO()  # by name it would insist on an ending
    about = json.dumps(dict(source.about))
    torch.export.save(source.make_program(Dim.AUTO), buffer, extra_files={"about.json": about})
    path.write_bytes(buffer.getbuffer())


def open_file(path: Path, threads: int | None = None) -> Run:
    """Open a file; it runs on torch's threads."""
    net = torch.export.load(io.BytesIO(path.read_bytes())).module()

    @torch.no_grad()
    def run(*inputs: Tensor) -> Outputs:
        return list_tensors(net(*inputs))

    return run


PT2 = Format(None, (), write, open_file, has_int8=False)
