"""freeze() and unfreeze(): batch normalization layers that stay as they are while the rest of a model trains."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch

from batchnorm.layers.inventory import BatchNormalization, Layers, has_statistics, is_frozen, select


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
    """One layer in a report of `freeze` or `unfreeze`.

    Attributes:
        name: where it is in the model.
        largest_change: of any weight, bias or running statistic since it was frozen, absolute; 0.0 is the proof that
            nothing moved, bit for bit. NaN if a tensor has another shape now.
        was_trained: parameters that required gradients before freezing.
        batches: num_batches_tracked; None where the layer has none.
    """

    name: str
    largest_change: float
    was_trained: tuple[str, ...]
    batches: int | None


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left as it is."""

    name: str
    why: str


@dataclasses.dataclass(frozen=True)
class FreezeReport:
    """What `freeze` or `unfreeze` did; print it.

    Attributes:
        action: "freeze" or "unfreeze".
        layers: the layers that are frozen now, or were until now.
        skipped: the others of those that were meant.
    """

    action: str
    layers: tuple[FrozenLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def nothing_moved(self) -> bool:
        """Whether each of the layers is, bit for bit, what it was when it was frozen."""
        return all(layer.largest_change == 0 for layer in self.layers)

    def __str__(self) -> str:
        moved = [layer for layer in self.layers if layer.largest_change != 0]
        done = "frozen" if self.action == "freeze" else "unfrozen"
        lines = [f"{len(self.layers)} layers {done}, {len(self.skipped)} left alone; {len(moved)} moved while frozen"]
        lines += [f"  {layer.name}: moved by {layer.largest_change:.3g}" for layer in moved]
        lines += [f"  {layer.name}: left alone, {layer.why}" for layer in self.skipped]
        return "\n".join(lines)


def freeze(
    model: torch.nn.Module, *, layers: Layers = None, parameters: bool = True
) -> tuple[torch.nn.Module, FreezeReport]:
    """Holds batch normalization layers at inference: running statistics, gamma and beta stay as they are.

    Frozen layers normalise with their running statistics whatever train() says, and take nothing in. gamma and beta do
    not require gradients, and their `grad` is dropped, so that an optimizer that has them neither decays them nor goes
    on with its momentum. Called again, it changes nothing and reports what has moved since (loading a state_dict moves
    things): that is the proof. The model can be copied, pickled and compiled; a copy is frozen, too.

    In place, unlike other surgery: optimizers, hooks and wrappers hold on to the very modules and parameters, and a
    frozen copy beside a model that goes on training would be the trap itself.

    Args:
        model: with batch normalization layers, torch.nn's or ours.
        layers: which of them: names or modules, also of parts that contain layers. None is all.
        parameters: False leaves gamma and beta trainable and holds the statistics only.

    Returns:
        The model itself, and the report.

    Raises:
        ArgumentError: the model has no batch normalization layers, or `layers` names none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> _, report = freeze(model)
        >>> model.train()[1].training, model[1].weight.requires_grad
        (False, False)
        >>> _ = model(torch.randn(4, 2))
        >>> _, report = unfreeze(model)
        >>> report.nothing_moved, model[1].training
        (True, True)
    """
    skipped = []
    held: dict[str, BatchNormalization] = {}
    before: dict[str, _Before] = {}
    for name, layer in select(model, layers).items():
        if is_frozen(layer):
            held[name] = layer
        elif has_statistics(layer):
            held[name], before[name] = layer, _before(layer, parameters=parameters)
        else:
            skipped.append(SkippedLayer(name, "it keeps no running statistics and always uses the batch's"))
    for name, then in before.items():  # all were looked at before: domains share weight and bias
        _hold(held[name], then)
    report = FreezeReport("freeze", tuple(_report(name, layer) for name, layer in held.items()), tuple(skipped))
    return model, report


def unfreeze(model: torch.nn.Module, *, layers: Layers = None) -> tuple[torch.nn.Module, FreezeReport]:
    """Gives frozen layers back every setting that they had; in place.

    requires_grad of gamma and beta is what it was. The mode is the one in which the layer would be if it had never been
    frozen: that of the last train() or eval(), or the old one where none came.

    Args:
        model: with layers that `freeze` holds; others are left alone.
        layers: which of them, as in `freeze`. None is all.

    Returns:
        The model itself, and the report, which says whether anything moved since `freeze`.

    Raises:
        ArgumentError: the model has no batch normalization layers, or `layers` names none.
    """
    done = []
    skipped = []
    for name, layer in select(model, layers).items():
        if not is_frozen(layer) or not hasattr(layer, "_before_freezing"):
            skipped.append(SkippedLayer(name, "it was not frozen"))
            continue
        done.append(_report(name, layer))
        _release(layer)
    return model, FreezeReport("unfreeze", tuple(done), tuple(skipped))


@dataclasses.dataclass
class _Before:
    """What a layer was before it was frozen, kept on the layer, so that copies and files have it."""

    training: bool
    requires_grad: dict[str, bool]
    tensors: dict[str, torch.Tensor]


class Held:
    """Mixed into a frozen layer's class: train() is remembered, and evaluation mode stays."""

    is_frozen = True
    training: bool
    _before_freezing: _Before

    def train(self, mode: bool = True) -> Any:
        """Remembers the mode for unfreeze()."""
        self._before_freezing.training = mode
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle and deepcopy find the class by its name; this one is made at run time.
        state = getattr(self, "__getstate__", lambda: self.__dict__)()
        return _rebuilt, (type(self).__bases__[1],), state

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        return f"{super().extra_repr()}, frozen"  # type: ignore[misc]


@cache
def held_class(layer_class: Any) -> type[BatchNormalization]:
    """The class of a frozen layer whose class was `layer_class`, which is the second of its bases."""
    # The old name and module: torch.fx and exporters recognise torch.nn's layers by them.
    members = {"__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (Held, layer_class), members)


def _rebuilt(layer_class: Any) -> BatchNormalization:
    held = held_class(layer_class)
    return held.__new__(held)


def _before(layer: BatchNormalization, *, parameters: bool) -> _Before:
    own = dict(layer.named_parameters(recurse=False)) if parameters else {}
    tensors = {**own, **dict(layer.named_buffers(recurse=False))}
    return _Before(
        training=layer.training,
        requires_grad={name: parameter.requires_grad for name, parameter in own.items()},
        tensors={name: value.detach().cpu().clone() for name, value in tensors.items()},
    )


def _hold(layer: BatchNormalization, before: _Before) -> None:
    for name in before.requires_grad:
        parameter = layer.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.grad = None
    layer.training = False
    layer._before_freezing = before  # type: ignore[assignment]
    own_class: Any = type(layer)
    layer.__class__ = held_class(own_class)


def _release(layer: BatchNormalization) -> None:
    before: Any = layer._before_freezing
    layer.__class__ = type(layer).__bases__[1]
    layer.training = before.training
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad_(before.requires_grad.get(name, parameter.requires_grad))
    del layer._before_freezing


def _report(name: str, layer: BatchNormalization) -> FrozenLayer:
    before: Any = getattr(layer, "_before_freezing", None) or _Before(False, {}, {})
    changes = [_change(then, getattr(layer, key)) for key, then in before.tensors.items()]
    batches = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    trained = tuple(key for key, wanted in before.requires_grad.items() if wanted)
    return FrozenLayer(name, max(changes, default=0.0), trained, batches)


def _change(then: torch.Tensor, now: torch.Tensor) -> float:
    if then.shape != now.shape:
        return float("nan")
    if not then.numel():
        return 0.0
    old, new = then.double(), now.detach().cpu().double()
    is_same = (old == new) | (old.isnan() & new.isnan())
    return float((new - old).abs().masked_fill(is_same, 0).max())
