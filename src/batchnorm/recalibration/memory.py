"""How much memory there is to keep activations in."""

from __future__ import annotations

from pathlib import Path

import torch

_UNKNOWN = 4 << 30
"""Where the system does not tell: bytes."""


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, other programs and the limit of a container considered."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    known = [found for found in (_of_system(), _of_container()) if found is not None]
    return min(known, default=_UNKNOWN)


def _of_system(file: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        most = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if most == "max" else max(int(most) - int(used), 0)
