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
    steps, left, busy = [], [], set()
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
        source = call.main.producer
        if source is None:
            raise _NotFoldableError("nothing that could take it in stands before it: its input is the network's own")
        if source.kind != "map":
            raise _NotFoldableError(f"before it stands {source.what}")
        if len(call.main.consumers) != 1:
            others = sorted({other.what for other in call.main.consumers if other is not call})
            raise _NotFoldableError(f"the output of the {source.what} before it goes elsewhere too ({_listed(others)})")
        _check_axis(place.module, call.main, source)
        targets[_owner(source)] = source
    for module, call in targets.items():
        _check_target(recording, module, call, tied)
        calls = recording.calls_of(module)
        if any(other.output is None or [user.module for user in other.output.consumers] != [place.module] for other in calls):
            raise _NotFoldableError(f"the {call.what} before it is called {len(calls)} times, not always followed by it")
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
        for value, user in _users(call.output):
            if user.kind != "map" or user.main is not value:
                raise _NotFoldableError(f"after it comes {user.what}")
            _check_axis(layer, value, user)
            if bool((after.shift != 0).any()):
                _check_border(user)
            targets[_owner(user)] = user
            sources.add(id(value))
    for module, call in targets.items():
        _check_target(recording, module, call, tied)
        if any(id(other.main) not in sources for other in recording.calls_of(module)):
            raise _NotFoldableError(f"the {call.what} after it is also called with something else")
        _check_numbers(layer, call, "in front")
    return Step(place, "in front", tuple(targets.items()))


def _users(value: Value) -> list[tuple[Value, Call]]:
    """What takes a value, looking through padding that repeats the value's own numbers."""
    found = []
    for call in value.consumers:
        is_repeating = call.what == "pad" and call.value_of("mode") in ("reflect", "replicate", "circular")
        if is_repeating and call.output is not None and call.output.consumers:
            found += _users(call.output)
        else:
            found.append((value, call))
    return found


def _owner(call: Call) -> torch.nn.Module:
    """The module with the map's weight and bias."""
    module = call.module
    if module is None:
        raise _NotFoldableError(f"the weight of the {call.what} is no parameter of a module")
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


def _check_axis(layer: torch.nn.Module, value: Value, call: Call) -> None:
    """The layer's channels must be the map's features; a batch norm over (N, L, C) as channels L is another thing."""
    rank = len(value.shape)
    channel_axis = channel_axis_of(layer) % rank
    if call.what == "linear":
        if channel_axis != rank - 1:
            raise _NotFoldableError(f"its channels are on axis {channel_axis}, the features of the linear map on {rank - 1}")
    else:
        spatial = int(call.what[-2])
        if channel_axis != 1 or rank != spatial + 2:
            raise _NotFoldableError(f"its channels are not those of the {call.what}")


def _check_border(call: Call) -> None:
    """Padding with zeros comes after the shift and does not have it."""
    if call.what == "linear":
        return
    assert call.module is not None
    kernel = list(call.module.weight.shape[2:])  # type: ignore[union-attr]
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
