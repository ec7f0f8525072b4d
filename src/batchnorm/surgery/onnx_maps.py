"""Nodes of an ONNX graph that multiply channels by weights: how a scale and a shift before or behind them goes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batchnorm.surgery.inference_form import ScaleShift
from batchnorm.surgery.linear_maps import Folded, LinearMap, fold_behind, fold_in_front
from batchnorm.surgery.onnx_files import onnx_packages
from batchnorm.surgery.onnx_graph import Node, OnnxGraph, attributes

Array = Any


class NotFoldableError(Exception):
    """Says why a node stays as it is."""


def fold_node_behind(graph: OnnxGraph, node: Node, scale: Array, shift: Array) -> str:
    """Takes the BatchNormalization `node` into what stands before it; returns what was done.

    Raises:
        NotFoldableError: why that cannot be. The graph is as it was then.
    """
    source = _only_source(graph, node, node.input[0])
    after = ScaleShift(torch.from_numpy(scale), torch.from_numpy(shift))
    if source.op_type == "Add":
        product, bias_name = _product_and_bias(graph, source)
        old = _linear(graph, product, graph.constant(bias_name))
        folded = fold_behind(old, after)
        _finite(graph, product, folded)
        _set_weight(graph, product, folded)
        position = list(source.input).index(bias_name)
        source.input[position] = _new(graph, bias_name, folded.bias, _weight(graph, product))
        last = source
    else:
        if source.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            raise NotFoldableError(f"before it stands {source.op_type}")
        _check_rank(graph, source, node.input[0])
        folded = fold_behind(_linear(graph, source, _bias(graph, source)), after)
        _finite(graph, source, folded)
        _set_weight(graph, source, folded)
        if source.op_type == "MatMul":
            _become_add(graph, node, folded.bias, _weight(graph, source))
            return "BatchNormalization -> MatMul, Add"
        _set_bias(graph, source, folded)
        last = source
    _skip_behind(graph, last, node)
    return f"BatchNormalization -> {'MatMul, Add' if source.op_type == 'Add' else source.op_type}"


def fold_node_in_front(graph: OnnxGraph, node: Node, scale: Array, shift: Array) -> str:
    """Takes the BatchNormalization `node` into all that comes after it; returns what was done.

    Raises:
        NotFoldableError: why that cannot be. The graph is as it was then.
    """
    made = node.output[0]
    users = graph.consumers.get(made, [])
    if made in graph.outputs:
        raise NotFoldableError("its output is one of the graph's")
    if not users:
        raise NotFoldableError("nothing takes its output")
    before = ScaleShift(torch.from_numpy(scale), torch.from_numpy(shift))
    foldings = []
    for user in users:
        if user.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or list(user.input).index(made) != 0:
            raise NotFoldableError(f"after it comes {user.op_type}")
        if list(user.input).count(made) > 1:
            raise NotFoldableError(f"it is both factors of {user.op_type}")
        _check_rank(graph, user, made)
        if shift.any():
            _check_border(graph, user)
        adds: Node = None
        if user.op_type == "MatMul" and shift.any():
            adds = graph.only_consumer(user.output[0])
            if adds is None or adds.op_type != "Add" or graph.constant(_other(adds, user.output[0])) is None:
                raise NotFoldableError("after it comes MatMul, without an Add that could take the shift")
        bias = _bias(graph, user) if adds is None else _vector(graph.constant(_other(adds, user.output[0])))
        folded = fold_in_front(_linear(graph, user, bias), before)
        _finite(graph, user, folded)
        foldings.append((user, adds, folded))
    for user, adds, folded in foldings:
        like = _weight(graph, user)
        _set_weight(graph, user, folded)
        if adds is not None:
            name = _other(adds, user.output[0])
            adds.input[list(adds.input).index(name)] = _new(graph, name, folded.bias, like)
        elif user.op_type != "MatMul":
            _set_bias(graph, user, folded)
        user.input[0] = node.input[0]
    graph.model.graph.node.remove(node)
    kinds = ", ".join(dict.fromkeys(user.op_type for user, _, _ in foldings))
    return f"BatchNormalization -> the following {kinds}"


def _only_source(graph: OnnxGraph, node: Node, name: str) -> Node:
    source = graph.producers.get(name)
    if source is None:
        raise NotFoldableError("nothing that could take it in stands before it: its input is the graph's own")
    if graph.only_consumer(name) is not node:
        raise NotFoldableError(f"the output of the {source.op_type} before it goes elsewhere too")
    return source


def _product_and_bias(graph: OnnxGraph, add: Node) -> tuple[Node, str]:
    for position in (0, 1):
        product = graph.producers.get(add.input[position])
        name = str(add.input[1 - position])
        bias = graph.constant(name)
        if product is not None and product.op_type == "MatMul" and bias is not None:
            if graph.only_consumer(add.input[position]) is not add:
                raise NotFoldableError("the output of the MatMul before it goes elsewhere too")
            _check_rank(graph, product, product.output[0])
            _vector(bias)
            return product, name
    raise NotFoldableError("before it stands Add")


def _other(add: Node, name: str) -> str:
    return str(next(one for one in add.input if one != name))


def _linear(graph: OnnxGraph, node: Node, bias: Array) -> LinearMap:
    """The map of a node, in torch's layouts."""
    weight = _weight(graph, node)
    given = attributes(node)
    if node.op_type == "MatMul":
        weight = weight.T
    elif node.op_type == "Gemm":
        weight = (weight if given.get("transB", 0) else weight.T) * np.float64(given.get("alpha", 1.0))
    values = None if bias is None else torch.from_numpy(np.array(_vector(bias, weight.shape[0]), np.float64))
    if node.op_type == "Gemm" and values is not None:
        values = values * given.get("beta", 1.0)
    return LinearMap(
        torch.from_numpy(np.array(weight, np.float64)),
        values,
        int(given.get("group", 1)),
        node.op_type == "ConvTranspose",
    )


def _weight(graph: OnnxGraph, node: Node) -> Array:
    weight = graph.constant(node.input[1])
    if weight is None:
        raise NotFoldableError(f"the {node.op_type}'s weight is not constant")
    if node.op_type in ("MatMul", "Gemm") and weight.ndim != 2:
        raise NotFoldableError(f"the {node.op_type}'s weight has {weight.ndim} axes, not 2")
    if node.op_type == "Gemm" and attributes(node).get("transA", 0):
        raise NotFoldableError("the Gemm takes its input transposed")
    return weight


def _bias(graph: OnnxGraph, node: Node) -> Array:
    if len(node.input) < 3 or not node.input[2]:
        return None
    bias = graph.constant(node.input[2])
    if bias is None:
        raise NotFoldableError(f"the {node.op_type}'s bias is not constant")
    return bias


def _vector(bias: Array, size: int | None = None) -> Array:
    """A bias that is the same for each row, as (C,); a single number stands for all."""
    if bias.size != (bias.shape[-1] if bias.ndim else 1):
        raise NotFoldableError("the bias before or after it is no number for each channel")
    flat = bias.reshape(-1)
    return np.broadcast_to(flat, (size,)) if size is not None and flat.size == 1 else flat


def _check_rank(graph: OnnxGraph, node: Node, name: str) -> None:
    """A matrix product's features are the channels, axis 1, of a matrix only."""
    if node.op_type == "MatMul" and graph.rank(name) != 2:
        raise NotFoldableError("the MatMul beside it works on more axes than a matrix has, or on an unknown number")


def _check_border(graph: OnnxGraph, node: Node) -> None:
    given = attributes(node)
    if node.op_type == "ConvTranspose":
        raise NotFoldableError("after it comes ConvTranspose, where not every output has a share in its shift")
    if node.op_type != "Conv" or (
        all(size == 1 for size in _weight(graph, node).shape[2:]) and not any(given.get("pads", []))
    ):
        return
    if any(given.get("pads", [])) or given.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        raise NotFoldableError("after it comes Conv, whose zero padding does not have its shift")


def _finite(graph: OnnxGraph, node: Node, folded: Folded) -> None:
    kind = _weight(graph, node).dtype
    with np.errstate(over="ignore"):
        if not all(np.isfinite(part.numpy().astype(kind)).all() for part in folded):
            raise NotFoldableError(f"the {node.op_type}'s new weights would not be finite in {kind}")


def _set_weight(graph: OnnxGraph, node: Node, folded: Folded) -> None:
    like, weight = _weight(graph, node), folded.weight
    given = {one.name: one for one in node.attribute}
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0)):
        weight = weight.T
    node.input[1] = _new(graph, node.input[1], weight, like)
    for name in ("alpha", "beta"):  # both are in the new numbers
        if node.op_type == "Gemm" and name in given:
            given[name].f = 1.0


def _set_bias(graph: OnnxGraph, node: Node, folded: Folded) -> None:
    wish = node.input[2] if len(node.input) > 2 and node.input[2] else f"{node.name or node.output[0]}_bias"
    name = _new(graph, wish, folded.bias, _weight(graph, node))
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)


def _become_add(graph: OnnxGraph, node: Node, bias: torch.Tensor, like: Array) -> None:
    """Makes the BatchNormalization an Add of the shift."""
    onnx, _ = onnx_packages()
    name = _new(graph, f"{node.name or node.output[0]}_shift", bias, like)
    new = onnx.helper.make_node("Add", [node.input[0], name], [node.output[0]], node.name)
    node.CopyFrom(new)


def _skip_behind(graph: OnnxGraph, last: Node, node: Node) -> None:
    """`last` makes what `node` made; outputs of the graph keep their names."""
    position = list(last.output).index(node.input[0])
    last.output[position] = node.output[0]
    graph.model.graph.node.remove(node)


def _new(graph: OnnxGraph, wish: str, values: torch.Tensor, like: Array) -> str:
    return graph.add_constant(f"{wish}_folded", values.numpy().astype(like.dtype))
