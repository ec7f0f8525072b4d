"""Where an activation follows a batch normalization layer in a graph, with or without an addition between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from batchnorm.kernels.contract import Activation
from batchnorm.layers.dual import dual_batch_norm
from batchnorm.surgery.activations import fusable, has_hooks

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]
ModuleAt = Callable[[str], torch.nn.Module]

_FUNCTIONS: dict[Any, Activation] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}
_METHODS: dict[str, Activation] = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class NoPatternError(Exception):
    """Says why nothing can be fused into a layer."""


class Pattern(NamedTuple):
    """A call of a layer, and what can be fused into it."""

    layer: Node
    addition: Node | None
    activation: Node
    name: Activation
    passed: tuple[Node, ...]
    """Identities between them."""


def pattern_at(layer: Node, module_at: ModuleAt, shapes: Shapes) -> Pattern:
    """What follows the call `layer` of a batch normalization layer.

    Args:
        layer: the call in its graph.
        module_at: the module for a name in the graph.
        shapes: of the values in the graph.

    Raises:
        NoPatternError: what follows is nothing that a layer can fuse, or its output goes elsewhere too.
    """
    if len(layer.args) != 1 or layer.kwargs:
        raise NoPatternError("it is called with more than its input")
    passed: list[Node] = []
    after, last = _next(layer, module_at, passed)
    if (name := _activation(after, last, module_at)) is not None:
        return Pattern(layer, None, after, name, tuple(passed))
    if not _is_addition(after):
        raise NoPatternError(f"after it comes {said(after, module_at)}")
    _check_residual(after, last, layer, shapes)
    activation, last = _next(after, module_at, passed)
    name = _activation(activation, last, module_at)
    if name is None:
        raise NoPatternError(f"after it comes an addition, then {said(activation, module_at)}")
    return Pattern(layer, after, activation, name, tuple(passed))


def fuse_in(graph: Graph, pattern: Pattern) -> None:
    """Makes one call of the pattern's calls."""
    new_args = pattern.layer.args
    if pattern.addition is not None:
        # Looked up now: what is added may have been fused since, and another node stands for it then.
        (residual,) = (one for one in pattern.addition.args if one not in (pattern.layer, *pattern.passed))
        new_args = (*new_args, residual)
    # Where the addition stood both of its sides are there, and what is added has not been written into since.
    with graph.inserting_before(pattern.addition or pattern.layer):
        new = graph.call_module(str(pattern.layer.target), new_args)
    _put(graph, new, pattern)


def fuse_both_in(graph: Graph, first: Pattern, second: Pattern) -> None:
    """Makes one call of the calls of two patterns, whose layers are added to one another."""
    assert first.addition is not None
    with graph.inserting_before(first.addition):
        layers = [graph.get_attr(str(one.layer.target)) for one in (first, second)]
        args = (layers[0], first.layer.args[0], layers[1], second.layer.args[0])
        new = graph.call_function(dual_batch_norm, args)
    _put(graph, new, first, second)


def _put(graph: Graph, new: Node, *patterns: Pattern) -> None:
    """Puts `new` into the place of what the patterns are made of."""
    patterns[0].activation.replace_all_uses_with(new)
    gone = [node for one in patterns for node in (one.activation, one.addition, *one.passed, one.layer)]
    waiting = {node for node in gone if node is not None}
    while waiting:  # the last one first: each is used by another one until then
        node = next(one for one in waiting if not one.users)
        graph.erase_node(node)
        waiting.remove(node)


def said(node: Node, module_at: ModuleAt) -> str:
    """What a node is, in a message."""
    if node.op == "call_module":
        kind = type(module_at(str(node.target)))
        is_activation = kind.__module__ == torch.nn.ReLU.__module__
        return f"{kind.__name__}, which no layer fuses" if is_activation else kind.__name__
    if node.op == "output":
        return "the end of its block"
    return getattr(node.target, "__name__", str(node.target))


def _next(node: Node, module_at: ModuleAt, passed: list[Node]) -> tuple[Node, Node]:
    """The one user of a value, and under which node it knows it; identities are passed."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            listed = ", ".join(sorted({said(user, module_at) for user in users}))
            raise NoPatternError(f"its output goes to several places ({listed})" if users else "its output is not used")
        user = users[0]
        is_identity = user.op == "call_module" and type(module_at(str(user.target))) is torch.nn.Identity
        if not is_identity or has_hooks(module_at(str(user.target))):
            return user, node
        passed.append(user)
        node = user


def _activation(node: Node, source: Node, module_at: ModuleAt) -> Activation | None:
    if node.args[:1] != (source,):
        return None
    extra: dict[int | str, Any] = dict(enumerate(node.args[1:], 1))
    extra |= {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if node.op == "call_module":
        module = module_at(str(node.target))
        return None if has_hooks(module) or extra else fusable(module)
    if node.op == "call_method":
        return None if extra else _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    if node.target is F.gelu:
        return "gelu" if extra.get("approximate", "none") == "none" and set(extra) <= {"approximate"} else None
    if node.target in (F.leaky_relu, F.leaky_relu_):
        slope = extra.get("negative_slope", extra.get(1, 0.01))
        return "leaky_relu" if slope == 0.01 else None
    if node.target in (F.relu, F.silu):  # their second argument is inplace
        return _FUNCTIONS[node.target]
    return None if extra else _FUNCTIONS.get(node.target)


def _is_addition(node: Node) -> bool:
    if node.op == "call_method":
        return (
            node.target in ("add", "add_", "__add__", "__iadd__", "__radd__")
            and len(node.args) == 2
            and not node.kwargs
        )
    return node.op == "call_function" and node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs


def _check_residual(addition: Node, value: Node, layer: Node, shapes: Shapes) -> None:
    """Raises NoPatternError where what is added to `value` cannot be a layer's residual."""
    first, second = addition.args
    other = second if first is value else first
    if not isinstance(other, Node) or other is value:
        raise NoPatternError("after it comes an addition of a number, or of itself")
    if shapes.get(other.name) != shapes.get(value.name):
        raise NoPatternError("after it comes an addition of something of another shape or dtype")
    is_inplace = addition.target is operator.iadd or addition.target in ("add_", "__iadd__")
    if is_inplace and first is other and (other.op == "placeholder" or len(other.users) > 1):
        raise NoPatternError("it is added in place to a value that goes elsewhere too")
    source = layer.args[0]
    if isinstance(source, Node) and any(_writes(user) for user in source.users if user.args[:1] == (source,)):
        raise NoPatternError("its input is written to in place by something else")


def _writes(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        (node.op != "call_module" and (name.endswith("_") and not name.endswith("__")))
        or node.target in (operator.iadd, operator.imul, operator.isub)
        or bool(node.kwargs.get("inplace"))
    )
