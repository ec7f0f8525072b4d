"""Layers of torch.nn for `convert`: what a layer was before it became ours, its twin, or group normalization."""

from __future__ import annotations

from typing import Any

import torch

from batchnorm.layers.followed import FOLLOWED
from batchnorm.layers.inventory import is_frozen
from batchnorm.surgery.activations import activation_module
from batchnorm.surgery.assembly import STATISTICS, assemble, in_sequence, narrow_statistics, settings_of
from batchnorm.surgery.recognition import Family, Reading, core_class, family_of, fused_activation, titled
from batchnorm.surgery.targets import Built, Use, joined, largest_divisor

_TORCHS: dict[int | None, Any] = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}


def of_torch(reading: Reading, use: Use) -> Built | str:
    """What the layer was before it became ours; for one that was made by hand, torch.nn's twin."""
    home, origin = reading.home, reading.origin
    is_group = reading.known.family == "group"
    if not reading.known.is_ours and not is_group:
        return f"it is a {titled(core_class(reading.layer))} already"
    why_not = _why_not_torch(reading, use)
    if why_not:
        return why_not
    is_as_it_was = not home.is_ours and reading.activation == fused_activation(origin)
    if is_as_it_was or (not home.is_ours and not origin.modules):
        kind: Any = origin.layer_class
        settings = {name: reading.setting(name) for name in origin.settings}
    else:
        kind = torch.nn.SyncBatchNorm if home.family == "sync" else _TORCHS[home.rank or use.rank]
        settings = settings_of(_twin(kind, reading))
    new = assemble(reading, kind, settings, remembers=False)
    narrow_statistics(new)
    now = family_of(kind)
    keeps = reading.known.family == now
    notes = [no_longer(reading, now), "freeze() holds it as before" if is_frozen(reading.layer) else ""]
    if is_as_it_was:
        built: Built | str = Built(new, titled(kind), keeps, note=joined(notes))
    else:
        built = _with_activation(new, titled(kind), reading, keeps, notes)
    return built if isinstance(built, str) else built._replace(keeps_evaluation=not is_group)


def grouped(reading: Reading, most: int | None, use: Use) -> Built | str:
    """GroupNorm with at most that many groups; one of them makes it LayerNorm over all axes but the batch's.

    None: 32 groups (Wu & He 2018, section 3), of at least 2 channels; 16 where there may be no other axes, as groups of
    one value would come out as 0 and groups of two as -1 and 1.
    """
    channels, eps = reading.num_features, reading.eps
    if reading.setting("channel_axis", 1) != 1 or not isinstance(channels, int):
        return f"its channels are on axis {reading.setting('channel_axis')}, and GroupNorm has them on axis 1"
    if not use.is_plain:
        return "it is called with a residual or a mask, which GroupNorm does not take"
    if most is None:
        most = min(32, max(1, channels // (16 if reading.home.rank == 1 else 2)))
    groups = largest_divisor(channels, most)
    if getattr(reading.layer, "num_groups", None) == groups:
        return f"it is a GroupNorm with {groups} groups already"
    fresh = torch.nn.GroupNorm(groups, channels, eps, reading.is_affine, device="meta")
    kind: Any = FOLLOWED[torch.nn.GroupNorm] if reading.behind or reading.activation else torch.nn.GroupNorm
    new = assemble(reading, kind, settings_of(fresh))
    # On the origin they wait for the way back.
    there = [name for name in (*STATISTICS, "num_batches_tracked") if name in new._buffers]
    reading.origin.statistics = {name: new._buffers.pop(name) for name in there}
    behind: tuple[str, ...] = reading.behind
    if reading.activation is not None:
        new.activation = reading.activation  # type: ignore[assignment]
        act = reading.origin.modules.get("act") or activation_module(reading.activation)
        new._modules["act"] = act.train(reading.layer.training)
        behind = ("act",)
    note = f"set aside: {', '.join(there)}; they are no part of its state_dict" if there else ""
    what = f"torch.nn.GroupNorm, {groups} group{'s' if groups > 1 else ''} of {channels // groups} channels"
    return Built(new, ", then ".join([what, *behind]), False, keeps_evaluation=False, note=note)


def no_longer(reading: Reading, now: Family) -> str:
    """What a layer does no more, once its family is `now`."""
    lost = {
        "sync": "statistics of this rank's batch alone from now on",
        "ghost": "normalises whole batches from now on",
        "renorm": "without the correction towards the running statistics from now on",
        "decorrelated": "without whitening from now on",
        "group": "batch normalization is another function; its running statistics are those from before it was "
        "GroupNorm: recalibrate()",
    }
    return "" if reading.known.family == now else lost.get(reading.known.family, "")


def _why_not_torch(reading: Reading, use: Use) -> str:
    home = reading.home
    if home.family == "frozen" and home.is_ours:
        return "torch.nn has no layer with fixed statistics"
    if not use.is_plain:
        return "it is called with a residual or a mask, which torch.nn's layers do not take"
    if reading.setting("channel_axis", 1) != 1:
        return f"its channels are on axis {reading.setting('channel_axis')}, and torch.nn's layers have them on axis 1"
    if home.rank is None and home.family != "sync" and use.rank not in _TORCHS:
        return "it takes inputs of any rank and torch.nn has a class for each: pass an example that shows which"
    return ""


def _with_activation(
    inner: torch.nn.Module, what: str, reading: Reading, keeps_training: bool, notes: list[str]
) -> Built | str:
    """A layer of torch.nn, which fuses nothing, with what follows it in modules of their own."""
    behind = [inner._modules.pop(name) for name in reading.behind]
    if reading.activation is not None:
        behind = [activation_module(reading.activation)]
    modules = [module for module in behind if module is not None]
    if not modules:
        return Built(inner, what, keeps_training, note=joined(notes))
    if "weight" not in inner._parameters and "parametrizations" not in inner._modules:
        return "its weight is computed by a hook, which cannot go into a sequence"
    words = " -> ".join([what, *(type(module).__name__ for module in modules)])
    notes = [*notes, "its state_dict has 0. before the names now"]
    return Built(in_sequence(reading, inner, modules), f"Sequential({words})", keeps_training, note=joined(notes))


def _twin(kind: Any, reading: Reading) -> Any:
    track = reading.setting("track_running_stats", True)
    momentum = reading.setting("momentum", 0.1)
    fresh = kind(reading.num_features, reading.eps, momentum, reading.is_affine, track, device="meta")
    if kind is torch.nn.SyncBatchNorm:
        fresh.process_group = reading.setting("process_group")
    return fresh
