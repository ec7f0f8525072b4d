"""Keras itself: the one place of this library where it is imported, and where it is said how to get it."""

from __future__ import annotations

from batchnorm.errors import MissingPackageError

try:
    import keras as keras
except ModuleNotFoundError as error:
    lacking = (error.name or "").partition(".")[0]
    if lacking != "keras":  # Keras is there and lacks its backend
        raise MissingPackageError(
            f"Keras cannot start: it lacks {lacking!r}. Its backend is chosen before it is imported: set the "
            "environment variable KERAS_BACKEND to torch, jax or tensorflow, whichever is installed."
        ) from error
    raise MissingPackageError("batchnorm.keras needs Keras 3: pip install 'batchnorm[keras]'") from error
