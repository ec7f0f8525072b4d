"""What a study shows on the terminal while it runs: progress, each verdict as it stands, and the table at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from batchnorm.reporting.numbers import interval, quantity

if TYPE_CHECKING:
    from batchnorm.lab.comparison import Comparison
    from batchnorm.lab.report import Judged
    from batchnorm.lab.study import Progress as ClaimProgress
    from batchnorm.lab.watching import Told

_MARKS = {"shown": ("●", "green"), "partly": ("◐", "yellow"), "not shown": ("○", "bright_black")}


class Display:
    """The terminal: a bar while there is one, plain lines where the output goes elsewhere.

    A context manager around the training; Ctrl-C inside it ends it quietly and is noted.

    Args:
        results_on_stdout: leave stdout to the results and write everything on stderr.

    Attributes:
        was_interrupted: whether Ctrl-C ended the training.
        failed: runs that were given up.
    """

    def __init__(self, *, results_on_stdout: bool) -> None:
        self.was_interrupted, self.failed = False, 0
        self._console = Console(stderr=results_on_stdout, highlight=False)
        self._bar = _Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[runs]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None, runs="", left="")
        self._runs: dict[str, tuple[int, int]] = {}
        self._failed: dict[str, int] = {}

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._bar.stop()
        self.was_interrupted = kind is KeyboardInterrupt
        return self.was_interrupted

    @contextmanager
    def watching(self, is_elsewhere: bool) -> Iterator[str]:
        """A folder into which the processes of this machine write what they train; "" where nobody would see it."""
        if is_elsewhere or not self._console.is_terminal:
            yield ""
            return
        with tempfile.TemporaryDirectory(prefix="batchnorm-study-", ignore_cleanup_errors=True) as folder:
            self._bar.folder = Path(folder)
            try:
                yield folder
            finally:
                self._bar.folder = None

    def progress(self, at: ClaimProgress) -> None:
        """Show how many runs are done; the bar names the first claim that is not finished."""
        name = at.claim.CARD.name
        if at.failed > self._failed.get(name, 0):
            self.say(f"A run of {name} failed: its workers died, {at.failed} of {at.total} so far.")
        self._failed[name] = at.failed
        self.failed = sum(self._failed.values())
        self._runs[name] = (at.done + at.failed, at.total)
        running = next((name for name, (done, total) in self._runs.items() if done < total), "done")
        done, total = (sum(column) for column in zip(*self._runs.values(), strict=True))
        # Runs cost very different times from claim to claim, so each claim gets the same part of the bar.
        parts = sum(done / total for done, total in self._runs.values())
        left = "" if at.seconds_left is None or running == "done" else f"{_clock(at.seconds_left)} left"
        self._bar.update(
            self._task,
            description=running,
            completed=parts,
            total=len(self._runs),
            runs=f"{done}/{total} runs",
            left=left,
        )

    def verdict(self, judged: Judged) -> None:
        """Print a verdict, one line."""
        headline = judged.verdict.headline
        line = _verdict(judged.verdict.verdict, width=11)
        line.append(f"{judged.card.name:<20} {_mean_and_interval(vars(headline))}, {headline.label}")
        line.append(f"  [{judged.seconds:.1f} s]", style="bright_black")
        self._console.print(line, soft_wrap=True)

    def table(self, results: Mapping[str, Any], folder: Path) -> None:
        """Print the verdicts of all finished claims and where the report is."""
        if results["claims"]:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("Claim", ratio=5)
            table.add_column("Verdict", no_wrap=True)
            table.add_column("Mean (95 % interval)", ratio=4)
            table.add_column("Seconds", justify="right", no_wrap=True)
            for claim in results["claims"]:
                ours = _mean_and_interval(claim["headline"])
                table.add_row(Text(claim["title"]), _verdict(claim["verdict"]), Text(ours), f"{claim['seconds']:.1f}")
            self._console.print(table)
        if results["study"]["unfinished"]:
            self.say("Not finished: " + "; ".join(results["study"]["unfinished"]))
        for what in ("report.html", "results.json", "tables", "figures"):
            if (folder / what).exists():
                self.say(f"  {folder / what}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text), soft_wrap=True)


class _Bar(Progress):
    """The bar, and below it a line for each process that writes into `folder` what it trains."""

    folder: Path | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        """Claim, arm, seed, rate, step and loss of each process, read whenever the bar is drawn."""
        yield from super().get_renderables()
        if self.folder is not None:
            from batchnorm.lab.watching import told

            for one in told(self.folder):
                yield Text(f"  {_training(one)}", style="bright_black", no_wrap=True, overflow="ellipsis")


def _training(one: Told) -> str:
    what = f"{one.claim}, {one.arm}, {f'{one.runs} runs' if one.runs > 1 else f'seed {one.seed}, rate {one.rate:g}'}"
    return what if one.step is None else f"{what}: step {one.step}/{one.steps}, loss {one.loss:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def show_comparison(found: Comparison, *, all_measures: bool) -> None:
    """Print two studies side by side.

    Args:
        found: the comparison.
        all_measures: every measure instead of the headlines alone.
    """
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Claim" if not all_measures else "Claim and measure", ratio=5)
    for name in found.names:
        table.add_column(Path(name).name, ratio=4)
    table.add_column("Intervals", no_wrap=True)
    for row in found.rows if all_measures else found.headlines:
        cells = [
            _verdict(side.verdict, width=11).append(
                _mean_and_interval({**vars(side), "unit": row.unit}), style="default"
            )
            for side in (row.first, row.second)
        ]
        title = f"{row.title}: {row.label}" if all_measures else row.title
        table.add_row(Text(title), *cells, "overlap" if row.intervals_overlap else "differ")
    console.print(table)
    for name, claims in zip(found.names, found.only, strict=True):
        if claims:
            console.print(Text(f"Only in {name}: {', '.join(claims)}"), soft_wrap=True)


def _verdict(verdict: str, *, width: int = 0) -> Text:
    mark, style = _MARKS[verdict]
    return Text(f"{mark} {verdict:<{width}}", style=style)


def _mean_and_interval(measure: Mapping[str, Any]) -> str:
    mean = quantity(measure["mean"], measure["unit"])
    span = interval(measure["low"], measure["high"])
    return f"{mean} ({span})" if span else mean
