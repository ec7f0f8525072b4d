"""Where and with what a run was made: the head of each row of results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_PACKAGES = ("torch", "batchnorm", "numpy", "jax", "onnxruntime", "triton")


def stamp() -> dict[str, Any]:
    """Date, commit, machine, load, versions, and what `batchnorm info` says of the core."""
    import torch

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": f"{load():.2f}",
        "versions": "; ".join(_versions()),
        "settings": "; ".join(f"{name} {value}" for name, value in settings().items()),
    }


def load() -> float:
    """How many processes wanted a core, over the last minute; NaN where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


class Others:
    """How many cores other processes kept busy since this was made; the load average lags by minutes."""

    def __init__(self, processes: Iterable[int]) -> None:
        """`processes`: ids of those that measure."""
        self._processes = [os.getpid(), *processes]
        self._start = time.perf_counter(), self._seconds()

    def cores(self) -> float:
        """Mean since the start; NaN where the system does not tell."""
        begin, busy = self._start
        return max(0.0, (self._seconds() - busy) / max(time.perf_counter() - begin, 1e-9))

    def _seconds(self) -> float:
        """CPU seconds of everybody, less those of the processes that measure."""
        if not Path("/proc/stat").exists():
            return float("nan")
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        ticks = user + nice + system + sum(interrupts)
        for process in self._processes:
            # The second field, a name in parentheses, may hold spaces; user and system time are the 14th and 15th.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks -= int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def settings() -> dict[str, str]:
    """The lines of `batchnorm info` about the backend and its core."""
    lines = subprocess.run(
        [sys.executable, "-m", "batchnorm", "info"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # The command pads names to a column and separates them from values by two spaces or, once, by one.
    pairs = [(line[:16].strip(), line[16:].strip()) for line in lines]
    return {name: value for name, value in pairs if name not in ("batchnorm", "torch", "python")}


def _versions() -> list[str]:
    found = [f"python {platform.python_version()}", " ".join(platform.libc_ver())]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=HERE
        )
    except OSError:
        return ""
    return described.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    parts = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in parts}
    model = named.get("model name", platform.machine())
    return f"{model} (family {named.get('cpu family')}, model {named.get('model')})"
