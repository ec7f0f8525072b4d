"""What a layer is to `convert`: its family, its activation, what it was before; or why it is left alone."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.kernels.contract import Activation
from batchnorm.layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.domain import DomainBatchNorm
from batchnorm.layers.followed import BEHIND, FOLLOWED, Followed
from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.layers.ghost import GhostBatchNorm
from batchnorm.layers.renorm import BatchRenorm
from batchnorm.layers.sync import SyncBatchNorm
from batchnorm.surgery.activations import fusable, has_hooks
from batchnorm.surgery.freezing import Held, held_class

Family: TypeAlias = Literal["batchnorm", "sync", "ghost", "renorm", "decorrelated", "frozen", "group"]
"""What a layer computes in training."""


class Known(NamedTuple):
    """A class of layers that `convert` knows."""

    family: Family
    rank: int | None
    """1, 2 or 3 as in BatchNorm1d, 2d, 3d; None takes any input."""
    is_ours: bool = False


_KNOWN: dict[type, Known] = {
    torch.nn.BatchNorm1d: Known("batchnorm", 1),
    torch.nn.BatchNorm2d: Known("batchnorm", 2),
    torch.nn.BatchNorm3d: Known("batchnorm", 3),
    torch.nn.SyncBatchNorm: Known("sync", None),
    BatchNorm: Known("batchnorm", None, True),
    BatchNorm1d: Known("batchnorm", 1, True),
    BatchNorm2d: Known("batchnorm", 2, True),
    BatchNorm3d: Known("batchnorm", 3, True),
    SyncBatchNorm: Known("sync", None, True),
    GhostBatchNorm: Known("ghost", None, True),
    BatchRenorm: Known("renorm", None, True),
    DecorrelatedBatchNorm: Known("decorrelated", None, True),
    FrozenBatchNorm: Known("frozen", None, True),
    torch.nn.GroupNorm: Known("group", None),
}
_KNOWN |= {followed: _KNOWN[plain] for plain, followed in FOLLOWED.items()}

# Known by name and home, as these libraries need not be there.
_OF_LIBRARIES: dict[tuple[str, str], Known] = {
    ("timm", "BatchNormAct2d"): Known("batchnorm", 2),
    ("timm", "SyncBatchNormAct"): Known("sync", None),
    ("timm", "FrozenBatchNormAct2d"): Known("frozen", 2),
    ("torchvision", "FrozenBatchNorm2d"): Known("frozen", 2),
    ("detectron2", "FrozenBatchNorm2d"): Known("frozen", 2),
}

SETTINGS = frozenset(
    {"num_features", "eps", "momentum", "affine", "track_running_stats", "process_group", "activation", "channel_axis"}
    | {"ghost_size", "r_max", "d_max", "group_size", "method", "num_groups", "num_channels"}
    | {"_has_warned", "_stage", "_last", "_origin"}
)
"""What constructors of known layers set. Anything else on a layer is its user's, and goes with it."""

MODULE_STATE = frozenset(vars(torch.nn.Module()))
"""What every module has: parameters, buffers, children, hooks, the mode."""

# What a subclass may define and still be the layer that it comes from.
_HARMLESS = frozenset(
    {"__module__", "__doc__", "__qualname__", "__dict__", "__weakref__", "__init__", "__repr__", "extra_repr"}
    | {"__annotations__", "__annotate_func__", "__annotations_cache__", "__constants__", "__static_attributes__"}
    | {"__firstlineno__", "__parameters__", "__orig_bases__"}
)


@dataclasses.dataclass
class Origin:
    """What a layer was before its first conversion; kept on the layer, so that copies and files have it."""

    layer_class: type
    settings: dict[str, Any]
    """Of SETTINGS, those that it had; the converted layer's own values are newer, where it has them."""
    buffers: tuple[str, ...]
    modules: dict[str, torch.nn.Module] = dataclasses.field(default_factory=dict)
    """Submodules that are fused now."""
    parameters: dict[str, torch.nn.Parameter] = dataclasses.field(default_factory=dict)
    """Of a layer that is fixed now: optimizers may hold on to them."""
    statistics: dict[str, torch.Tensor | None] = dataclasses.field(default_factory=dict)
    """The buffers of a layer that has no place for them now, as GroupNorm."""


class Reading(NamedTuple):
    """A layer that `convert` understands."""

    layer: torch.nn.Module
    known: Known
    origin: Origin
    activation: Activation | None
    """What is, or can be, fused into it."""
    behind: tuple[str, ...]
    """Submodules that take the layer's output, where they cannot be fused."""

    @property
    def home(self) -> Known:
        """The class of what it was."""
        return _known(self.origin.layer_class)[0] or self.known

    @property
    def num_features(self) -> Any:
        """Number of channels, or the sizes of several channel axes; frozen layers of other libraries do not say it."""
        features = self.setting("num_features")
        return vars(self.layer)["_buffers"]["running_mean"].numel() if features is None else features

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return float(self.setting("eps"))

    @property
    def is_affine(self) -> bool:
        """Whether it has a weight."""
        return getattr(self.layer, "weight", None) is not None

    @property
    def has_statistics(self) -> bool:
        """Whether it keeps running statistics."""
        var = "running_covariance" if self.known.family == "decorrelated" else "running_var"
        return all(getattr(self.layer, name, None) is not None for name in ("running_mean", var))

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the layer, or the one from before its conversion."""
        return vars(self.layer).get(name, self.origin.settings.get(name, default))


def is_candidate(module: torch.nn.Module) -> bool:
    """Whether the module normalises with batch statistics, or looks like it: `convert` then has to say something."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in getattr(module, "original_name", "")
    if isinstance(module, _BatchNorm | DecorrelatedBatchNorm | FrozenBatchNorm | DomainBatchNorm):
        return True
    return {"running_mean", "running_var"} <= set(module._buffers) and not isinstance(module, _InstanceNorm)


def is_group(module: torch.nn.Module) -> bool:
    """Whether `convert` made it group normalization; what others made is nothing that it knows the way back from."""
    return isinstance(module, torch.nn.GroupNorm) and "_origin" in vars(module)


def read(layer: torch.nn.Module) -> Reading | str:
    """What the layer is, or why it is left alone."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is compiled by TorchScript: convert before torch.jit.script or trace"
    if isinstance(layer, DomainBatchNorm):
        return "DomainBatchNorm has statistics for each domain, which no other layer has"
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "it does not know its number of channels yet: run one batch through the model first"
    core = core_class(layer)
    known, own = _known(core)
    if known is None:
        return (
            f"{core.__name__} has a behaviour of its own ({', '.join(own[:4])})" if own else "it is of no known class"
        )
    replaced = sorted(name for name in vars(layer) if name not in MODULE_STATE and callable(getattr(core, name, None)))
    if replaced:
        return f"{', '.join(replaced)} was replaced on this very layer"
    if getattr(layer, "_stage", None) is not None:
        return "a transaction is open"
    children = [name for name in layer._modules if name != "parametrizations"]
    is_followed = issubclass(core, Followed) or core.__module__.startswith("timm.")
    if is_followed and not set(children) <= set(BEHIND):
        return f"{core.__name__} has submodules that convert does not know ({', '.join(children)})"
    origin = vars(layer).get("_origin") or Origin(
        core,
        {name: value for name, value in vars(layer).items() if name in SETTINGS},
        tuple(layer._buffers),
    )
    if not is_followed or issubclass(core, Followed):
        activation = getattr(layer, "activation", None)
        behind = tuple(name for name in BEHIND if is_followed and name in children)
        if known.family == "group" and activation is not None:
            behind = ()  # it fuses nothing: a module stands there for the activation
        return Reading(layer, known, origin, activation, behind)
    can_fuse, activation = _fused(layer)
    if can_fuse:
        origin.modules = {name: layer._modules[name] for name in children}
    behind = () if can_fuse else tuple(name for name in BEHIND if name in children)
    return Reading(layer, known, origin, activation, behind)


def core_class(layer: torch.nn.Module) -> type:
    """The layer's class without what freeze() and parametrizations put around it."""
    kind = type(layer)
    while (inner := _inner(kind)) is not None:
        kind = inner
    return kind


def family_of(kind: type) -> Family:
    """What layers of a known class compute in training."""
    known, _ = _known(kind)
    assert known is not None
    return known.family


def titled(kind: type) -> str:
    """The name of a class, with that of its library where it is not ours."""
    library = kind.__module__.partition(".")[0]
    prefix = {"batchnorm": "", "torch": "torch.nn."}.get(library, f"{library}.")
    return prefix + kind.__name__


def dressed(old: type, new: type) -> type:
    """`new` with what freeze() and parametrizations put around the class `old`."""
    inner = _inner(old)
    if inner is None:
        return new
    if issubclass(old, Held):
        return held_class(dressed(inner, new))
    bases = (dressed(inner, new),)
    made_at_run_time = {name: value for name, value in vars(old).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{bases[0].__name__}", bases, made_at_run_time)


def fused_activation(origin: Origin) -> Activation | None:
    """The activation that the layer had as a submodule before it was converted."""
    act = origin.modules.get("act")
    return None if act is None else fusable(act)


def _inner(kind: type) -> type | None:
    if issubclass(kind, Held):
        return kind.__bases__[1]
    return kind.__bases__[0] if kind.__module__ == "torch.nn.utils.parametrize" else None


def _known(kind: type) -> tuple[Known | None, list[str]]:
    """What the class is; where it is unknown, what it defines by itself."""
    own: list[str] = []
    for one in kind.__mro__:
        found = _KNOWN.get(one) or _OF_LIBRARIES.get((one.__module__.partition(".")[0], one.__name__))
        if found is not None:
            return (None, own) if own else (found, [])
        if not one.__module__.startswith("torch.nn.modules."):
            own += sorted(set(vars(one)) - _HARMLESS)
    return None, own


def _fused(layer: torch.nn.Module) -> tuple[bool, Activation | None]:
    """Whether nothing that follows has to stay a module, and the activation that is fused then."""
    drop, act = (layer._modules.get(name) for name in BEHIND)
    for module in (drop, act):
        if module is not None and has_hooks(module):
            return False, None
    if drop is not None and type(drop) is not torch.nn.Identity:
        return False, None
    if act is None or type(act) is torch.nn.Identity:
        return True, None
    activation = fusable(act)
    return activation is not None, activation
