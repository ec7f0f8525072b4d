"""A model lent out: whatever happens inside, it comes back with its modes, buffers and hooks as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel

from batchnorm.layers.tracing import uncompiled
from batchnorm.recalibration.statefulness import version_of


@contextmanager
def lent_in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; modes and all buffers are put back at the end, on an error too.

    Modes are set directly and not through train(), which models override, as a frozen backbone does. Compiled models
    run uncompiled, since layers are listened to for a while; DistributedDataParallel does not broadcast buffers, since
    ranks may have different numbers of batches.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), version_of(buffer))
        for module, _ in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    parallel = [module for module, _ in modes if isinstance(module, DistributedDataParallel)]
    broadcasts = [module.broadcast_buffers for module in parallel]
    try:
        for module, _ in modes:
            module.training = False
        for ddp in parallel:
            ddp.broadcast_buffers = False
        with torch.no_grad(), uncompiled():
            yield
    finally:
        for ddp, broadcast in zip(parallel, broadcasts, strict=True):
            ddp.broadcast_buffers = broadcast
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before, version in buffers:
                module._buffers[name] = buffer
                if version_of(buffer) != version or (version is None and not torch.equal(buffer, before)):
                    buffer.copy_(before)
