"""ONNX files: read with an error that says what is wrong, written whole or not at all; the one door to onnx."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from batchnorm.errors import ArgumentError

Model: TypeAlias = Any
"""An onnx.ModelProto; its types come from generated code."""

_LARGEST = 2**31 - 2**20
"""What protobuf takes in one piece, with room for what is not weights; bytes."""


def onnx_packages() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime.

    Raises:
        ArgumentError: one of them is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ArgumentError(f"ONNX files need {error.name}: pip install 'batchnorm[onnx]'") from error
    return onnx, onnxruntime


def read_onnx(path: Path) -> tuple[Model, bool]:
    """The model in a file, with external data in it, and whether it had external data.

    Raises:
        ArgumentError: there is no such file, it is no ONNX file, it is damaged, or its external data is missing.
    """
    onnx, _ = onnx_packages()
    if not path.is_file():
        raise ArgumentError(f"{path} is no file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors are of the parser's making
        raise ArgumentError(f"{path} is no ONNX file, or a damaged one: {_first_line(error)}") from error
    is_external = any(onnx.external_data_helper.uses_external_data(one) for one in _all_tensors(onnx, model))
    try:
        if is_external:
            onnx.external_data_helper.load_external_data_for_model(model, str(path.resolve().parent))
        if model.ByteSize() < _LARGEST:
            onnx.checker.check_model(model)
        else:
            onnx.checker.check_model(str(path))
    except Exception as error:
        raise ArgumentError(f"{path} is no valid ONNX model: {_first_line(error)}") from error
    return model, is_external


def write_onnx(path: Path, model: Model, *, external: bool) -> None:
    """Writes the model, and its weights into `path`.data where `external`, beside their places, and moves them there.

    Raises:
        ArgumentError: onnx's own checker does not take the model.
    """
    onnx, _ = onnx_packages()
    with put_when_done(path) as made:
        if external or model.ByteSize() >= _LARGEST:
            # A copy: onnx takes the weights out of the model that it saves.
            whole = onnx.ModelProto()
            whole.CopyFrom(model)
            data = data_file_of(path).name
            onnx.save_model(whole, str(made), save_as_external_data=True, location=data, size_threshold=1024)
        else:
            onnx.save_model(model, str(made))
        try:
            onnx.checker.check_model(str(made))
        except Exception as error:
            raise ArgumentError(f"the new model is not valid, nothing was written: {_first_line(error)}") from error


@contextmanager
def put_when_done(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder of its own, which takes the place of `path` at the end, with its data file.

    If the block raises, or makes no file, nothing is at `path` that was not there before.
    """
    folder = path.resolve().parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.name}.") as name:
        made = Path(name) / path.name
        yield made
        for file in (data_file_of(made), made):  # the model last: it names the other one
            if file.exists():
                os.replace(file, folder / file.name)


def check_target(path: Path, *, force: bool) -> None:
    """Raises ArgumentError unless `path`, and its external data, may be written."""
    for file in (path, data_file_of(path)):
        if file.exists() and not force:
            raise ArgumentError(f"{file} exists: pass force=True (--force) to overwrite it, or choose another name")
    if not path.resolve().parent.is_dir():
        raise ArgumentError(f"the folder of {path} does not exist")


def data_file_of(path: Path) -> Path:
    """Where the weights go that do not go into `path` itself."""
    return path.with_name(f"{path.name}.data")


def _all_tensors(onnx: Any, model: Model) -> Any:
    return onnx.external_data_helper._get_all_tensors(model)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
