"""Objects that the user names as package.module:name."""

from batchnorm.objects import from_module

__all__ = ["from_module"]
