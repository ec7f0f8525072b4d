"""How far a run is while it trains: a small file for each process, read by the display; curves for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from batchnorm.errors import MissingPackageError
from batchnorm.lab.config import Job, Run, Watch
from batchnorm.lab.measures import key

_EVERY = 0.5
"""Seconds between two words from a process."""
_STALE = 60.0
"""Seconds after which the file of a process that was killed counts no more."""
_SCALARS = 100
"""Batch losses in an event file."""


@dataclass(frozen=True)
class Told:
    """What a process is training.

    Attributes:
        claim: Name of the claim.
        arm: The arm.
        runs: Runs that are trained as one stack, or in turn.
        seed: Of the first of them.
        rate: Of the first of them.
        step: Updates that are made; None where it does not train by steps, or has not begun.
        steps: Updates in all.
        loss: Of the latest batch, mean over a stack; None as for `step`.
    """

    claim: str
    arm: str
    runs: int
    seed: int
    rate: float
    step: int | None = None
    steps: int = 0
    loss: float | None = None


def told(folder: Path) -> list[Told]:
    """What every process that uses `folder` is training now."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            if time.time() - path.stat().st_mtime < _STALE:
                found.append(Told(**json.loads(path.read_text(encoding="utf-8"))))
        except FileNotFoundError:  # it has just ended
            continue
    return found


@contextmanager
def announced(job: Job) -> Iterator[None]:
    """Says that the job is being trained, as long as it is."""
    if not job.watch.folder:
        yield
        return
    _say(job.watch, job.runs, None, None)
    try:
        yield
    finally:
        _place(job.watch).unlink(missing_ok=True)


class Watcher:
    """Tells of runs that are trained together; does nothing, at no cost, where nobody watches.

    Args:
        watch: where to tell.
        runs: the runs, in the order in which their numbers will be given.
    """

    def __init__(self, watch: Watch, runs: Sequence[Run]) -> None:
        self._watch, self._runs = watch, runs
        self._latest = 0.0
        self._writers = [_writer(watch.tensorboard, run) for run in runs] if watch.tensorboard else []
        self._stride = max(1, runs[0].training.steps // _SCALARS)

    def stepped(self, step: int, losses: Tensor | float) -> None:
        """Update number `step` (from 0) was made from batches with these losses, (runs,) or a number."""
        if self._writers and step % self._stride == 0:
            values = [losses] if isinstance(losses, float) else losses.tolist()
            for writer, value in zip(self._writers, values, strict=True):
                _add(writer, "batch_loss", value, step + 1)
        if self._watch.folder and time.monotonic() - self._latest > _EVERY:
            self._latest = time.monotonic()
            mean = losses if isinstance(losses, float) else float(losses.mean())
            _say(self._watch, self._runs, step + 1, mean)

    def evaluated(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        """After `step` updates these are the points of the curves, a row for each run."""
        for writer, row in zip(self._writers, rows, strict=False):
            for name, value in row.items():
                _add(writer, name, value, step)

    def close(self) -> None:
        """Nothing more comes."""
        for writer in self._writers:
            writer.close()


def check_tensorboard() -> None:
    """Raises MissingPackageError where curves cannot be logged."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError("--tensorboard needs TensorBoard: pip install 'batchnorm[tensorboard]'") from error
    return SummaryWriter


def _add(writer: Any, name: str, value: float | None, step: int) -> None:
    if value is not None and math.isfinite(value):  # TensorBoard warns of others, and shows a gap either way
        writer.add_scalar(name, value, step)


def _writer(folder: str, run: Run) -> Any:
    name = f"seed_{run.seed}-rate_{run.rate:g}-{run.key[:6]}"  # runs of an arm may differ in more than seed and rate
    return _summary_writer()(str(Path(folder) / run.claim / key(run.arm) / name), flush_secs=5)


def _place(watch: Watch) -> Path:
    return Path(watch.folder) / f"{os.getpid()}.json"


def _say(watch: Watch, runs: Sequence[Run], step: int | None, loss: float | None) -> None:
    first = runs[0]
    now = Told(first.claim, first.arm, len(runs), first.seed, first.rate, step, first.training.steps, loss)
    place = _place(watch)
    beside = place.with_suffix(".new")
    beside.write_text(json.dumps(asdict(now)), encoding="utf-8")
    os.replace(beside, place)
