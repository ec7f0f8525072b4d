"""`batchnorm info`: versions, and which backend computes with what."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import typer

import batchnorm
from batchnorm.errors import ArgumentError


def info() -> None:
    """Print versions, the backend in use, its instruction set, threads and caches."""
    for name, value in _facts().items():
        typer.echo(f"{name:<16} {value}")


def _facts() -> dict[str, str]:
    """What there is to say, in the order of reading."""
    import torch  # not before it is needed: the command line starts faster

    from batchnorm.kernels import dispatch

    facts = {
        "batchnorm": batchnorm.__version__,
        "torch": torch.__version__,
        "python": f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        "backend": f"{dispatch.get_backend()} (BATCHNORM_BACKEND or kernels.dispatch.set_backend chooses)",
    }
    facts["gpu kernels"] = _gpu(torch.cuda.is_available())
    try:
        core = dispatch.cpu_core()
    except ArgumentError as error:
        return {**facts, "cpu core": f"not there: {error}"}
    level2, level3 = core.caches
    limit = core.pool[0]
    return {
        **facts,
        "cpu core": "in use for tensors on the CPU" if dispatch.get_backend() != "reference" else "not in use",
        "instruction set": f"{core.instruction_set} of {', '.join(core.instruction_sets)} (BATCHNORM_CPU_ISA chooses)",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "caches": f"level 2: {level2 >> 10} KiB a core, level 3: {level3 >> 20} MiB",
        "output pool": f"{limit >> 20} MB may lie idle (BATCHNORM_POOL_MB)" if limit else "off (BATCHNORM_POOL_MB)",
        "tensors by": "DLPack's exchange API" if core.has_exchange_api else "their Python attributes (slower calls)",
    }


def _gpu(is_there: bool) -> str:
    """What computes on tensors of a GPU."""
    import torch

    from batchnorm.kernels import dispatch

    if dispatch.get_backend() in ("cpu", "reference"):
        return "not in use"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "the reference: Triton is not installed (pip install triton)"
    if not is_there:
        return f"Triton {version}; PyTorch finds no GPU"
    why = dispatch.why_no_triton(torch.device("cuda", torch.cuda.current_device()))
    name = torch.cuda.get_device_name()
    return f"the reference, as Triton {version} cannot run on {name}: {why}" if why else f"Triton {version} on {name}"
