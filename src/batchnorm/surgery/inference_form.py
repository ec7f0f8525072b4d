"""What a batch normalization layer does at inference: a scale and a shift for each channel, and what comes after them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.domain import DomainBatchNorm
from batchnorm.layers.frozen import FrozenBatchNorm


class ScaleShift(NamedTuple):
    """y = x * scale + shift, channel by channel."""

    scale: torch.Tensor
    """(C,), float64."""
    shift: torch.Tensor
    """(C,), float64."""


def is_normalization(module: torch.nn.Module) -> bool:
    """Whether it is a batch normalization layer: torch.nn's, ours, or one with fixed statistics of another library."""
    if isinstance(module, _BatchNorm | FrozenBatchNorm):
        # A DomainBatchNorm counts as its domains' layers, which are called one by one.
        return not isinstance(module, DomainBatchNorm)
    return type(module).__name__ in _FOREIGN


def why_not(layer: torch.nn.Module) -> str | None:
    """Why the layer is no fixed scale and shift at inference, or cannot be taken for one; None if it can."""
    if hooks := why_watched(layer):
        return hooks
    if not _is_known(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if getattr(layer, "running_mean", None) is None or getattr(layer, "running_var", None) is None:
        return "it keeps no running statistics and always uses the batch's"
    if isinstance(layer, BatchNorm | FrozenBatchNorm) and isinstance(layer.channel_axis, tuple):
        return f"its channels lie on several axes, {layer.channel_axis}"
    scale, shift = scale_and_shift(layer)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "its weights or statistics are not finite"
    return None


def why_watched(module: torch.nn.Module) -> str | None:
    """Why a module cannot become another one behind its user's back: hooks, parametrizations; None if nothing is."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, table, None) for table in tables):
        return f"{type(module).__name__} has hooks"
    if parametrize.is_parametrized(module):
        return f"{type(module).__name__} is parametrized"
    return None


def scale_and_shift(layer: torch.nn.Module) -> ScaleShift:
    """The map that the layer is at inference, in float64.

    scale = weight / sqrt(running_var + eps); shift = bias - running_mean * scale.
    """
    one: Any = layer
    mean, var = one.running_mean.detach().double(), one.running_var.detach().double()
    weight, bias = getattr(one, "weight", None), getattr(one, "bias", None)
    scale = torch.rsqrt(var + float(one.eps))
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    return ScaleShift(scale, shift)


def channel_axis_of(layer: torch.nn.Module) -> int:
    """The axis of the channels."""
    return cast(int, getattr(layer, "channel_axis", 1))


def after_it(layer: torch.nn.Module) -> torch.nn.Module | None:
    """What the layer does after scale and shift, as modules under their old names; None if nothing.

    Our own layers' activation and residual are no modules: see `Activated`.
    """
    children = {name: child for name, child in layer.named_children() if not isinstance(child, torch.nn.Identity)}
    if not children:
        return None
    return torch.nn.Sequential(dict(layer.named_children()))  # type: ignore[arg-type]


# Of other libraries: the names of the modules that follow the normalization, in order.
_FOREIGN: dict[str, tuple[str, ...]] = {
    "BatchNormAct2d": ("drop", "act"),  # timm
    "SyncBatchNormAct": ("drop", "act"),
    "FrozenBatchNormAct2d": ("drop", "act"),
    "FrozenBatchNorm2d": (),  # torchvision, detectron2: buffers of torch.nn's names
}


def _is_known(layer: torch.nn.Module) -> bool:
    kind = type(layer)
    if kind.__name__ in _FOREIGN:
        return tuple(name for name, _ in layer.named_children()) == _FOREIGN[kind.__name__]
    forward = kind.forward
    known = [torch.nn.SyncBatchNorm.forward, _BatchNorm.forward, FrozenBatchNorm.forward]
    if isinstance(layer, BatchNorm):
        # At inference every member of the family does what BatchNorm does, unless its forward says otherwise.
        known.append(BatchNorm.forward)
    return forward in known
