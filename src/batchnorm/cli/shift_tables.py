"""What the commands of `batchnorm shift` share about tables and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.errors import ArgumentError

if TYPE_CHECKING:
    from batchnorm.shift.reference import Reference


def refuse_existing(out: Path, force: bool) -> None:
    """Raises ArgumentError where `out` would be overwritten, or has no folder."""
    if out.exists() and not force:
        raise ArgumentError(f"{out} exists: pass --force to overwrite it, or choose another --out")
    if not out.resolve().parent.is_dir():
        raise ArgumentError(f"the folder of {out} does not exist")


def new_side(old: Reference, table: str, target: str | None, null: Sequence[str] | None = None) -> Reference:
    """The Reference of new rows with the columns of the old one; the target may be missing."""
    from batchnorm.shift.reference import Reference
    from batchnorm.shift.tables import scan

    nulls = tuple(null) if null else old.nulls
    names = scan(table, nulls=nulls).collect_schema().names()
    like = old if target is None or target in names else old.without(target)
    return Reference.of(table, like=like, salt="new", nulls=nulls)
