"""export_onnx(): a network as an ONNX file that onnxruntime was seen to compute alike."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from batchnorm.errors import ArgumentError
from batchnorm.surgery.examples import Arguments, arguments_of, copied, in_float64, outputs_of, random_like
from batchnorm.surgery.inference_form import normalizations
from batchnorm.surgery.onnx_files import check_target, onnx_packages, put_when_done
from batchnorm.surgery.onnx_running import run_onnx
from batchnorm.surgery.recording import tensors_in
from batchnorm.surgery.report import Changed, SurgeryReport
from batchnorm.surgery.verification import Agreement, compare

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROUNDING_ERRORS = 3
_AT_MOST = 100
"""How often the tolerance may be multiplied for that."""
_OTHER_BATCHES = (1, 3)


def export_onnx(
    model: torch.nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
    force: bool = False,
) -> SurgeryReport:
    """Writes a network in evaluation mode as an ONNX file, if onnxruntime gives its outputs.

    torch's exporter (torch.export) makes the model; our layers become standard BatchNormalization nodes, where it does
    not fold them. Then onnxruntime's outputs are compared with the network's on the example and on random inputs, with
    dynamic_batch on other batch sizes, too. If they differ, there is no file.

    A network in training mode is refused: its layers would normalise with the batch, and exporters turn them into
    something else in silence.

    Args:
        model: the network, after eval().
        example: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        path: where the file goes; weights of more than 2 GB go to `path`.data.
        opset: version of ONNX's operators; None is torch's default.
        dynamic_batch: leave the first size of every input open.
        tolerance: largest difference of an output over its largest value that passes. None goes by the coarsest dtype
            of the parameters, 1e-4 in float32, or 3 times the network's own rounding error where that is more.
        force: overwrite `path`.

    Returns:
        The report, with the operators of the file and the largest differences. Where `agreement.holds` is False no file
        was written.

    Raises:
        ArgumentError: the model is in training mode, cannot be exported or run, `path` is there already, or a package
            of the extra `onnx` is not installed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> report = export_onnx(model, torch.randn(2, 3, 8, 8), "model.onnx")  # doctest: +SKIP
    """
    target = Path(path)
    given = arguments_of(example)
    _check_mode(model)
    check_target(target, force=force)
    onnx, _ = onnx_packages()
    traced = _with_batch(given, 2) if dynamic_batch and _batch(given) == 1 else given
    inputs = [given, random_like(given, 0), random_like(given, 1)]
    if dynamic_batch:
        inputs += [random_like(_with_batch(given, size), size) for size in _OTHER_BATCHES]
    before = [outputs_of(model, one) for one in inputs]
    limit = _tolerance(model) if tolerance is None else tolerance
    notes: list[str] = []
    with put_when_done(target) as made:
        _program(model, traced, opset, dynamic_batch=dynamic_batch).save(str(made))
        after = _run(onnx, made, inputs)
        agreement = compare(zip(before, after, strict=True), tolerance=limit)
        if not agreement.holds and tolerance is None:
            agreement = _beside_own_rounding(agreement, model, inputs, before, notes)
        operators = _operators(onnx, made)
        if not agreement.holds:
            notes.append("refused: onnxruntime's outputs differ, and nothing was written")
            made.unlink()
    changed = (Changed((str(target),), operators),) if agreement.holds else ()
    return SurgeryReport("export", changed, (), agreement, tuple(notes))


def _check_mode(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        listed = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
        raise ArgumentError(
            f"the model is in training mode ({listed}), in which layers use statistics of the batch: call model.eval()."
        )
    without = [place.name for place in normalizations(model) if getattr(place.module, "running_mean", 0) is None]
    if without:
        raise ArgumentError(
            f"{without[0]} keeps no running statistics and uses those of each batch in evaluation, too, which a file "
            "for inference must not depend on: train with track_running_stats=True, or recalibrate."
        )


def _program(model: torch.nn.Module, given: Arguments, opset: int | None, *, dynamic_batch: bool) -> Any:
    try:
        import onnxscript  # noqa: F401 (torch's exporter needs it, and names no extra of ours)
    except ImportError as error:
        raise ArgumentError("torch's exporter needs onnxscript: pip install 'batchnorm[onnx]'") from error
    args, kwargs = copied(given)
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        open_first = pytree.tree_map(
            lambda leaf: {0: batch} if isinstance(leaf, torch.Tensor) and leaf.ndim else None, (args, kwargs)
        )
        shapes = {**_named(model, open_first[0]), **open_first[1]}
    try:
        with warnings.catch_warnings():  # of the exporter's own making, about its own code
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ArgumentError(f"torch cannot export the model, {type(error).__name__}: {first}") from error


def _named(model: torch.nn.Module, values: tuple[Any, ...]) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, values, strict=False))


def _run(onnx: Any, path: Path, inputs: list[Arguments]) -> list[list[torch.Tensor]]:
    names = [one.name for one in onnx.load(str(path), load_external_data=False).graph.input]
    arrays = [
        dict(zip(names, (tensor.detach().cpu().numpy() for tensor in tensors_in(one)), strict=True)) for one in inputs
    ]
    return [
        [torch.from_numpy(np.array(output)) for output in outputs] for outputs in run_onnx(path, arrays, optimized=True)
    ]


def _operators(onnx: Any, path: Path) -> str:
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    left = sum(node.op_type == "BatchNormalization" for node in nodes)
    return f"{len(nodes)} nodes, {left} of them BatchNormalization"


def _beside_own_rounding(
    agreement: Agreement,
    model: torch.nn.Module,
    inputs: list[Arguments],
    before: list[list[torch.Tensor]],
    notes: list[str],
) -> Agreement:
    try:
        exact = copy.deepcopy(model).double()
        truth = (outputs_of(exact, in_float64(one)) for one in inputs)
        own = compare(zip(truth, before, strict=True), tolerance=agreement.tolerance)
    except Exception:  # networks with constants of a dtype of their own
        return agreement
    raised = max(agreement.tolerance, min(_ROUNDING_ERRORS * own.max_relative, _AT_MOST * agreement.tolerance))
    notes.append(
        f"the network itself is {own.max_relative:.2g} off its own outputs in float64 by rounding alone; the tolerance "
        f"is {_ROUNDING_ERRORS} times that, from {agreement.tolerance:.2g} to {_AT_MOST} times as much"
    )
    return dataclasses.replace(agreement, tolerance=raised, own_rounding=own.max_relative)


def _batch(given: Arguments) -> int:
    return min((tensor.shape[0] for tensor in tensors_in(given) if tensor.ndim), default=0)


def _with_batch(given: Arguments, size: int) -> Arguments:
    """The first entry of each tensor `size` times."""
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: (
            leaf[:1].repeat(size, *[1] * (leaf.ndim - 1)) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf
        ),
        given,
    )


def _tolerance(model: torch.nn.Module) -> float:
    dtypes = {tensor.dtype for tensor in model.parameters()} & set(_TOLERANCES)
    return max((_TOLERANCES[dtype] for dtype in dtypes), default=_TOLERANCES[torch.float32])
