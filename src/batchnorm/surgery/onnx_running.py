"""ONNX models run by onnxruntime, on random inputs of the shapes that they ask for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import ArgumentError
from batchnorm.surgery.onnx_files import Model, onnx_packages

# Tried in turn where the model leaves a size open and its first axis, the batch, does not answer for it.
_OPEN_SIZES = (32, 64, 224, 8, 1)
_BATCH = 2

Inputs = dict[str, "np.ndarray[Any, Any]"]


def run_onnx(model: Model | Path, inputs: Sequence[Inputs], *, optimized: bool = False) -> list[list[Any]]:
    """The outputs for each of the inputs, as arrays.

    Args:
        model: a model, or the file that it is in.
        inputs: arrays by the names of the model's inputs.
        optimized: whether onnxruntime may rewrite the model first, by default not: what is compared is what is there.

    Raises:
        ArgumentError: onnxruntime cannot run it.
    """
    try:
        if isinstance(model, Path):
            session = _session(str(model), optimized=optimized)
            return [session.run(None, one) for one in inputs]
        # By way of a file: a model of more than 2 GB does not go through memory.
        with tempfile.TemporaryDirectory() as folder:
            session = _session(_in_a_file(model, Path(folder)), optimized=optimized)
            return [session.run(None, one) for one in inputs]
    except ArgumentError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(f"onnxruntime cannot run the model, so that nothing can be verified: {first}") from error


def random_inputs(model: Model, shapes: Mapping[str, Sequence[int]] | None = None, *, count: int = 3) -> list[Inputs]:
    """Inputs with which the model runs: normal numbers, zeros and ones for integers and booleans.

    Args:
        model: the model.
        shapes: sizes by name of an input. Without, open sizes of the batch axis are 2 and others are tried out.
        count: how many.

    Raises:
        ArgumentError: an input is no tensor of numbers, an unknown name is in `shapes`, or no sizes work.
    """
    onnx, _ = onnx_packages()
    fixed = {tensor.name for tensor in model.graph.initializer}
    wanted = [one for one in model.graph.input if one.name not in fixed]
    unknown = sorted(set(shapes or ()) - {one.name for one in wanted})
    if unknown:
        known = ", ".join(one.name for one in wanted)
        raise ArgumentError(f"the model has no input {', '.join(unknown)}: it has {known}")
    error: ArgumentError | None = None
    for size in _OPEN_SIZES:
        generator = np.random.default_rng(0)
        drawn = [{one.name: _drawn(onnx, one, shapes or {}, size, generator) for one in wanted} for _ in range(count)]
        try:
            run_onnx(model, drawn[:1])
        except ArgumentError as failure:
            error = error or failure
            if not any(_is_open(one) and one.name not in (shapes or {}) for one in wanted):
                break
            continue
        return drawn
    hint = "say the sizes of its inputs (shapes=, --input NAME=1x3x224x224)"
    raise ArgumentError(f"{error} If sizes are the reason, {hint}.")


def _session(path: str, *, optimized: bool) -> Any:
    _, onnxruntime = onnx_packages()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 0
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _in_a_file(model: Model, folder: Path) -> str:
    onnx, _ = onnx_packages()
    path = folder / "model.onnx"
    if model.ByteSize() < 2**30:
        path.write_bytes(model.SerializeToString())
    else:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        onnx.save_model(whole, str(path), save_as_external_data=True, location="model.data")
    return str(path)


def _is_open(one: Any) -> bool:
    return any(not dim.dim_value for dim in one.type.tensor_type.shape.dim)


def _drawn(onnx: Any, one: Any, shapes: Mapping[str, Sequence[int]], size: int, generator: Any) -> Any:
    if not one.type.HasField("tensor_type") or one.type.tensor_type.elem_type == onnx.TensorProto.STRING:
        raise ArgumentError(f"input {one.name} is no tensor of numbers: outputs cannot be compared")
    kind = onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type)
    if one.name in shapes:
        shape = tuple(shapes[one.name])
    elif one.type.tensor_type.HasField("shape"):
        shape = tuple(
            dim.dim_value or (_BATCH if axis == 0 else size) for axis, dim in enumerate(one.type.tensor_type.shape.dim)
        )
    else:
        raise ArgumentError(f"input {one.name} does not say how many axes it has: pass --input {one.name}=1x3x224x224")
    if np.issubdtype(kind, np.integer) or kind == np.bool_:
        return generator.integers(0, 2, shape).astype(kind)
    return generator.standard_normal(shape).astype(kind)
