"""The main graph of an ONNX model with its edges: what makes a value, what takes it, and which values are constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from batchnorm.surgery.onnx_files import Model, onnx_packages

Node = Any
"""An onnx.NodeProto."""


class OnnxGraph:
    """Edges of the main graph; they hold until the graph is changed, and `refresh` finds them again.

    Attributes:
        model: the model.
        producers: the node that makes a value, by its name.
        consumers: the nodes that take it; those inside of subgraphs stand for it with the node that holds them.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Looks at the graph as it is now."""
        graph = self.model.graph
        self.outputs = {one.name for one in graph.output}
        self.producers: dict[str, Node] = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[Node]] = {}
        for node in graph.node:
            for name in [*node.input, *_captured(node)]:
                if name:
                    self.consumers.setdefault(name, []).append(node)
        # From version 4 of the format on, an initializer that is an input as well is a default that callers may change.
        changeable = {one.name for one in graph.input} if self.model.ir_version >= 4 else set()
        self._constants = {one.name: one for one in graph.initializer if one.name not in changeable}
        self._ranks: dict[str, int] | None = None

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The numbers of a value that no input changes: an initializer, a Constant, or an Identity of one."""
        onnx, _ = onnx_packages()
        while (node := self.producers.get(name)) is not None and node.op_type == "Identity":
            name = node.input[0]
        tensor = self._constants.get(name)
        if tensor is None and node is not None and node.op_type == "Constant":
            tensor = next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == "value"), None)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def rank(self, name: str) -> int | None:
        """The number of axes of a value; None where the model does not tell."""
        if self._ranks is None:
            self._ranks = _ranks(self.model)
        return self._ranks.get(name)

    def only_consumer(self, name: str) -> Node | None:
        """The one node that takes a value which goes nowhere else."""
        users = self.consumers.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def add_constant(self, wish: str, values: np.ndarray[Any, Any]) -> str:
        """A new initializer; returns its name, `wish` or one like it."""
        onnx, _ = onnx_packages()
        taken = {one.name for one in self.model.graph.initializer} | set(self.producers) | set(self.consumers)
        taken |= {one.name for one in self.model.graph.input}
        name = wish
        while name in taken:
            name += "_"
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        self._constants[name] = self.model.graph.initializer[-1]
        return name

    def drop_unused(self) -> None:
        """Takes out initializers, and Constant and Identity nodes, that nothing takes any more."""
        graph = self.model.graph
        while True:
            self.refresh()
            idle = [
                node
                for node in graph.node
                if node.op_type in ("Constant", "Identity")
                and not any(name in self.consumers or name in self.outputs for name in node.output)
            ]
            for node in idle:
                graph.node.remove(node)
            if not idle:
                break
        unused = [one for one in graph.initializer if one.name not in self.consumers and one.name not in self.outputs]
        gone = {one.name for one in unused}
        for one in unused:
            graph.initializer.remove(one)
        for one in [one for one in graph.input if one.name in gone]:
            graph.input.remove(one)
        self.refresh()
        known = set(self.producers) | {one.name for one in graph.input} | {one.name for one in graph.initializer}
        for one in [one for one in graph.value_info if one.name not in known]:
            graph.value_info.remove(one)


def attributes(node: Node) -> dict[str, Any]:
    """A node's attributes by name; strings as str."""
    onnx, _ = onnx_packages()
    found = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def inside_others(model: Model) -> Iterator[tuple[str, Node]]:
    """The nodes that are not in the main graph, each with where it is."""
    for node in model.graph.node:
        for graph in _subgraphs(node):
            yield from ((f"in a subgraph of {node.op_type} {node.name}".strip(), inner) for inner in _nodes(graph))
    for function in model.functions:
        for node in function.node:
            yield f"in the function {function.name}", node


def _nodes(graph: Any) -> Iterator[Node]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _nodes(inner)


def _subgraphs(node: Node) -> Iterator[Any]:
    for one in node.attribute:
        if one.HasField("g"):
            yield one.g
        yield from one.graphs


def _captured(node: Node) -> set[str]:
    """Names that the subgraphs of a node take from outside."""
    found: set[str] = set()
    for graph in _subgraphs(node):
        own = {one.name for one in [*graph.input, *graph.initializer]} | {name for n in graph.node for name in n.output}
        used = {name for n in graph.node for name in [*n.input, *_captured(n)]} | {one.name for one in graph.output}
        found |= used - own
    return found


def _ranks(model: Model) -> dict[str, int]:
    onnx, _ = onnx_packages()
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # what the model says itself has to do
        graph = model.graph
    return {
        one.name: len(one.type.tensor_type.shape.dim)
        for one in [*graph.value_info, *graph.input, *graph.output]
        if one.type.HasField("tensor_type") and one.type.tensor_type.HasField("shape")
    }
