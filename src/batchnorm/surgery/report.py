"""What an operation on a model did, what it left alone and why, and how far the result was verified."""

from __future__ import annotations

import dataclasses
from typing import Any

from batchnorm.surgery.verification import Agreement


@dataclasses.dataclass(frozen=True)
class Changed:
    """A module, or a group of modules, that is another one now."""

    names: tuple[str, ...]
    """Qualified names in the model; "" is the model itself."""
    what: str
    """What it was and what it is, as "BatchNorm2d -> BatchNorm2d + relu"."""
    note: str = ""
    """What the reader has to know about it; "" as a rule."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A module that was left as it is."""

    name: str
    why: str


@dataclasses.dataclass(frozen=True)
class SurgeryReport:
    """What an operation did; print it.

    Attributes:
        action: "convert", "fuse", "fold", "export" or "port".
        changed: what is another now.
        skipped: what one might have expected to change, and why it did not.
        agreement: outputs before and after, compared; None where nothing could be compared, and `notes` says why.
        notes: what holds for the whole.
    """

    action: str
    changed: tuple[Changed, ...]
    skipped: tuple[Skipped, ...] = ()
    agreement: Agreement | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.action}: {len(self.changed)} changed, {len(self.skipped)} left alone"]
        lines += [f"  {', '.join(map(_shown, one.names))}: {one.what}{_aside(one.note)}" for one in self.changed]
        lines += [f"  {_shown(one.name)}: left alone, {one.why}" for one in self.skipped]
        lines += [f"  note: {note}" for note in self.notes]
        if self.agreement is not None:
            lines.append(f"  {self.agreement}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        agreement = None if self.agreement is None else self.agreement.as_dict()
        return {**dataclasses.asdict(self), "agreement": agreement}


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _aside(note: str) -> str:
    return f" ({note})" if note else ""
