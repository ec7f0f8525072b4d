"""One layer against its peers: runs the cases and writes a CSV with times as ratios to a copy of the same tensor.

Two processes take turns, case by case: one as it comes, with all peers, and one with malloc tuned, with torch alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"}
PLAIN_PEERS = ("copy", "eager", "compile", "ours", "jax", "onnxruntime")
TUNED_PEERS = ("copy", "eager", "ours")
COLUMNS = (
    "date", "commit", "machine", "cores", "threads", "versions", "group", "case", "peer", "malloc", "phase",
    "median_us", "p20_us", "p80_us", "samples", "times_copy",
)  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case of each class, under two minutes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work()
        return
    from cases import cases

    chosen = [case for case in cases(quick=options.quick) if options.only in case.name]
    budget = 0.15 if options.quick else 0.6
    rows: list[dict[str, Any]] = []
    workers = {"as it comes": _Worker({}, PLAIN_PEERS), "tuned": _Worker(TUNED, TUNED_PEERS)}
    head = stamp()
    for number, case in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {case.name}", flush=True)
        for malloc, worker in workers.items():
            found = worker.measure(options.quick, case.name, budget)
            copy = {phase: summary[0] for peer, phase, summary in found if peer == "copy"}
            for peer, phase, (median, low, high, samples) in found:
                limit = copy.get(phase, copy["forward"])
                times = {"median_us": median * 1e6, "p20_us": low * 1e6, "p80_us": high * 1e6}
                rows.append(
                    {**head, "group": case.group, "case": case.name, "peer": peer, "malloc": malloc, "phase": phase}
                    | {name: f"{value:.2f}" for name, value in times.items()}
                    | {"samples": samples, "times_copy": f"{median / limit:.3f}"}
                )
        _print_case(rows, case.name)
    for worker in workers.values():
        worker.close()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"layers{'-quick' if options.quick else ''}-{head['date'][:10]}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


class _Worker:
    """A process that measures one case at a time; waiting, it uses no core."""

    def __init__(self, environment: dict[str, str], peers: tuple[str, ...]) -> None:
        self.peers = peers
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "layers.py"), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def measure(self, quick: bool, case: str, budget: float) -> list[tuple[str, str, list[float]]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"quick": quick, "case": case, "peers": self.peers, "budget": budget}) + "\n"
        )
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a measuring process ended while it measured {case!r}; its error stands above")
        answer: list[tuple[str, str, list[float]]] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _work() -> None:
    from cases import cases
    from peers import samplers
    from timing import interleave

    for line in sys.stdin:
        asked = json.loads(line)
        (case,) = [case for case in cases(quick=asked["quick"]) if case.name == asked["case"]]
        found = interleave(samplers(case, tuple(asked["peers"])), budget=asked["budget"])
        print(json.dumps([[peer, phase, summary] for (peer, phase), summary in found.items()]), flush=True)


def _print_case(rows: list[dict[str, Any]], case: str) -> None:
    here = [row for row in rows if row["case"] == case]
    for peer, malloc in dict.fromkeys((row["peer"], row["malloc"]) for row in here):
        times = {row["phase"]: row for row in here if (row["peer"], row["malloc"]) == (peer, malloc)}
        text = "  ".join(f"{phase} {row['times_copy']} ({row['median_us']} us)" for phase, row in times.items())
        print(f"    {peer:12s} {malloc:12s} times copy: {text}")


def stamp() -> dict[str, Any]:
    """Date, commit, machine and versions: the head of each row."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "date": datetime.fromtimestamp(time.time(), timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": "; ".join(
            [
                f"python {platform.python_version()}",
                *(f"{name} {metadata.version(name)}" for name in ("torch", "batchnorm")),
            ]
        ),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(part for line in info.read_text().splitlines() if len(part := line.split(":", 1)) == 2)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    return (
        f"{named.get('model name', platform.machine())} (family {named.get('cpu family')}, model {named.get('model')})"
    )


if __name__ == "__main__":
    main()
