"""The new layer for each target of `convert`, or why there is none."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.followed import FOLLOWED
from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.layers.ghost import GhostBatchNorm
from batchnorm.layers.inventory import is_frozen
from batchnorm.layers.renorm import BatchRenorm, Schedule
from batchnorm.layers.sync import SyncBatchNorm
from batchnorm.surgery.activations import activation_module
from batchnorm.surgery.assembly import (
    STATISTICS,
    assemble,
    in_sequence,
    narrow_statistics,
    settings_of,
    widen_statistics,
)
from batchnorm.surgery.recognition import Reading, core_class, fused_activation, titled

Target: TypeAlias = Literal["batchnorm", "torch", "sync", "ghost", "renorm", "decorrelated", "frozen", "group", "layer"]

_OURS: dict[int | None, type[BatchNorm]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d, None: BatchNorm}
_TORCHS: dict[int | None, Any] = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a target can be told; None leaves it to the target."""

    process_group: Any = None
    ghost_size: int | None = None
    r_max: Schedule | None = None
    d_max: Schedule | None = None
    group_size: int | None = None
    num_groups: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def check(self, to: Target) -> None:
        """Raises ArgumentError where `to` is unknown, or an option does not go with it or is out of its range."""
        if to not in get_args(Target):
            raise ArgumentError(f"to must be one of {', '.join(get_args(Target))}; got {to!r}.")
        for name, value in self.given().items():
            if _TARGET_OF[name] != to:
                raise ArgumentError(f"{name} goes with to={_TARGET_OF[name]!r} only, got to={to!r}.")
            if isinstance(value, int) and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}.")


_TARGET_OF: dict[str, Target] = {
    "process_group": "sync",
    "ghost_size": "ghost",
    "r_max": "renorm",
    "d_max": "renorm",
    "group_size": "decorrelated",
    "num_groups": "group",
}


class Built(NamedTuple):
    """A layer that can take the old one's place."""

    module: torch.nn.Module
    what: str
    """What it is, in words."""
    keeps_training: bool
    """Whether it computes in training what the old one did."""
    keeps_evaluation: bool = True
    note: str = ""


class Use(NamedTuple):
    """How a layer is called."""

    rank: int | None
    """Axes of its input besides batch and channels, 1 at least; None where it was not seen."""
    is_plain: bool
    """Whether with an input alone: no residual, no mask."""


def build(reading: Reading, to: Target, options: Options, use: Use) -> Built | str:
    """The layer that `to` asks for, or why there is none; the old one stays as it is."""
    family = reading.known.family
    if family == "decorrelated" and to != "decorrelated":
        return "no other layer whitens"
    if to == "batchnorm":
        return _at_home(reading, options)
    if to == "torch":
        return _of_torch(reading, use)
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
        return _grouped(reading, 1 if to == "layer" else options.num_groups, use)
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
    return _ours(reading, _OURS[home.rank], {}, note=_no_longer(reading))


def _of_family(reading: Reading, to: Target, options: Options) -> Built | str:
    own = options.given()
    if to == "sync":
        own.setdefault("process_group", reading.setting("process_group"))
        return _ours(reading, SyncBatchNorm, own, is_told=options.process_group is not None)
    if to == "ghost":
        return _ours(reading, GhostBatchNorm, own, is_told=bool(own))
    if not _has_statistics(reading) or reading.layer.num_batches_tracked is None:
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
    fresh = kind(*_shape(reading), reading.setting("momentum", 0.1), _is_affine(reading), **own, **_common(reading))
    new: Any = assemble(reading, kind, settings_of(fresh))
    notes = [note, "freeze() holds it as before" if is_frozen(layer) else "", widen_statistics(new)]
    if isinstance(new, BatchRenorm):
        new._last = new._state()
    keeps = not is_told and reading.known.family == _family(target)
    return Built(new, _said(target, reading), keeps, note=_joined(notes))


def _decorrelated(reading: Reading, options: Options) -> Built | str:
    if core_class(reading.layer) in (DecorrelatedBatchNorm, FOLLOWED[DecorrelatedBatchNorm]):
        return "it is a DecorrelatedBatchNorm already"
    channels, eps = _shape(reading)
    if not isinstance(channels, int) or not isinstance(reading.setting("channel_axis", 1), int):
        return "its channels are on several axes"
    size = _largest_divisor(channels, options.group_size or 16)
    kind: Any = FOLLOWED[DecorrelatedBatchNorm] if reading.behind else DecorrelatedBatchNorm
    keeps = _has_statistics(reading)
    fresh = kind(
        channels,
        eps,
        reading.setting("momentum", 0.1),
        _is_affine(reading),
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
    if not _has_statistics(reading):
        return "it keeps no running statistics and always uses the batch's"
    kind: Any = FOLLOWED[FrozenBatchNorm] if reading.behind else FrozenBatchNorm
    fresh = kind(*_shape(reading), _is_affine(reading), **_common(reading))
    new = assemble(reading, kind, settings_of(fresh))
    note = widen_statistics(new)
    return Built(new, _said(FrozenBatchNorm, reading), reading.known.family == "frozen", note=note)


def _of_torch(reading: Reading, use: Use) -> Built | str:
    """What the layer was before it became ours; for one that was made by hand, torch.nn's twin."""
    home, origin = reading.home, reading.origin
    if not reading.known.is_ours:
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
    keeps = reading.known.family == home.family
    notes = [_no_longer(reading), "freeze() holds it as before" if is_frozen(reading.layer) else ""]
    if is_as_it_was:
        return Built(new, titled(kind), keeps, note=_joined(notes))
    return _with_activation(new, titled(kind), reading, keeps, notes)


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


def _grouped(reading: Reading, most: int | None, use: Use) -> Built | str:
    """GroupNorm with at most that many groups; one of them makes it LayerNorm over all axes but the batch's.

    None: 32 groups (Wu & He 2018, section 3), of at least 2 channels; 16 where there may be no other axes, as groups of
    one value would come out as 0 and groups of two as -1 and 1.
    """
    channels, eps = _shape(reading)
    if reading.setting("channel_axis", 1) != 1 or not isinstance(channels, int):
        return f"its channels are on axis {reading.setting('channel_axis')}, and GroupNorm has them on axis 1"
    if not use.is_plain:
        return "it is called with a residual or a mask, which GroupNorm does not take"
    if most is None:
        most = min(32, max(1, channels // (16 if reading.home.rank == 1 else 2)))
    groups = _largest_divisor(channels, most)
    fresh = torch.nn.GroupNorm(groups, channels, eps, _is_affine(reading), device="meta")
    new = assemble(reading, torch.nn.GroupNorm, settings_of(fresh), remembers=False)
    dropped = [name for name in (*STATISTICS, "num_batches_tracked") if new._buffers.pop(name, None) is not None]
    note = f"dropped: {', '.join(dropped)}" if dropped else ""
    what = f"torch.nn.GroupNorm, {groups} group{'s' if groups > 1 else ''} of {channels // groups} channels"
    built = _with_activation(new, what, reading, False, [note])
    return built if isinstance(built, str) else built._replace(keeps_evaluation=False)


def _with_activation(
    inner: torch.nn.Module, what: str, reading: Reading, keeps_training: bool, notes: list[str]
) -> Built | str:
    """A layer of torch.nn, which fuses nothing, with what follows it in modules of their own."""
    behind = [inner._modules.pop(name) for name in reading.behind]
    if reading.activation is not None:
        behind = [activation_module(reading.activation)]
    modules = [module for module in behind if module is not None]
    if not modules:
        return Built(inner, what, keeps_training, note=_joined(notes))
    if "weight" not in inner._parameters and "parametrizations" not in inner._modules:
        return "its weight is computed by a hook, which cannot go into a sequence"
    words = " -> ".join([what, *(type(module).__name__ for module in modules)])
    notes = [*notes, "its state_dict has 0. before the names now"]
    return Built(in_sequence(reading, inner, modules), f"Sequential({words})", keeps_training, note=_joined(notes))


def _twin(kind: Any, reading: Reading) -> torch.nn.Module:
    track = reading.setting("track_running_stats", True)
    fresh = kind(*_shape(reading), reading.setting("momentum", 0.1), _is_affine(reading), track, device="meta")
    if kind is torch.nn.SyncBatchNorm:
        fresh.process_group = reading.setting("process_group")
    assert isinstance(fresh, torch.nn.Module)
    return fresh


def _no_longer(reading: Reading) -> str:
    """What a layer of our family does no more, once it is plain batch normalization."""
    lost = {
        "sync": "statistics of this rank's batch alone from now on",
        "ghost": "normalises whole batches from now on",
        "renorm": "without the correction towards the running statistics from now on",
    }
    return "" if reading.home.family == reading.known.family else lost.get(reading.known.family, "")


def _family(target: type) -> str:
    if issubclass(target, SyncBatchNorm):
        return "sync"
    if issubclass(target, GhostBatchNorm):
        return "ghost"
    return "renorm" if issubclass(target, BatchRenorm) else "batchnorm"


def _shape(reading: Reading) -> tuple[int | tuple[int, ...], float]:
    """num_features and eps."""
    features = reading.setting("num_features")
    return (int(reading.layer.running_mean.numel()) if features is None else features), reading.setting("eps")  # type: ignore[operator, union-attr]


def _common(reading: Reading) -> dict[str, Any]:
    axis = reading.setting("channel_axis", 1)
    return {"device": "meta", "activation": reading.activation, "channel_axis": axis}


def _is_affine(reading: Reading) -> bool:
    return getattr(reading.layer, "weight", None) is not None


def _has_statistics(reading: Reading) -> bool:
    return all(getattr(reading.layer, name, None) is not None for name in STATISTICS)


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def _said(target: type, reading: Reading) -> str:
    words = " + ".join([target.__name__, *([reading.activation] if reading.activation else [])])
    return ", then ".join([words, *reading.behind])


def _joined(notes: list[str]) -> str:
    return "; ".join(note for note in notes if note)
