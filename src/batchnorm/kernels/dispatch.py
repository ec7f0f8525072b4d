"""Which backend computes: "auto" takes the fastest one there is for a tensor, a name takes that one or raises.

The environment variable BATCHNORM_BACKEND ("auto", "cpu", "triton" or "reference") says so at start, `set_backend`
later.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch

from batchnorm.errors import ArgumentError
from batchnorm.kernels import reference
from batchnorm.kernels.contract import Affine, Backend, Core, DualBackend
from batchnorm.kernels.transforms import has_plain_memory, must_look_inside
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

BackendName = Literal["auto", "cpu", "triton", "reference"]

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
        ArgumentError: a backend was asked for by name and cannot take x.
    """
    if _name == "reference":
        return _reference
    if _cpu is not None and _name != "triton" and cpu.can_take(x):
        return _cpu
    if _name != "cpu" and (x.is_cuda or _name == "triton") and has_plain_memory(x):
        backend = _triton_for(x.device)
        if backend is not None:
            return backend
    if _name != "auto":
        takes = "the CPU" if _name == "cpu" else "a GPU (of the CPU under TRITON_INTERPRET=1)"
        raise ArgumentError(
            f"the {'CPU' if _name == 'cpu' else 'Triton'} backend was chosen by name, but the input is {x.dtype} on "
            f'{x.device} ({type(x).__name__}): pass a plain float tensor on {takes}, or set_backend("auto").'
        )
    return _reference


def _triton_for(device: torch.device) -> Backend | None:
    """The Triton backend, where it can compute on the device."""
    if device.type == "cuda":
        return None if why_no_triton(device) else cast(Backend, importlib.import_module(_TRITON))
    if device.type != "cpu" or _why_no_import():
        return None
    backend = importlib.import_module(_TRITON)
    return cast(Backend, backend) if backend.IS_INTERPRETED else None


_TRITON = "batchnorm.kernels.triton.backend"


@cache
def _why_no_import() -> str:
    try:
        importlib.import_module(_TRITON)  # imports Triton, which takes a while: not before it is needed
    except ImportError as error:
        return f"{error}: pip install triton"
    return ""


@cache
def why_no_triton(device: torch.device) -> str:
    """Why GPU kernels cannot run on the device; "" where they can. The first question compiles and runs one."""
    if _why_no_import():
        return _why_no_import()
    backend = importlib.import_module(_TRITON)
    values = torch.ones(2, 2, 1, device=device)
    try:
        backend.apply(values, Running(values[0, :, 0], values[0, :, 0]), Affine(None, None, 1.0, None))
    except Exception as error:  # no compiler, an old GPU, a driver that does not fit: each in Triton's own words
        return f"{type(error).__name__}: {error}"
    return ""


def backend_now(x: torch.Tensor) -> Backend:
    """`backend_for(x)`, but the reference where somebody transforms the operations."""
    return _reference if must_look_inside() else backend_for(x)


def dual_backend_for(x: torch.Tensor) -> DualBackend | None:
    """The backend that adds two normalised tensors like x up in one pass; None where none does."""
    if (x.is_cpu and _name != "triton") or not has_plain_memory(x):
        return None
    backend = backend_for(x)
    return cast(DualBackend, backend) if backend.pairs else None


def core_in_use() -> ModuleType | None:
    """The compiled core, whose whole passes `kernels.direct` calls; None where it is not there or not chosen."""
    return _core


def update_running(
    running: Running, tracked: torch.Tensor | None, batch: Moments, momentum: float | None
) -> bool | None:
    """Takes a batch into running statistics in place, where a backend does that at once; None where none does.

    See `kernels.cpu.update_running`.
    """
    mean = running.mean
    if mean.is_cuda or _name == "triton":
        if _name in ("auto", "triton") and has_plain_memory(mean) and not must_look_inside():
            backend: Any = _triton_for(mean.device)
            return None if backend is None else backend.update_running(running, tracked, batch, momentum)
        return None
    if _cpu is None or _name == "reference":
        return None
    return cpu.update_running(running, tracked, batch, momentum)


def wide_stats(x: torch.Tensor) -> Moments | None:
    """Moments of (N, C, L) `x`, summed in float64 from the first addition on, where a backend does that at once.

    See `kernels.cpu.wide_stats`.
    """
    if _cpu is None or _name in ("triton", "reference") or torch.compiler.is_compiling():
        return None
    return cpu.wide_stats(x)


def has_kernels(device_type: str) -> bool:
    """Whether tensors of a device of that type have kernels of their own; looks at no tensor, as compilers ask."""
    if device_type == "cpu":
        return _core is not None
    return device_type == "cuda" and _name in ("auto", "triton") and importlib.util.find_spec("triton") is not None


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
    if name == "triton" and _why_no_import():
        raise ArgumentError(f"the Triton backend is not there: {_why_no_import()}.")
    _name = name
    _core = core if name in ("auto", "cpu") and _cpu is not None else None


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
