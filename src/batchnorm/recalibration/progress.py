"""The progress bar of a recalibration."""

from __future__ import annotations


class Bar:
    """On stderr, gone at the end; nothing where the output is no terminal."""

    def __init__(self) -> None:
        # Here and not above: `from batchnorm import *` need not load it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("recalibrating {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("all layers", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def layer(self, name: str, number: int, of: int) -> None:
        """Names the layer that the next pass is for."""
        self._bar.update(self._task, description=f"{name} ({number} of {of})")

    def begin(self, batches: int | None) -> None:
        """A pass over so many batches, None: nobody knows how many."""
        self._bar.reset(self._task, total=batches)

    def advance(self) -> None:
        """One batch more."""
        if not self._bar.disable:  # it would take a lock for nothing
            self._bar.advance(self._task)
