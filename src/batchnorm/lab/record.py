"""records.jsonl: everything that was trained, one line a run, only ever appended to.

The first line of a file says that it is ours. Each session adds a line with what was asked for; each run adds

    {"key", "claim", "arm", "seed", "rate", "config", "curves", "values", "seconds", "versions", "machine", "commit",
     "data"}

    key        `Run.key`, under which a finished run is found again
    config     `Run.config`
    curves     name -> list; "step" holds the evaluation steps, the other lists go with it
    values     name -> anything else that was measured in the run
    seconds    compute time, in seconds: the time of the stack divided by its number of runs
    versions   of python, torch, numpy and this package
    machine    processor and number of cores
    commit     of the source, where it runs from a checkout; null elsewhere
    data       name and sha256 of the data set

A job whose worker died again and again adds {"failed": {"claim", "keys", "reason"}}: its runs are trained anew in the
next session, and until then their claim is not finished.

A line that a break-off left incomplete can only be the last one; it is dropped, and its run is trained again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from batchnorm.errors import ArgumentError
from batchnorm.lab.claim import Record
from batchnorm.lab.config import Run

RECORDS = "records.jsonl"
_HEADER = {"format": "batchnorm study", "schema": 1}


@dataclass(frozen=True)
class Session:
    """What one call of the study asked for.

    Attributes:
        tier: Which tier.
        seeds: The seeds, ascending.
        claims: Names of the claims, in the study's order.
        environment: Of the machine that trained: see `environment`.
        images: What "images" means in its runs, as results.json lists a data set; None where it had none.
        network: The user's network, package.module:factory; "" where it had none.
    """

    tier: str
    seeds: tuple[int, ...]
    claims: tuple[str, ...]
    environment: Mapping[str, Any]
    images: Mapping[str, Any] | None = None
    network: str = ""


def environment() -> dict[str, Any]:
    """Versions and machine, as results.json states them. Imports no framework to find out."""
    versions = _versions()
    return {
        "python": versions["python"],
        "torch": versions["torch"],
        "numpy": versions["numpy"],
        "batchnorm": versions["batchnorm"],
        "platform": platform.platform(),
        **_machine(),
    }


def make_record(
    run: Run,
    *,
    curves: Mapping[str, Sequence[float]],
    values: Mapping[str, Any],
    seconds: float,
    data_sha256: str,
) -> dict[str, Any]:
    """The record of a run that is finished; numbers that are not finite become None, which JSON can hold."""
    record = {
        "key": run.key,
        "claim": run.claim,
        "arm": run.arm,
        "seed": run.seed,
        "rate": run.rate,
        "config": run.config,
        "curves": dict(curves),
        "values": dict(values),
        "seconds": round(seconds, 4),
        "versions": _versions(),
        "machine": _machine(),
        "commit": _commit(),
        "data": {"name": run.training.data, "sha256": data_sha256},
    }
    plain: dict[str, Any] = _finite(record)
    return plain


def significant(value: float, digits: int = 6) -> float:
    """`value` rounded to a number of significant digits, which keeps records.jsonl small.

    >>> significant(1234.56789), significant(float("inf"))
    (1234.57, inf)
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else float(value)


class RecordFile:
    """The records of an output folder.

    Args:
        folder: The output folder. It may be missing, be empty, or hold a study.

    Raises:
        ArgumentError: The folder holds something else, or is no folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORDS
        _refuse_foreign(folder)

    def open(self, session: Session) -> None:
        """Create the file where it is missing, cut off an incomplete last line, and note what is asked for."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        if self.path.exists():
            text = self.path.read_bytes()
            complete = text.rfind(b"\n") + 1
            if complete < len(text):
                os.truncate(self.path, complete)
        if not self.path.exists() or self.path.stat().st_size == 0:
            lines.append(_HEADER)
        lines.append(
            {
                "session": {
                    "tier": session.tier,
                    "seeds": list(session.seeds),
                    "claims": list(session.claims),
                    "environment": dict(session.environment),
                    "images": None if session.images is None else dict(session.images),
                    "network": session.network,
                }
            }
        )
        self._append(lines)

    def append(self, records: Iterable[Record]) -> None:
        """Add finished runs, in one write."""
        self._append([dict(record) for record in records])

    def note_failure(self, claim: str, keys: Sequence[str], reason: str) -> None:
        """Add that these runs of a claim could not be trained."""
        self._append([{"failed": {"claim": claim, "keys": list(keys), "reason": reason}}])

    def failures(self) -> dict[str, str]:
        """Key of each run that could not be trained, and has not been since, and why."""
        lines = self._lines()
        finished = {line["key"] for line in lines if "key" in line}
        failed = [line["failed"] for line in lines if "failed" in line]
        return {key: one["reason"] for one in failed for key in one["keys"] if key not in finished}

    def records(self) -> list[dict[str, Any]]:
        """All finished runs, in the order in which they finished; the first where a key stands twice."""
        found: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            if "key" in line:
                found.setdefault(line["key"], line)
        return list(found.values())

    def sessions(self) -> list[Session]:
        """What was asked for, the latest last."""
        found = [line["session"] for line in self._lines() if "session" in line]
        return [
            Session(
                s["tier"],
                tuple(s["seeds"]),
                tuple(s["claims"]),
                s["environment"],
                s.get("images"),
                s.get("network", ""),
            )
            for s in found
        ]

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        texts = self.path.read_text(encoding="utf-8").split("\n")
        lines = []
        for number, text in enumerate(texts[:-1], start=1):  # what follows the last line end is incomplete
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise ArgumentError(
                    f"{self.path}, line {number}: expected one JSON object a line, got {text[:40]!r}; "
                    "remove the line, and its run is trained again"
                ) from error
        return lines


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArgumentError(f"expected a folder for the output, got the file {str(folder)!r}; name another path")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    if RECORDS not in names:
        raise ArgumentError(
            f"expected a new, an empty or a study's own output folder, but {str(folder)!r} holds something else "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); name another folder"
        )
    with (folder / RECORDS).open("rb") as file:
        first = file.readline()
    if first and not _is_header(first):
        raise ArgumentError(
            f"{str(folder / RECORDS)!r} was not written by this study, or by another version of it: "
            f"expected the first line {json.dumps(_HEADER)}; name another folder"
        )


def _is_header(line: bytes) -> bool:
    try:
        return bool(json.loads(line) == _HEADER)
    except ValueError:
        # A break-off inside the very first line leaves a prefix of it; nothing but the header can follow.
        return json.dumps(_HEADER, separators=(",", ":")).encode().startswith(line)


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "batchnorm")},
    }


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": _processor(), "cores": cores}


@lru_cache(maxsize=1)
def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None where it is installed, or git is not there."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
