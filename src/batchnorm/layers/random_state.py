"""Random generators whose states are put back: what runs a model on the side leaves no trace in them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(model: torch.nn.Module) -> Iterator[None]:
    """The states of all random generators are those from before: torch's (with the model's devices), Python's, NumPy's.

    Two passes over a shuffled DataLoader, each inside of one, see the same batches.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (loaders draw from the global one)
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
