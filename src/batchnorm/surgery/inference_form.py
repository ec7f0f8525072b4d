"""What a batch normalization layer does at inference: a scale and a shift for each channel, and what comes after."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
from torch.nn.utils import parametrize

from batchnorm.layers.domain import DomainBatchNorm
from batchnorm.surgery.activations import has_hooks
from batchnorm.surgery.recognition import is_candidate, read
from batchnorm.surgery.replace import Place, places


class ScaleShift(NamedTuple):
    """y = x * scale + shift, channel by channel."""

    scale: torch.Tensor
    """(C,), float64."""
    shift: torch.Tensor
    """(C,), float64."""


def normalizations(model: torch.nn.Module) -> list[Place]:
    """The layers that normalise with running statistics, or look like it; those of a DomainBatchNorm are one."""
    found = places(model, is_candidate)
    wholes = {part for place in found if isinstance(place.module, DomainBatchNorm) for part in place.module.modules()}
    return [place for place in found if isinstance(place.module, DomainBatchNorm) or place.module not in wholes]


def why_not(layer: torch.nn.Module) -> str | None:
    """Why the layer is no fixed scale and shift at inference, or cannot be taken for one; None if it can."""
    if hooks := why_watched(layer):
        return hooks
    reading = read(layer)
    if isinstance(reading, str):
        return reading
    if reading.known.family == "decorrelated":
        return "it whitens, which is no scale and shift of single channels"
    if getattr(layer, "running_mean", None) is None or getattr(layer, "running_var", None) is None:
        return "it keeps no running statistics and always uses the batch's"
    if isinstance(getattr(layer, "channel_axis", 1), tuple):
        return f"its channels lie on several axes, {layer.channel_axis}"
    scale, shift = scale_and_shift(layer)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "its weights or statistics are not finite"
    return None


def why_watched(module: torch.nn.Module) -> str | None:
    """Why a module cannot become another one behind its user's back: hooks, parametrizations; None if nothing is."""
    if has_hooks(module):
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
    """The submodules that take what the layer has normalised, under their old names; None if nothing happens there.

    A fused activation is no module: see `Activated`.
    """
    if all(isinstance(child, torch.nn.Identity) for child in layer.children()):
        return None
    return torch.nn.Sequential(OrderedDict(layer.named_children()))
