"""Objects that the user names as package.module:name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from batchnorm.errors import ArgumentError


def from_module(spec: str, option: str) -> Any:
    """The callable that `spec` names, imported from the current folder too; `option` is named in errors.

    What goes wrong inside of the user's module is raised as it is, with its traceback.

    Raises:
        ArgumentError: spec is no package.module:name, or there is no such module, name or callable.
    """
    module_name, separator, path = spec.partition(":")
    if not separator or not module_name or not path:
        raise ArgumentError(f"{option} must be package.module:name, got {spec!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's own module lacks is his to see with a traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ArgumentError(f"{option}: no module named {error.name!r} (from {spec!r}), here or installed") from error
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise ArgumentError(f"{option}: module {module_name} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ArgumentError(f"{option}: {spec} must be callable, got {type(found).__name__}")
    return found
