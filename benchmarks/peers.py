"""Who is measured on one layer, and how each computes an operation."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import Sample, per_call
from workloads import Case

import batchnorm

OPTIONAL = {"jax": ("jax",), "onnxruntime": ("onnxruntime", "onnx")}
"""Peers that are measured where these modules are installed."""

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


def absent() -> dict[str, str]:
    """Optional peers that are not installed, and the command that brings them."""
    missing = {peer: [module for module in modules if not _is_installed(module)] for peer, modules in OPTIONAL.items()}
    return {peer: f"pip install {' '.join(modules)}" for peer, modules in missing.items() if modules}


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def samplers(case: Case, names: list[str]) -> dict[str, Sample]:
    """The samplers of `names` that are installed and can compute the case, all on the same activations."""
    x, dy = case.activations(), case.activations()
    residual = case.activations() if case.operation == "bn_add_relu" else None
    torch._dynamo.reset()  # else it counts a case as the same function again, and falls back to eager after eight
    ours = _OURS[len(case.shape)], None if case.operation == "bn" else "relu"
    makers: dict[str, Callable[[], Sample | None]] = {
        "copy": lambda: _copy(x),
        "clone": lambda: lambda calls: {"forward": per_call(x.clone, calls)},
        "eager": lambda: _autograd(_TorchBlock(case), x, dy, residual),
        "compile": lambda: _autograd(_compiled(_TorchBlock(case)), x, dy, residual),
        "ours": lambda: _autograd(ours[0](case.shape[1], activation=ours[1]), x, dy, residual),
        "ours, compiled": lambda: _autograd(_compiled(ours[0](case.shape[1], activation=ours[1])), x, dy, residual),
        "onnxruntime": lambda: _onnxruntime(case, x, residual),
        "jax": lambda: _jax(case, x, dy, residual),
    }
    missing = absent()
    found = {name: makers[name]() for name in names if name not in missing}
    return {name: sampler for name, sampler in found.items() if sampler is not None}


def _compiled(block: torch.nn.Module) -> torch.nn.Module:
    # fullgraph: an error rather than a part that runs in eager mode unseen.
    compiled: torch.nn.Module = torch.compile(block, dynamic=False, fullgraph=True)  # type: ignore[assignment]
    return compiled


def _copy(x: torch.Tensor) -> Sample:
    destination = torch.empty_like(x)
    return lambda calls: {"forward": per_call(lambda: destination.copy_(x), calls)}


def _autograd(block: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor, residual: torch.Tensor | None) -> Sample:
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    wanted = [*leaves, *block.parameters()]

    def sample(calls: int) -> dict[str, float]:
        block.train()
        start = time.perf_counter()
        outputs = [block(*leaves) for _ in range(calls)]
        forward = (time.perf_counter() - start) / calls
        start = time.perf_counter()
        for y in outputs:
            torch.autograd.grad(y, wanted, dy)
        backward = (time.perf_counter() - start) / calls
        del outputs, y
        block.eval()
        with torch.inference_mode():
            inference = per_call(lambda: block(*leaves), calls)
        return {
            "forward": forward,
            "backward": backward,
            "forward+backward": forward + backward,
            "inference": inference,
        }

    return sample


def _onnxruntime(case: Case, x: torch.Tensor, residual: torch.Tensor | None) -> Sample | None:
    """Inference; the CPU's BatchNormalization knows neither bfloat16 nor channels-last."""
    if case.dtype != "float32" or case.layout != "contiguous":
        return None
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def described(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, case.shape)

    given = {"x": x.numpy()} if residual is None else {"x": x.numpy(), "residual": residual.numpy()}
    constants = dict.fromkeys(("scale", "shift", "mean", "var"), torch.ones(case.shape[1]).numpy())
    steps = [("BatchNormalization", ["x", *constants])]
    steps += [] if residual is None else [("Add", ["0", "residual"])]
    steps += [] if case.operation == "bn" else [("Relu", [str(len(steps) - 1)])]
    graph = helper.make_graph(
        [helper.make_node(name, inputs, [str(number)]) for number, (name, inputs) in enumerate(steps)],
        case.operation,
        [described(name) for name in given],
        [described(str(len(steps) - 1))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop would be in the way of whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda calls: {"inference": per_call(lambda: session.run(None, given), calls)}


def _jax(case: Case, x: torch.Tensor, dy: torch.Tensor, residual: torch.Tensor | None) -> Sample | None:
    """One jitted function a phase. It keeps nothing between two of them, so that backward is measured with forward."""
    import jax
    import jax.numpy as jnp

    axis = 1 if case.layout == "contiguous" else x.ndim - 1
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = tuple(-1 if i == axis else 1 for i in range(x.ndim))

    def array(tensor: torch.Tensor) -> Any:
        laid = tensor if axis == 1 else tensor.movedim(1, -1)
        return jnp.asarray(laid.float().numpy(), dtype=case.dtype)

    def normalise(x, mean, var, scale, shift, *residual):  # type: ignore[no-untyped-def]
        wide = x.astype(jnp.float32)
        y = (wide - mean) * jax.lax.rsqrt(var + 1e-5) * scale.reshape(shape) + shift.reshape(shape)
        y = y + residual[0].astype(jnp.float32) if residual else y
        return (y if case.operation == "bn" else jax.nn.relu(y)).astype(x.dtype)

    def training(x, scale, shift, *residual):  # type: ignore[no-untyped-def]
        wide = x.astype(jnp.float32)
        mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
        return normalise(x, mean, var, scale, shift, *residual), (mean, var)

    forward = jax.jit(training)
    whole = jax.jit(lambda dy, *args: jax.vjp(training, *args, has_aux=True)[1](dy))
    inference = jax.jit(normalise)
    x_, dy_, *rest = [array(t) for t in (x, dy, residual) if t is not None]
    affine = jnp.ones(case.shape[1]), jnp.zeros(case.shape[1])
    fixed = jnp.zeros(case.shape[1]).reshape(shape), jnp.ones(case.shape[1]).reshape(shape)
    ready = jax.block_until_ready
    return lambda calls: {
        "forward": per_call(lambda: ready(forward(x_, *affine, *rest)), calls),
        "forward+backward": per_call(lambda: ready(whole(dy_, x_, *affine, *rest)), calls),
        "inference": per_call(lambda: ready(inference(x_, *fixed, *affine, *rest)), calls),
    }
