"""fold_onnx(): BatchNormalization nodes of an ONNX file go into the convolutions and matrix products beside them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from batchnorm.errors import ArgumentError
from batchnorm.surgery.onnx_files import Model, check_target, onnx_packages, read_onnx, write_onnx
from batchnorm.surgery.onnx_graph import Node, OnnxGraph, attributes, inside_others
from batchnorm.surgery.onnx_maps import NotFoldableError, fold_node_behind, fold_node_in_front
from batchnorm.surgery.onnx_running import random_inputs, run_onnx
from batchnorm.surgery.report import Changed, Skipped, SurgeryReport
from batchnorm.surgery.verification import Agreement, compare

_ROUNDING_ERRORS = 3
_AT_MOST = 100
_TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}


def fold_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tolerance: float | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    force: bool = False,
) -> SurgeryReport:
    """Folds the BatchNormalization nodes of an ONNX file, without the network's Python code.

    Nodes in inference form go into the Conv, ConvTranspose, Gemm or MatMul (with or without an Add) before them, or
    after them where no zero padding comes between; a MatMul's shift becomes an Add. Values that go elsewhere too,
    outputs of the graph, nodes in training form and nodes in subgraphs are left as they are, and the report says so.
    New weights are computed in float64 and rounded once; initializers that others share stay for the others.
    Then onnxruntime runs both models on random inputs. If their outputs differ, no file is written.

    Args:
        path: the model; external data beside it is read.
        out: where the new one goes; external data goes to `out`.data if the model had external data.
        tolerance: largest difference of an output over its largest value that passes. None goes by the coarsest dtype
            of the weights: 1e-5 in float32.
        shapes: sizes of inputs by name, where the model leaves them open and small ones do not do.
        force: overwrite `out`.

    Returns:
        The report: what was folded into what, which nodes are left and why, and the largest differences. Where
        `agreement.holds` is False nothing was written.

    Raises:
        ArgumentError: the file cannot be read, is no valid model, has no BatchNormalization or cannot be run, `out` is
            there already, or onnx or onnxruntime is not installed.
    """
    source, target = Path(path), Path(out)
    check_target(target, force=force)
    model, is_external = read_onnx(source)
    before = type(model)()
    before.CopyFrom(model)
    changed, skipped = _fold_all(OnnxGraph(model))
    if not changed and not skipped:
        raise ArgumentError(f"{source} has no BatchNormalization node to fold.")
    notes: list[str] = []
    agreement = _compared(before, model, shapes, tolerance, notes)
    if agreement.holds:
        write_onnx(target, model, external=is_external)
    else:
        notes.append("refused: the outputs differ, and nothing was written")
        changed = []
    return SurgeryReport("fold", tuple(changed), tuple(skipped), agreement, tuple(notes))


def _fold_all(graph: OnnxGraph) -> tuple[list[Changed], list[Skipped]]:
    changed: list[Changed] = []
    while True:
        skipped: list[Skipped] = []
        progress = False
        for node in [one for one in graph.model.graph.node if one.op_type == "BatchNormalization"]:
            try:
                layer = _layer(graph, node)
                changed.append(Changed((_name(node),), _fold(graph, node, layer)))
            except NotFoldableError as error:
                skipped.append(Skipped(_name(node), str(error)))
                continue
            progress = True
            graph.drop_unused()
        if not progress:
            break
    for where, node in inside_others(graph.model):
        if node.op_type == "BatchNormalization":
            skipped.append(Skipped(_name(node), f"it stands {where}"))
    return changed, skipped


class _Layer(NamedTuple):
    scale: np.ndarray[Any, Any]
    """(C,), float64."""
    shift: np.ndarray[Any, Any]
    """(C,), float64."""


def _layer(graph: OnnxGraph, node: Node) -> _Layer:
    """scale = gamma / sqrt(var + epsilon), shift = beta - mean * scale, in float64."""
    given = attributes(node)
    opset = next((one.version for one in graph.model.opset_import if one.domain in ("", "ai.onnx")), 0)
    trains = given.get("training_mode", 0) if opset >= 7 else not given.get("is_test", 0)
    if trains or sum(bool(name) for name in node.output) > 1:
        raise NotFoldableError("it is in training form and normalises with its batch: export the network in eval mode")
    found = [graph.constant(name) for name in node.input[1:5]]
    if any(one is None for one in found):
        raise NotFoldableError("its weights or statistics are not constant")
    gamma, beta, mean, var = (np.asarray(one, np.float64) for one in found)
    if gamma.ndim != 1:
        raise NotFoldableError("it has statistics for each position (spatial=0)")
    # 1e-5 is the standard's default; a float32 attribute reads as its nearest float64.
    scale = gamma / np.sqrt(var + given.get("epsilon", 1e-5))
    shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise NotFoldableError("its weights or statistics are not finite")
    return _Layer(scale, shift)


def _fold(graph: OnnxGraph, node: Node, layer: _Layer) -> str:
    reasons = []
    for attempt in (fold_node_behind, fold_node_in_front):
        try:
            return attempt(graph, node, layer.scale, layer.shift)
        except NotFoldableError as error:
            reasons.append(str(error))
    raise NotFoldableError("; ".join(reasons))


def _compared(
    before: Model,
    after: Model,
    shapes: Mapping[str, Sequence[int]] | None,
    tolerance: float | None,
    notes: list[str],
) -> Agreement:
    inputs = random_inputs(before, shapes)
    outputs = _tensors(run_onnx(before, inputs))
    limit = _tolerance(before) if tolerance is None else tolerance
    agreement = compare(zip(outputs, _tensors(run_onnx(after, inputs)), strict=True), tolerance=limit)
    if agreement.holds or tolerance is not None:
        return agreement
    # Deep networks amplify rounding beyond any fixed tolerance: what another order of the same sums changes may pass.
    own = compare(zip(outputs, _tensors(run_onnx(before, inputs, optimized=True)), strict=True), tolerance=limit)
    raised = max(limit, min(_ROUNDING_ERRORS * own.max_relative, _AT_MOST * limit))
    notes.append(
        f"onnxruntime's own optimisations change the outputs of the model as it came by {own.max_relative:.2g}; the "
        f"tolerance is {_ROUNDING_ERRORS} times that, from {limit:.2g} to {_AT_MOST} times as much"
    )
    return dataclasses.replace(agreement, tolerance=raised, own_rounding=own.max_relative)


def _tensors(outputs: list[list[Any]]) -> list[list[torch.Tensor]]:
    return [[torch.from_numpy(np.array(one, np.float64)) for one in _numbers(run)] for run in outputs]


def _numbers(run: list[Any]) -> list[Any]:
    """Arrays out of outputs that may be sequences of arrays."""
    return [part for one in run for part in (one if isinstance(one, list) else [one]) if isinstance(part, np.ndarray)]


def _tolerance(model: Model) -> float:
    onnx, _ = onnx_packages()
    names = {str(onnx.helper.tensor_dtype_to_np_dtype(one.data_type)) for one in model.graph.initializer}
    return max((_TOLERANCES[name] for name in names if name in _TOLERANCES), default=_TOLERANCES["float32"])


def _name(node: Node) -> str:
    return str(node.name or node.output[0])
