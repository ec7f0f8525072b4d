"""Who is measured, and how each computes an operation: functions that run once and give the seconds of each phase."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case
from timing import Sample, timed

import batchnorm

_TORCH = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
_OURS = {2: batchnorm.BatchNorm1d, 3: batchnorm.BatchNorm1d, 4: batchnorm.BatchNorm2d, 5: batchnorm.BatchNorm3d}


class _TorchBlock(torch.nn.Module):
    """What a network written with torch.nn does: in place where networks do it in place."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.bn = _TORCH[len(case.shape)](case.shape[1])
        self.operation = case.operation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self.bn(x)
        if residual is not None:
            y += residual
        return y if self.operation == "bn" else F.relu(y, inplace=True)


def samplers(case: Case, names: tuple[str, ...]) -> dict[str, Sample]:
    """The samplers of `names` that can compute the case, each on the same activations."""
    x = case.activations()
    residual = case.activations() if case.operation == "bn_add_relu" else None
    makers: dict[str, Callable[[], Sample | None]] = {
        "copy": lambda: _copy(x),
        "eager": lambda: _autograd(_TorchBlock(case), x, residual),
        "compile": lambda: _autograd(torch.compile(_TorchBlock(case)), x, residual),
        "ours": lambda: _autograd(_ours(case), x, residual),
        "onnxruntime": lambda: _onnxruntime(case, x, residual),
        "jax": lambda: _jax(case, x, residual),
    }
    found = {name: makers[name]() for name in names}
    return {name: sampler for name, sampler in found.items() if sampler is not None}


def _ours(case: Case) -> torch.nn.Module:
    return _OURS[len(case.shape)](case.shape[1], activation=None if case.operation == "bn" else "relu")


def _copy(x: torch.Tensor) -> Sample:
    destination = torch.empty_like(x)

    def sample() -> dict[str, float]:
        seconds = timed(lambda: destination.copy_(x))[1]
        return {"forward": seconds, "backward": seconds, "inference": seconds}

    return sample


def _autograd(block: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> Sample:
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual) if t is not None]
    dy = torch.randn_like(x)
    wanted = [*leaves, *block.parameters()]

    def sample() -> dict[str, float]:
        block.train()
        y, forward = timed(lambda: block(*leaves))
        backward = timed(lambda: torch.autograd.grad(y, wanted, dy))[1]  # type: ignore[arg-type]
        block.eval()
        with torch.inference_mode():
            inference = timed(lambda: block(*leaves))[1]
        return {"forward": forward, "backward": backward, "inference": inference}

    return sample


def _onnxruntime(case: Case, x: torch.Tensor, residual: torch.Tensor | None) -> Sample | None:
    if not _has("onnxruntime", "onnx") or case.dtype != torch.float32 or case.layout != "contiguous":
        return None
    import onnxruntime

    file = io.BytesIO()
    args = (x,) if residual is None else (x, residual)
    program = torch.onnx.export(_TorchBlock(case).eval(), args, dynamo=True)
    program.save(file)  # type: ignore[union-attr]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), args, strict=True)}
    return lambda: {"inference": timed(lambda: session.run(None, feed))[1]}


def _jax(case: Case, x: torch.Tensor, residual: torch.Tensor | None) -> Sample | None:
    if not _has("jax") or case.dtype != torch.float32 or case.layout != "contiguous":
        return None
    import jax
    import jax.numpy as jnp

    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    args = [jnp.asarray(t.numpy()) for t in (x, residual) if t is not None]
    scale, shift = jnp.ones(case.shape[1]), jnp.zeros(case.shape[1])

    def normalise(x, mean, var, scale, shift, *residual):  # type: ignore[no-untyped-def]
        y = (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale.reshape(shape) + shift.reshape(shape)
        y = y + residual[0] if residual else y
        return y if case.operation == "bn" else jax.nn.relu(y)

    def training(x, scale, shift, *residual):  # type: ignore[no-untyped-def]
        return normalise(x, x.mean(axes, keepdims=True), x.var(axes, keepdims=True), scale, shift, *residual)

    forward = jax.jit(training)
    backward = jax.jit(lambda dy, *args: jax.vjp(training, *args)[1](dy))
    inference = jax.jit(normalise)
    ready = jax.block_until_ready
    given = (args[0], scale, shift, *args[1:])
    fixed = jnp.zeros(shape), jnp.ones(shape)

    def sample() -> dict[str, float]:
        y, seconds = timed(lambda: ready(forward(*given)))
        return {
            "forward": seconds,
            # jax keeps nothing between two jitted calls: its backward computes the forward again.
            "forward+backward": timed(lambda: ready(backward(y, *given)))[1],
            "inference": timed(lambda: ready(inference(args[0], *fixed, scale, shift, *args[1:])))[1],
        }

    return sample


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)
