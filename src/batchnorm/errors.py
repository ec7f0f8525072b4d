"""The errors and warnings that batchnorm raises, each with the built-in class that callers already catch."""

from __future__ import annotations


class BatchNormError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeError(BatchNormError, ValueError):
    """A tensor has the wrong rank, the wrong size, or too few values for a variance."""


class DtypeError(BatchNormError, TypeError):
    """A tensor has a dtype that cannot be normalised, or two dtypes do not go together."""


class ArgumentError(BatchNormError, ValueError):
    """An argument that is no tensor is out of its range."""


class RankError(BatchNormError, RuntimeError):
    """A rank of a process group did not join a layer's collective operation in time."""


class VerificationError(BatchNormError, RuntimeError):
    """A result was compared with what it should equal, and does not; nothing was changed. `report` has the numbers."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class ChangedInPlaceError(BatchNormError, RuntimeError):
    """A tensor that a backward pass needs was written to after the forward pass."""


class MissingPackageError(BatchNormError, ImportError):
    """A package that the base installation does without is not there."""


class StatisticsWarning(UserWarning):
    """Something kept a batch out of the running statistics."""
