"""How layers look to torch.fx and to exporters: whole, as torch.nn's do; and how compiled models run as they are."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from batchnorm.kernels.contract import Affine
from batchnorm.kernels.reference import activate
from batchnorm.stats.running import Running


def as_one_node(layer: torch.nn.Module, input: Any, residual: Any, mask: Any) -> Any:
    """torch.fx keeps torch.nn's layers whole when it traces a network; ours stay whole the same way."""
    args = (input,) if residual is None else (input, residual)
    kwargs = {} if mask is None else {"mask": mask}
    path = input.tracer.path_of_module(layer)
    return input.tracer.create_proxy("call_module", path, args, kwargs)


def is_traced() -> bool:
    """Whether torch.jit.trace runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_exported(channel_axis: int | tuple[int, ...]) -> bool:
    """Whether an exporter or tracer looks on, and the channels are where torch's operator expects them."""
    # torch.compiler.is_exporting came with torch 2.7.
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return channel_axis == 1 and (is_exporting() or is_traced())


def as_one_operator(
    input: torch.Tensor, running: Running, affine: Affine, residual: torch.Tensor | None
) -> torch.Tensor:
    """Inference by torch's operator, which exporters, folding passes and quantizers know by name."""
    weight, bias = affine.weight, affine.bias
    if weight is not None and weight.dtype != running.mean.dtype:
        # torch takes parameters and statistics of one dtype only; ours stay float32 in a half-precision module.
        weight, bias = weight.to(running.mean.dtype), None if bias is None else bias.to(running.mean.dtype)
    z = F.batch_norm(input, running.mean, running.var, weight, bias, training=False, eps=affine.eps)
    return activate(z if residual is None else z + residual, affine.activation)


def uncompiled() -> AbstractContextManager[None]:
    """Compiled models run uncompiled inside: hooks may come and go, and nothing is compiled for one call."""
    # Importing the compiler takes seconds; where nobody has, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
