"""The progress bar of a recalibration."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """On stderr, gone at the end; nothing where the output is no terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        # Rich takes 0.15 s to load, which a small model's recalibration does not.
        if not (sys.stderr is not None and sys.stderr.isatty()) and "ipykernel" not in sys.modules:
            return
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("recalibrating {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("all layers", total=None)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def layer(self, name: str, number: int, of: int) -> None:
        """Names the layer that the next pass is for."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{name} ({number} of {of})")

    def begin(self, batches: int | None) -> None:
        """A pass over so many batches, None: nobody knows how many."""
        if self._bar is not None:
            self._bar.reset(self._task, total=batches)

    def advance(self) -> None:
        """One batch more."""
        if self._bar is not None:
            self._bar.advance(self._task)
