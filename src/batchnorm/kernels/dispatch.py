"""Which backend computes: "auto" takes the fastest one there is for a tensor, a name takes that one or raises.

The environment variable BATCHNORM_BACKEND ("auto", "cpu" or "reference") says so at start, `set_backend` later.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal, cast, get_args

import torch

from batchnorm.errors import ArgumentError
from batchnorm.kernels import reference
from batchnorm.kernels.contract import Backend, Core
from batchnorm.kernels.transforms import must_look_inside
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

BackendName = Literal["auto", "cpu", "reference"]

try:
    from batchnorm.kernels import _cpu as core
    from batchnorm.kernels import cpu
except ImportError as error:
    _cpu: Backend | None = None
    _is_compiled = importlib.util.find_spec("batchnorm.kernels._cpu") is not None
    _why_no_cpu = str(error) if _is_compiled else "batchnorm was installed without it, as it could not be compiled"
else:
    _cpu = cast(Backend, cpu)
    _why_no_cpu = ""

_reference = cast(Backend, reference)
_name: BackendName = "auto"
_core: ModuleType | None = None


def backend_for(x: torch.Tensor) -> Backend:
    """The backend for an input.

    Raises:
        ArgumentError: the CPU backend was asked for by name and cannot take x.
    """
    if _name == "reference" or _cpu is None:
        return _reference
    if cpu.can_take(x):
        return _cpu
    if _name == "cpu":
        raise ArgumentError(
            f"the CPU backend was chosen by name, but the input is {x.dtype} on {x.device} ({type(x).__name__}): "
            'pass a plain float tensor on the CPU, or set_backend("auto").'
        )
    return _reference


def backend_now(x: torch.Tensor) -> Backend:
    """`backend_for(x)`, but the reference where somebody transforms the operations."""
    return _reference if must_look_inside() else backend_for(x)


def core_in_use() -> ModuleType | None:
    """The compiled core, whose whole passes `kernels.direct` calls; None where it is not there or not chosen."""
    return _core


def update_running(
    running: Running, tracked: torch.Tensor | None, batch: Moments, momentum: float | None
) -> bool | None:
    """Takes a batch into running statistics in place, where a backend does that at once; None where none does.

    See `kernels.cpu.update_running`.
    """
    if _cpu is None or _name == "reference":
        return None
    return cpu.update_running(running, tracked, batch, momentum)


def wide_stats(x: torch.Tensor) -> Moments | None:
    """Moments of (N, C, L) `x`, summed in float64 from the first addition on, where a backend does that at once.

    See `kernels.cpu.wide_stats`.
    """
    if _cpu is None or _name == "reference" or torch.compiler.is_compiling():
        return None
    return cpu.wide_stats(x)


def set_backend(name: BackendName) -> None:
    """Chooses the backend of this process: "auto", or one by its name.

    Raises:
        ArgumentError: there is none of that name, or it cannot run here.
    """
    global _name, _core
    if name not in get_args(BackendName):
        raise ArgumentError(f"backend must be one of {', '.join(get_args(BackendName))}; got {name!r}.")
    if name == "cpu" and _cpu is None:
        raise ArgumentError(
            f"the CPU backend is not there ({_why_no_cpu}): install a C++17 compiler and install batchnorm again."
        )
    _name = name
    _core = None if name == "reference" or _cpu is None else core


def cpu_core() -> Core:
    """What the compiled core runs with.

    Raises:
        ArgumentError: it is not there.
    """
    if _cpu is None:
        raise ArgumentError(f"{_why_no_cpu}. Install a C++17 compiler and install batchnorm again.")
    return cpu.core()


def get_backend() -> BackendName:
    """The name that was chosen, "auto" at first."""
    return _name


set_backend(cast(BackendName, os.environ.get("BATCHNORM_BACKEND", "auto")))
