"""Keras models in .keras files: read with safe_mode, written whole or not at all."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from batchnorm.cli.weights import written_whole
from batchnorm.errors import ArgumentError


def read(path: Path, *, compiled: bool) -> Any:
    """The model in `path`; no code that the file brings is run (safe_mode).

    Args:
        path: a .keras file.
        compiled: whether with its optimizer, loss and metrics, so that they are there when it is written again.

    Raises:
        ArgumentError: there is no such file, it is no .keras file or a broken one, or Keras refuses it.
        MissingPackageError: Keras, or the backend that KERAS_BACKEND names, is not installed.
    """
    if not path.is_file():
        raise ArgumentError(f"{path} is no file")
    if not zipfile.is_zipfile(path):
        raise ArgumentError(
            f"{path} is no .keras file (a zip archive that model.save('name.keras') writes), or a broken one"
        )
    # Of the backends, torch is the one that is always installed here; whoever has chosen another one is asked first.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import batchnorm.keras  # noqa: F401  (its layer is known to Keras then)
    from batchnorm.keras.framework import keras

    try:
        return keras.saving.load_model(path, compile=compiled, safe_mode=True)
    except Exception as error:  # the reader meets broken and foreign files with whatever it stumbles over
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArgumentError(f"{path} cannot be loaded by Keras with safe_mode: {first}") from error


def write(path: Path, model: Any) -> None:
    """Saves the model."""
    with written_whole(path) as name:
        model.save(name, overwrite=True)
