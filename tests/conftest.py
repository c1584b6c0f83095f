"""One thread a process (xdist runs several side by side) and the same hypothesis examples in every run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
