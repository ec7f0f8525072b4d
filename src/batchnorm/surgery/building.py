"""The new layer for each target of `convert`, or why there is none: ours here, torch.nn's in leaving.py."""

from __future__ import annotations

from typing import Any

import torch

from batchnorm.layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.followed import FOLLOWED
from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.layers.ghost import GhostBatchNorm
from batchnorm.layers.inventory import is_frozen
from batchnorm.layers.renorm import BatchRenorm
from batchnorm.layers.sync import SyncBatchNorm
from batchnorm.surgery.assembly import assemble, settings_of, widen_statistics
from batchnorm.surgery.leaving import grouped, no_longer, of_torch
from batchnorm.surgery.recognition import Reading, core_class, family_of
from batchnorm.surgery.targets import Built, Options, Target, Use, joined, largest_divisor

_OURS: dict[int | None, type[BatchNorm]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d, None: BatchNorm}


def build(reading: Reading, to: Target, options: Options, use: Use) -> Built | str:
    """The layer that `to` asks for, or why there is none; the old one stays as it is."""
    family = reading.known.family
    if family == "decorrelated" and to != "decorrelated" and not _is_diagonal(reading.layer):
        return "it whitens by covariances that it has learned, which no other layer does"
    if family == "group" and to not in ("torch", "group", "layer"):
        return 'it is group normalization, another function: to="torch" is the way back'
    if to == "batchnorm":
        return _at_home(reading, options)
    if to == "torch":
        return of_torch(reading, use)
    if family == "frozen" and to != "frozen":
        return "its statistics are fixed"
    if to in ("frozen", "decorrelated", "group", "layer"):
        if is_frozen(reading.layer):
            return "freeze() holds it: unfreeze it first"
        if not set(reading.layer._parameters) >= {"weight", "bias"} and family != "frozen":
            return "its weight or bias is parametrized, which only layers of the same kind can take over"
    if to == "frozen":
        return _frozen(reading)
    if to in ("group", "layer"):
        return grouped(reading, 1 if to == "layer" else options.num_groups, use)
    if to == "decorrelated":
        return _decorrelated(reading, options)
    return _of_family(reading, to, options)


def _at_home(reading: Reading, options: Options) -> Built | str:
    """Ours for what the layer was: where it was another library's, it goes on to compute the same, in training too."""
    home = reading.home
    if home.family == "frozen":
        return "it was made with fixed statistics" if home.is_ours else _frozen(reading)
    if home.family == "sync" and not home.is_ours:
        return _of_family(reading, "sync", options)
    return _ours(reading, _OURS[home.rank], {}, note=no_longer(reading, "batchnorm"))


def _of_family(reading: Reading, to: Target, options: Options) -> Built | str:
    own = options.given()
    if to == "sync":
        own.setdefault("process_group", reading.setting("process_group"))
        return _ours(reading, SyncBatchNorm, own, is_told=options.process_group is not None)
    if to == "ghost":
        return _ours(reading, GhostBatchNorm, own, is_told=bool(own))
    if not reading.has_statistics or reading.layer.num_batches_tracked is None:
        return "it keeps no running statistics, or no count of their batches, and the correction needs both"
    return _ours(reading, BatchRenorm, own, is_told=bool(own))


def _ours(
    reading: Reading, target: type[BatchNorm], own: dict[str, Any], *, is_told: bool = False, note: str = ""
) -> Built | str:
    layer = reading.layer
    kind: Any = FOLLOWED[target] if reading.behind else target
    if core_class(layer) is kind and not is_told:
        return f"it is a {target.__name__} already"
    if target is not BatchRenorm:
        own = {**own, "track_running_stats": reading.setting("track_running_stats", True)}
    fresh = kind(
        reading.num_features,
        reading.eps,
        reading.setting("momentum", 0.1),
        reading.is_affine,
        **own,
        **_common(reading),
    )
    new: Any = assemble(reading, kind, settings_of(fresh))
    notes = [note, "freeze() holds it as before" if is_frozen(layer) else "", widen_statistics(new)]
    if isinstance(new, BatchRenorm):
        new._last = new._state()
    keeps = not is_told and reading.known.family == family_of(kind)
    return Built(new, _said(target, reading), keeps, note=joined(notes))


def _is_diagonal(layer: Any) -> bool:
    """Whether a whitening layer scales single channels only, as long as it has not trained."""
    covariance = layer.running_covariance
    if covariance is None:
        return True
    return bool((covariance == torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))).all())


def _decorrelated(reading: Reading, options: Options) -> Built | str:
    if core_class(reading.layer) in (DecorrelatedBatchNorm, FOLLOWED[DecorrelatedBatchNorm]):
        return "it is a DecorrelatedBatchNorm already"
    channels, eps = reading.num_features, reading.eps
    if not isinstance(channels, int) or not isinstance(reading.setting("channel_axis", 1), int):
        return "its channels are on several axes"
    size = largest_divisor(channels, options.group_size or 16)
    kind: Any = FOLLOWED[DecorrelatedBatchNorm] if reading.behind else DecorrelatedBatchNorm
    keeps = reading.has_statistics
    fresh = kind(
        channels,
        eps,
        reading.setting("momentum", 0.1),
        reading.is_affine,
        keeps,
        group_size=size,
        **_common(reading),
    )
    new = assemble(reading, kind, settings_of(fresh))
    note = widen_statistics(new)
    var = new._buffers.pop("running_var")
    new._buffers["running_covariance"] = None if var is None else torch.diag_embed(var.reshape(-1, size))
    what = f"{_said(DecorrelatedBatchNorm, reading)}, groups of {size} channels"
    return Built(new, what, keeps_training=False, keeps_evaluation=keeps, note=note)


def _frozen(reading: Reading) -> Built | str:
    if core_class(reading.layer) in (FrozenBatchNorm, FOLLOWED[FrozenBatchNorm]):
        return "it is a FrozenBatchNorm already"
    if not reading.has_statistics:
        return "it keeps no running statistics and always uses the batch's"
    kind: Any = FOLLOWED[FrozenBatchNorm] if reading.behind else FrozenBatchNorm
    fresh = kind(reading.num_features, reading.eps, reading.is_affine, **_common(reading))
    new = assemble(reading, kind, settings_of(fresh))
    note = widen_statistics(new)
    return Built(new, _said(FrozenBatchNorm, reading), reading.known.family == "frozen", note=note)


def _common(reading: Reading) -> dict[str, Any]:
    axis = reading.setting("channel_axis", 1)
    return {"device": "meta", "activation": reading.activation, "channel_axis": axis}


def _said(target: type, reading: Reading) -> str:
    words = " + ".join([target.__name__, *([reading.activation] if reading.activation else [])])
    return ", then ".join([words, *reading.behind])
