"""Which batch normalization layers can be folded into which convolutions or linear maps, by the data flow of a run."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.surgery.inference_form import ScaleShift, channel_axis_of, scale_and_shift, why_not, why_watched
from batchnorm.surgery.linear_maps import LinearMap, fold_behind, fold_in_front, survives_rounding
from batchnorm.surgery.recording import Call, Recording, Value
from batchnorm.surgery.replace import Place


class _NotFoldableError(Exception):
    """Says why; caught in `plan`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer, and the modules whose weights take it in.

    Attributes:
        layer: its place.
        where: "behind" the maps, which the layer follows; "in front" of them.
        targets: the maps, with one call of each.
    """

    layer: Place
    where: Literal["behind", "in front"]
    targets: tuple[tuple[torch.nn.Module, Call], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be folded in one go, and why the other layers cannot."""

    steps: tuple[Step, ...]
    left: tuple[tuple[Place, str], ...]


def plan(recording: Recording, layers: list[Place], model: torch.nn.Module) -> Plan:
    """Decides for each of `layers` by what the recording shows.

    A layer goes into the maps before it if each of its calls takes the whole output of one that goes nowhere else, and
    each of their calls goes into this layer; otherwise into the maps after it, likewise, where its shift does not meet
    zero padding.
    """
    tied = _tied(model)
    steps: list[Step] = []
    left: list[tuple[Place, str]] = []
    busy: set[torch.nn.Module] = set()
    for place in layers:
        reason = why_not(place.module)
        if reason is None and not recording.calls_of(place.module):
            reason = "it is not called with this example"
        if reason is not None:
            left.append((place, reason))
            continue
        reasons = []
        for attempt in (_behind, _in_front):
            try:
                step = attempt(recording, place, tied)
            except _NotFoldableError as error:
                reasons.append(str(error))
                continue
            # One change of a map at a time: the next round sees it as it is then.
            if busy.isdisjoint(module for module, _ in step.targets):
                busy.update(module for module, _ in step.targets)
                steps.append(step)
            break
        else:
            left.append((place, "; ".join(reasons)))
    return Plan(tuple(steps), tuple(left))


def linear_map(call: Call) -> LinearMap:
    """The map that a call computed, with the weights as they are now."""
    one: Any = call.module
    groups = int(call.value_of("groups") or 1)
    return LinearMap(one.weight, one.bias, groups, call.what.startswith("conv_transpose"))


def _behind(recording: Recording, place: Place, tied: set[int]) -> Step:
    targets: dict[torch.nn.Module, Call] = {}
    for call in recording.calls_of(place.module):
        if call.main is None or call.value_of("mask") is not None:
            raise _NotFoldableError("it is called with a mask, or without a tensor")
        source, axis = _source(call.main, channel_axis_of(place.module) % len(call.main.shape))
        made = source.output
        assert made is not None
        _check_axis(axis, made, source)
        targets[_owner(source, tied)] = source
    for module, call in targets.items():
        _check_target(recording, module, call, tied)
        calls = recording.calls_of(module)
        if any(_sink(other.output) is not place.module for other in calls):
            raise _NotFoldableError(
                f"the {call.what} before it is called {len(calls)} times, not always followed by it"
            )
        _check_numbers(place.module, call, "behind")
    return Step(place, "behind", tuple(targets.items()))


def _in_front(recording: Recording, place: Place, tied: set[int]) -> Step:
    layer = place.module
    calls = recording.calls_of(layer)
    if _does_more(layer, calls):
        raise _NotFoldableError("its activation or residual stands before what follows")
    after = scale_and_shift(layer)
    targets: dict[torch.nn.Module, Call] = {}
    sources: set[int] = set()
    for call in calls:
        if call.output is None or not call.output.consumers:
            raise _NotFoldableError("nothing that could take it in comes after it")
        for value, user, axis in _users(call.output, channel_axis_of(layer) % len(call.output.shape)):
            if user.kind != "map" or user.main is not value:
                raise _NotFoldableError(f"after it comes {user.what}")
            _check_axis(axis, value, user)
            targets[_owner(user, tied)] = user
            if bool((after.shift != 0).any()):
                _check_border(user)
            sources.add(id(value))
    for module, call in targets.items():
        _check_target(recording, module, call, tied)
        if any(id(other.main) not in sources for other in recording.calls_of(module)):
            raise _NotFoldableError(f"the {call.what} after it is also called with something else")
        _check_numbers(layer, call, "in front")
    return Step(place, "in front", tuple(targets.items()))


def _source(value: Value, axis: int) -> tuple[Call, int]:
    """The map whose output a value is, moved about perhaps, and the axis on which the value's channels are there."""
    while True:
        source = value.producer
        if source is None:
            raise _NotFoldableError("nothing that could take it in stands before it: its input is the network's own")
        if len(value.consumers) != 1:
            others = sorted({other.what for other in value.consumers})
            raise _NotFoldableError(f"the output of the {source.what} before it goes elsewhere too ({_listed(others)})")
        if source.kind == "map":
            return source, axis
        axes = [one for one in range(len(source.main.shape)) if _axis_after(source, one) == axis] if source.main else []
        if not axes or source.main is None:
            raise _NotFoldableError(f"before it stands {source.what}")
        value, axis = source.main, axes[0]


def _sink(value: Value | None) -> torch.nn.Module | None:
    """The module that alone takes a value, moved about perhaps."""
    while value is not None and len(value.consumers) == 1:
        user = value.consumers[0]
        if user.kind == "layer":
            return user.module
        value = user.output if user.again is not None else None
    return None


def _users(value: Value, axis: int) -> list[tuple[Value, Call, int]]:
    """What takes a value, moved about perhaps; each with what it takes and the axis of the channels in that."""
    found = []
    for call in value.consumers:
        after = _axis_after(call, axis) if call.output is not None and call.output.consumers else None
        if after is None or call.output is None:
            found.append((value, call, axis))
        else:
            found += _users(call.output, after)
    return found


def _axis_after(call: Call, axis: int) -> int | None:
    """Where the channels are once an operation has moved a value's numbers; None if it mixes or adds to them.

    It is tried out with the channels' own numbers in the place of the value: padding with zeros, for one, shows.
    """
    if call.again is None or call.main is None:
        return None
    numbers = torch.arange(1, call.main.shape[axis] + 1)

    def laid(ndim: int, where: int) -> torch.Tensor:
        return numbers.reshape([-1 if one == where else 1 for one in range(ndim)]).float()

    try:
        moved = call.again(laid(len(call.main.shape), axis).expand(call.main.shape).contiguous())
    except Exception:  # an operation that wants more than a tensor of this shape
        return None
    sizes = enumerate(moved.shape)
    return next(
        (one for one, size in sizes if size == len(numbers) and bool((moved == laid(moved.ndim, one)).all())), None
    )


def _owner(call: Call, tied: set[int]) -> torch.nn.Module:
    """The module with the map's weight and bias."""
    module = call.module
    if module is None:
        raise _NotFoldableError(f"the weight of the {call.what} is no parameter of a module")
    if id(module.weight) in tied:
        raise _NotFoldableError(f"the {call.what}'s parameters are used elsewhere too")
    bias = call.value_of("bias")
    if "bias" not in module._parameters or module._parameters["bias"] is not bias:
        raise _NotFoldableError(f"the {call.what}'s bias is not that of its {type(module).__name__}")
    return module


def _check_target(recording: Recording, module: torch.nn.Module, call: Call, tied: set[int]) -> None:
    watched = why_watched(module)
    if watched is not None:
        raise _NotFoldableError(f"{watched}, the {call.what} beside it")
    for parameter in (module.weight, module.bias):
        if not isinstance(parameter, torch.Tensor):
            continue
        if id(parameter) in tied or any(user.module is not module for user in recording.uses(parameter)):
            raise _NotFoldableError(f"the {call.what}'s parameters are used elsewhere too")


def _check_axis(channel_axis: int, value: Value, call: Call) -> None:
    """The layer's channels must be the map's features; a batch norm over (N, L, C) as channels L is another thing."""
    rank = len(value.shape)
    if call.what == "linear":
        if channel_axis != rank - 1:
            raise _NotFoldableError(
                f"its channels are on axis {channel_axis}, the features of the linear map on {rank - 1}"
            )
    else:
        spatial = int(call.what[-2])
        if channel_axis != 1 or rank != spatial + 2:
            raise _NotFoldableError(f"its channels are not those of the {call.what}")


def _check_border(call: Call) -> None:
    """Padding with zeros comes after the shift and does not have it."""
    if call.what == "linear":
        return
    kernel = list(linear_map(call).weight.shape[2:])
    if call.what.startswith("conv_transpose"):
        if any(size != 1 for size in kernel) or _largest(call, "stride", 1) != 1 or _largest(call, "padding", 0):
            raise _NotFoldableError(f"after it comes {call.what}, where not every output has a share in its shift")
    elif call.value_of("padding") == "same":
        if any(size != 1 for size in kernel):
            raise _NotFoldableError(f"after it comes {call.what}, whose zero padding does not have its shift")
    elif call.value_of("padding") != "valid" and _largest(call, "padding", 0):
        raise _NotFoldableError(f"after it comes {call.what}, whose zero padding does not have its shift")


def _largest(call: Call, name: str, default: int) -> int:
    value = call.value_of(name)
    if value is None:
        return default
    return max(int(one) for one in value) if isinstance(value, tuple | list) else int(value)


def _check_numbers(layer: torch.nn.Module, call: Call, where: str) -> None:
    linear, after = linear_map(call), scale_and_shift(layer)
    channels = linear.out_channels if where == "behind" else linear.in_channels
    if after.scale.numel() != channels:
        raise _NotFoldableError(f"it has {after.scale.numel()} channels, the {call.what} {channels}")
    folded = (fold_behind if where == "behind" else fold_in_front)(linear, ScaleShift(*after))
    if not survives_rounding(folded, linear.weight.dtype):
        raise _NotFoldableError(f"the {call.what}'s new weights would not be finite in {linear.weight.dtype}")


def _does_more(layer: torch.nn.Module, calls: list[Call]) -> bool:
    if isinstance(layer, BatchNorm | FrozenBatchNorm):
        return layer.activation is not None or any(len(call.inputs) > 1 for call in calls)
    return any(not isinstance(child, torch.nn.Identity) for child in layer.children())


def _tied(model: torch.nn.Module) -> set[int]:
    """Parameters that stand in several modules, or several times in one."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
