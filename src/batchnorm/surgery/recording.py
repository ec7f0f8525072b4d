"""What happens to which tensor while a network runs: the data flow of one forward pass, seen from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

Kind = Literal["layer", "map", "other", "output"]

# Positions of the arguments, as torch calls them.
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LINEAR = ("input", "weight", "bias")
_LAYER = ("input", "residual")
_MAPS: dict[Any, tuple[str, ...]] = {
    torch.conv1d: _CONVOLUTION,
    torch.conv2d: _CONVOLUTION,
    torch.conv3d: _CONVOLUTION,
    torch.conv_transpose1d: _TRANSPOSED,
    torch.conv_transpose2d: _TRANSPOSED,
    torch.conv_transpose3d: _TRANSPOSED,
    F.linear: _LINEAR,
}

# How many of the tensors are used for their numbers: of the others only shape, dtype or device.
_USED = {
    **dict.fromkeys(("reshape_as", "view_as", "expand_as", "type_as"), 1),
    **dict.fromkeys(("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"), 0),
}

# What gives numbers another place and leaves them as they are, for some arguments at least.
_MOVES = frozenset(
    {
        "__getitem__", "clone", "contiguous", "flatten", "movedim", "pad", "permute", "reshape", "squeeze", "swapaxes",
        "transpose", "unflatten", "unsqueeze", "view",
    }
)  # fmt: skip

# Questions about a tensor that its values have no part in.
_ABOUT = frozenset(
    {
        "__get__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "get_device", "has_names", "is_complex",
        "is_conj", "is_contiguous", "is_floating_point", "is_inference", "is_neg", "is_pinned", "is_same_size",
        "is_set_to", "is_signed", "ndimension", "nelement", "numel", "size", "storage_offset", "stride", "type",
        "untyped_storage",
    }
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Value:
    """What a tensor holds from one operation that writes it to the next."""

    shape: tuple[int, ...]
    producer: Call | None
    """None: an input of the network, a parameter, or made where nothing can be seen."""
    consumers: list[Call] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Call:
    """One operation that was carried out.

    Attributes:
        kind: "layer" for a call of a module that was asked for, "map" for a convolution, transposed convolution or
            linear map, "output" for the network's return, else "other".
        what: its name in messages.
        module: the layer; for a map, the module whose parameter its weight is, None if it is no parameter.
        arguments: by name, for maps and layers.
        inputs: every value that goes in.
        main: the one that is normalised, convolved or multiplied; None for other kinds.
        output: None where the result is no single tensor.
        again: the operation on another tensor in the place of `main`; for those of kind "other" that only move numbers.
    """

    kind: Kind
    what: str
    module: torch.nn.Module | None
    arguments: dict[str, Any]
    inputs: list[Value]
    main: Value | None = None
    output: Value | None = None
    again: Callable[[torch.Tensor], torch.Tensor] | None = None

    def value_of(self, key: str) -> Any:
        """The argument, or None."""
        return self.arguments.get(key)


@dataclasses.dataclass(eq=False)
class Recording:
    """The calls of one run, in order.

    Attributes:
        calls: all of them.
        looks_at_values: whether Python read numbers out of tensors, so that another input might go another way.
        output: what the network returned.
    """

    calls: list[Call]
    looks_at_values: bool
    output: Any
    _parameters: dict[int, Value]

    def calls_of(self, module: torch.nn.Module) -> list[Call]:
        """The calls of a layer, or those of the map whose weight is the module's."""
        return [call for call in self.calls if call.module is module]

    def uses(self, parameter: torch.Tensor) -> list[Call]:
        """Where a parameter went in."""
        value = self._parameters.get(id(parameter))
        return [] if value is None else value.consumers


def record(
    model: torch.nn.Module,
    layers: Iterable[torch.nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Recording:
    """Runs `model` once, without gradients, and writes down which operation takes what from which.

    Convolutions and linear maps are seen wherever they are called, whatever the class of the module; `layers` are seen
    as one call each. What a compiled or scripted part does inside is not seen.

    Args:
        model: the network, in the mode in which it shall run.
        layers: modules that count as one operation.
        args: for model.forward.
        kwargs: likewise.

    Returns:
        The Recording. It holds every tensor of the run for as long as it lives.
    """
    layers = list(layers)
    recorder = _Recorder(_owners(model))
    handles = []
    try:
        for layer in layers:
            # What the layer does inside is hidden from its first to its last moment: hooks of its own included.
            handles.append(layer.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True))
            handles.append(layer.register_forward_hook(recorder.leave, with_kwargs=True))
        with torch.no_grad(), recorder:
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.returned(output)
    parameters = {id(p): recorder.values[id(p)] for p in model.parameters() if id(p) in recorder.values}
    return Recording(recorder.calls, recorder.looks_at_values, output, parameters)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in tuples, lists, dicts and, on the first level, objects with attributes."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | torch.nn.Module) and not callable(leaf):
            found += [
                value for value in pytree.tree_leaves(list(vars(leaf).values())) if isinstance(value, torch.Tensor)
            ]
    return found


def _owners(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    return {
        id(weight): module for module in model.modules() if (weight := module._parameters.get("weight")) is not None
    }


class _Recorder(TorchFunctionMode):
    """Sees every call of torch's functions and methods while it is active."""

    def __init__(self, owners: dict[int, torch.nn.Module]) -> None:
        super().__init__()
        self.owners = owners
        self.calls: list[Call] = []
        self.values: dict[int, Value] = {}
        self.looks_at_values = False
        self._alive: list[Any] = []  # an id stands for a tensor only as long as the tensor lives
        self._inside: list[list[Value]] = []  # of each layer that runs now, what went in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        versions = [_version(tensor) for tensor in given]
        inputs = [self.value(tensor) for tensor in given[: _USED.get(getattr(func, "__name__", ""))]]
        result = func(*args, **kwargs)
        written = [tensor for tensor, before in zip(given, versions, strict=True) if _version(tensor) != before]
        self._note(func, args, kwargs, inputs, written, result)
        return result

    def _note(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Value], written: list[torch.Tensor], result: Any
    ) -> None:
        name = getattr(func, "__name__", str(func))
        made = tensors_in(result)
        if not made and not written:
            if name in _ABOUT or not inputs:
                return
            self.looks_at_values = True
        known = {id(value) for value in inputs}
        if inputs and made and not written and all(id(self.values.get(id(tensor))) in known for tensor in made):
            return  # the very tensor that came: dropout in evaluation, contiguous() of what is contiguous
        call = Call("other", name, None, {}, inputs)
        names = _MAPS.get(func) if _is_hashable(func) else None
        if names is not None and isinstance(result, torch.Tensor):
            call.kind = "map"
            call.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            call.module = self.owners.get(id(call.arguments["weight"]))
            call.main = self.value(call.arguments["input"])
        elif name in _MOVES and len(inputs) == 1 and args and isinstance(args[0], torch.Tensor) and not written:
            call.main = inputs[0]
            call.again = lambda tensor: func(tensor, *args[1:], **kwargs)
        self._finish(call, [*made, *written], result)

    def _finish(self, call: Call, tensors: list[torch.Tensor], result: Any) -> None:
        for value in call.inputs:
            value.consumers.append(call)
        for tensor in tensors:
            self.values[id(tensor)] = Value(tuple(tensor.shape), call)
            self._alive.append(tensor)
        if isinstance(result, torch.Tensor):
            call.output = self.values[id(result)]
        self.calls.append(call)

    def enter(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append([self.value(tensor) for tensor in tensors_in((args, kwargs))])

    def leave(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = self._inside.pop()
        if self._inside:
            return
        arguments: dict[str, Any] = {**dict(zip(_LAYER, args, strict=False)), **kwargs}
        main = arguments.get("input", next(iter(arguments.values()), None))
        main = self.value(main) if isinstance(main, torch.Tensor) and inputs else None
        self._finish(Call("layer", type(layer).__name__, layer, arguments, inputs, main), tensors_in(result), result)

    def returned(self, output: Any) -> None:
        inputs = [self.value(tensor) for tensor in tensors_in(output)]
        self._finish(Call("output", "the network's output", None, {}, inputs), [], None)

    def value(self, tensor: torch.Tensor) -> Value:
        found = self.values.get(id(tensor))
        if found is None:
            found = self.values[id(tensor)] = Value(tuple(tensor.shape), None)
            self._alive.append(tensor)
        return found


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_hashable(func: Callable[..., Any]) -> bool:
    return func.__hash__ is not None
