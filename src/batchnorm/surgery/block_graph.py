"""The data flow of one module's own forward, its children taken as they are: what torch.fx sees, block by block."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer

from batchnorm.layers.random_state import random_state_kept
from batchnorm.layers.tracing import uncompiled
from batchnorm.surgery.activations import has_hooks


class Seen(NamedTuple):
    """What a run on the example shows of a module."""

    calls: int
    args: tuple[Any, ...]
    """Of its first call."""
    kwargs: dict[str, Any]


class NotTraceableError(Exception):
    """Says why a module's forward has no one data flow."""


@contextmanager
def in_mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """The modules are in this mode for a while, also those whose train() has a say in it, as that of frozen layers."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def observe(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[torch.nn.Module, Seen]:
    """Runs the model once in evaluation, without gradients: which modules are called how often, with what at first."""
    seen: dict[torch.nn.Module, Seen] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        old = seen.get(module)
        if old is None:  # lists and dicts of its own: networks go on with theirs
            args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
        seen[module] = Seen(1, args, kwargs) if old is None else old._replace(calls=old.calls + 1)

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with in_mode(model, False), random_state_kept(model), uncompiled(), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_plain_sequence(module: torch.nn.Module) -> bool:
    """Whether its forward is that of torch.nn.Sequential: one child after the other."""
    return isinstance(module, torch.nn.Sequential) and type(module).forward is torch.nn.Sequential.forward


def graph_of(block: torch.nn.Module, seen: Seen, looked_into: Collection[torch.nn.Module]) -> Graph:
    """The graph of the block's forward, the same in training and evaluation.

    Args:
        block: the module; a GraphModule's own graph is copied.
        seen: how it is called. Arguments that are None then stay None.
        looked_into: children whose own children shall stand in the graph, too.

    Raises:
        NotTraceableError: control flow depends on values, or on the mode; or what torch.fx cannot follow.
    """
    if isinstance(block, GraphModule):
        graph = Graph()
        output = graph.graph_copy(block.graph, {})
        graph.output(output)
        return graph
    fixed = _fixed_arguments(block, seen)
    graphs = []
    try:
        for mode in (True, False):
            with in_mode(block, mode):
                graphs.append(
                    _with_own_signature(_Tracer(looked_into).trace(block, concrete_args=fixed or None), block)
                )
    except Exception as error:  # torch.fx raises whatever the module's code makes of its proxies
        first = next(iter(str(error).strip().splitlines()), "")
        raise NotTraceableError(
            f"{type(block).__name__}.forward cannot be traced: {first or type(error).__name__}"
        ) from error
    if _text(graphs[0]) != _text(graphs[1]):
        raise NotTraceableError(f"{type(block).__name__}.forward does something else in training than in evaluation")
    return graphs[1]


def shapes_in(graph: Graph, block: torch.nn.Module, seen: Seen) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in the graph, by the name of its node, on the block's first input.

    Raises:
        NotTraceableError: the graph does not run on it.
    """
    found: dict[str, tuple[torch.Size, torch.dtype]] = {}

    class _Shapes(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                found[n.name] = value.shape, value.dtype
            return value

    inputs = []
    is_graph = isinstance(block, GraphModule)
    given = seen.kwargs if is_graph else _bound(block, seen)
    values = iter(seen.args if is_graph else ())
    for node in graph.find_nodes(op="placeholder"):
        default = node.args[0] if node.args else None
        inputs.append(given[node.target] if node.target in given else next(values, default))
    try:
        with in_mode(block, False), random_state_kept(block), torch.no_grad():
            _Shapes(GraphModule(block, graph)).run(*pytree.tree_map_only(torch.Tensor, torch.clone, inputs))
    except Exception as error:  # a branch that proxies took and tensors do not
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NotTraceableError(f"the graph of {type(block).__name__} does not run: {first}") from error
    return found


class _Tracer(Tracer):
    """Takes every child as a whole, but those that shall be looked into."""

    def __init__(self, looked_into: Collection[torch.nn.Module]) -> None:
        super().__init__()
        self._looked_into = looked_into

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return m not in self._looked_into


def parts_of(block: torch.nn.Module, called: Collection[torch.nn.Module]) -> list[torch.nn.Module]:
    """What the block's own forward may call: its children, and those of children that are never called, as of lists.

    Args:
        block: the module.
        called: the modules that are.
    """
    found: dict[torch.nn.Module, None] = {}
    waiting = list(block.children())
    while waiting:
        child = waiting.pop(0)
        found[child] = None
        if child not in called:
            waiting += list(child.children())
    return list(found)


def tail_sequences(block: torch.nn.Module, is_layer: Any, called: Collection[torch.nn.Module]) -> set[torch.nn.Module]:
    """The parts of `block`, and theirs, that are plain sequences with a layer at their end and without hooks."""
    found: set[torch.nn.Module] = set()
    waiting = parts_of(block, called)
    while waiting:
        child = waiting.pop()
        if (
            is_plain_sequence(child)
            and not has_hooks(child)
            and (is_plain_sequence(block) or _ends_in(child, is_layer))
        ):
            found.add(child)
            waiting += list(child.children())
    return found


def _ends_in(sequence: torch.nn.Module, is_layer: Any) -> bool:
    children = [child for child in sequence.children() if type(child) is not torch.nn.Identity]
    if not children:
        return False
    last = children[-1]
    return bool(is_layer(last)) or (is_plain_sequence(last) and not has_hooks(last) and _ends_in(last, is_layer))


def _fixed_arguments(block: torch.nn.Module, seen: Seen) -> dict[str, Any]:
    """Arguments that are None, bool or str: the way through forward may hang on them, and others fail then."""
    parameters = inspect.signature(block.forward).parameters
    if any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters.values()):
        raise NotTraceableError(f"{type(block).__name__}.forward takes any number of arguments")
    given = {**{name: one.default for name, one in parameters.items()}, **_bound(block, seen)}
    return {name: value for name, value in given.items() if value is None or isinstance(value, bool | str)}


def _with_own_signature(graph: Graph, block: torch.nn.Module) -> Graph:
    """Puts names and defaults of arguments back, which torch.fx changes for those that are fixed."""
    parameters = inspect.signature(block.forward).parameters
    for node in graph.nodes:
        node.type = None  # annotations may be words that mean something in the block's own file only
    for node, (name, parameter) in zip(graph.find_nodes(op="placeholder"), parameters.items(), strict=True):
        node.target = name
        node.args = () if parameter.default is parameter.empty else (parameter.default,)
    return graph


def _bound(block: torch.nn.Module, seen: Seen) -> dict[str, Any]:
    return dict(inspect.signature(block.forward).bind(*seen.args, **seen.kwargs).arguments)


def _text(graph: Graph) -> str:
    return graph.python_code("self").src
