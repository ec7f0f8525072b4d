"""A new module out of the old one's own parts: the very parameters, buffers and hooks, in another class."""

from __future__ import annotations

from typing import Any

import torch

from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.layers.precision import widened
from batchnorm.surgery.recognition import MODULE_STATE, SETTINGS, Reading, dressed

STATISTICS = ("running_mean", "running_var")
_AFFINE = ("weight", "bias")
_HALF = (torch.float16, torch.bfloat16)
_PARTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OWN_HOOKS = MODULE_STATE - {*_PARTS, "training"}


def assemble(reading: Reading, kind: type, settings: dict[str, Any], *, remembers: bool = True) -> torch.nn.Module:
    """A module of class `kind` with these settings and all that the layer holds; the layer stays as it is.

    What freeze() and parametrizations put around the layer's class is put around `kind`, too. Submodules that are fused
    wait in the origin, until the layer is again what it was.

    Args:
        reading: the old layer.
        kind: a class of normalization, torch.nn's, ours or another library's.
        settings: attributes that its constructor would set.
        remembers: whether the new layer keeps its origin, unless it is that.
    """
    layer, origin = reading.layer, reading.origin
    state = {**settings, **{key: value for key, value in vars(layer).items() if _is_carried(key)}}
    state |= {part: type(state[part])(state[part]) for part in _PARTS}
    if reading.known.family == "group" and reading.activation is not None:
        del state["_modules"]["act"]
    _restore_statistics(state, reading)
    if kind is origin.layer_class:
        state["_modules"] |= origin.modules
        for module in (inner for one in origin.modules.values() for inner in one.modules()):
            module.training = layer.training
    else:
        for name in origin.modules:
            state["_modules"].pop(name, None)
        if remembers:
            state["_origin"] = origin
    if issubclass(kind, FrozenBatchNorm):
        _fix(state, reading)
    elif reading.known.family == "frozen":
        _restore_fixed(state, reading)
    new: torch.nn.Module = object.__new__(dressed(type(layer), kind))
    new.__dict__ = state
    return new


def settings_of(fresh: torch.nn.Module) -> dict[str, Any]:
    """What a constructor set, of a module that was made for that."""
    return {name: value for name, value in vars(fresh).items() if name not in MODULE_STATE}


def widen_statistics(module: torch.nn.Module) -> str:
    """Statistics of half precision become float32, which our layers keep them in; returns what to say about it."""
    buffers = module._buffers
    before = {name: buffers.get(name) for name in STATISTICS}
    buffers |= {name: widened(value) for name, value in before.items() if value is not None}
    is_same = all(buffers.get(name) is value for name, value in before.items())
    return "" if is_same else "its running statistics are float32 now"


def narrow_statistics(module: torch.nn.Module) -> None:
    """Statistics take the dtype of a weight of half precision, as torch.nn's layers need it."""
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dtype in _HALF:
        for name in STATISTICS:
            if (value := module._buffers.get(name)) is not None:
                module._buffers[name] = value.to(weight.dtype)


def in_sequence(reading: Reading, inner: torch.nn.Module, behind: list[torch.nn.Module]) -> torch.nn.Module:
    """`inner` and what comes behind it as one module, on which the layer's hooks are: they see the same output."""
    whole = torch.nn.Sequential(inner, *behind)
    for module in (whole, *(part for one in behind for part in one.modules())):
        module.training = reading.layer.training
    fresh = vars(torch.nn.Module())
    for name in _OWN_HOOKS:
        whole.__dict__[name] = vars(reading.layer)[name]
        inner.__dict__[name] = fresh[name]
    return whole


def _is_carried(name: str) -> bool:
    """Whether an attribute is a part of every module, or its user's: all but the settings of a known class."""
    return name in MODULE_STATE or name not in SETTINGS


def _restore_statistics(state: dict[str, Any], reading: Reading) -> None:
    """Running mean and variance, from what whitening and group normalization have in their place."""
    buffers = state["_buffers"]
    if reading.known.family == "decorrelated":
        covariance = buffers.pop("running_covariance")
        buffers["running_var"] = None if covariance is None else covariance.diagonal(dim1=-2, dim2=-1).flatten()
    elif reading.known.family == "group":
        buffers |= {name: _moved(value, reading) for name, value in reading.origin.statistics.items()}
    else:
        return
    first = {name: buffers.pop(name) for name in (*STATISTICS, "num_batches_tracked") if name in buffers}
    state["_buffers"] = first | buffers


def _moved(value: torch.Tensor | None, reading: Reading) -> torch.Tensor | None:
    """To where the layer is by now, and to its precision; half precision is for those that want it."""
    weight = reading.layer.weight
    if value is None or not isinstance(weight, torch.Tensor):
        return value
    changes = value.is_floating_point() and weight.dtype in (torch.float32, torch.float64)
    return value.to(weight.device, weight.dtype if changes else value.dtype)


def _fix(state: dict[str, Any], reading: Reading) -> None:
    """Parameters become buffers, copies; the origin keeps the very ones, as optimizers may hold on to them."""
    parameters, buffers = state["_parameters"], state["_buffers"]
    for name in _AFFINE:
        if name not in parameters:
            continue
        parameter = parameters.pop(name)
        if parameter is not None:
            reading.origin.parameters[name] = parameter
        buffers[name] = None if parameter is None else parameter.detach().clone()
    state["_buffers"] = {
        name: buffers.pop(name, None) for name in (*_AFFINE, *STATISTICS, "num_batches_tracked")
    } | buffers


def _restore_fixed(state: dict[str, Any], reading: Reading) -> None:
    """The reverse of `_fix`: the parameters of before take the values that the layer has now."""
    if reading.home.family == "frozen":  # another library's, which never had any
        state["_buffers"] = {name: value for name, value in state["_buffers"].items() if name in reading.origin.buffers}
        return
    for name in _AFFINE:
        values = state["_buffers"].pop(name)
        parameter = reading.origin.parameters.get(name)
        if values is not None and parameter is None:
            parameter = torch.nn.Parameter(values.clone())
        elif values is not None and parameter is not None:
            parameter.data = values.clone()
        state["_parameters"][name] = parameter
