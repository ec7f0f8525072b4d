"""Processes that measure in turns, so that peers under different settings of the memory are interleaved too.

A worker waits for a line on its standard input, and uses no core meanwhile; the parent decides whose turn it is.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from machine import HERE, Others
from timing import Contender, Summary, summary

AS_IT_COMES = "as it comes"
TUNED = "malloc tuned"
POOL_OFF = "pool off"
"""Nothing of ours touches the memory: what our peers measured there is the memory as it comes to them."""
_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"
_POOL_MB = "BATCHNORM_POOL_MB"
_WARM = 3e-3
"""Seconds: a small network's first steps after another process's turn took up to 30 % longer. A layer goes without:
repeated for so long, a copy would find both its tensors in a cache."""


class Measured(NamedTuple):
    """What was found for one peer under one setting of the memory, in one phase."""

    peer: str
    memory: str
    phase: str
    calls: int
    time: Summary
    others: float
    """Cores that other processes kept busy meanwhile."""


def environments(output_pool: str) -> dict[str, dict[str, str]]:
    """Settings of the memory: as it comes, malloc tuned, and our output pool the other way than it is configured.

    Args:
        output_pool: what `batchnorm info` says about the pool.
    """
    other = ("pool on", "512") if output_pool.startswith("off") else (POOL_OFF, "0")
    return {AS_IT_COMES: {}, TUNED: {"GLIBC_TUNABLES": _TUNABLES}, other[0]: {_POOL_MB: other[1]}}


class Worker:
    """A process of its own, with its own copy of everything that is measured in it."""

    def __init__(self, memory: str, environment: Mapping[str, str]) -> None:
        self.memory = memory
        inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "workers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited, **environment},
        )
        self.process_id = self._process.pid

    def ask(self, **request: Any) -> Any:
        """The answer to one request; see `_answer`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures {self.memory!r} ended at {request}; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.communicate()


def measure(
    workers: Sequence[Worker],
    task: str,
    fields: Mapping[str, Any],
    peers: Mapping[str, Sequence[str]],
    *,
    budget: float,
    at_least: int,
    at_most: int = 40,
) -> list[Measured]:
    """Samples all peers of all workers in turn, round after round, until the budget is spent.

    Args:
        workers: the processes.
        task: "layer" or "network".
        fields: the case, or the network.
        peers: by the worker's memory; what a worker has no peers for is not measured there.
        budget: seconds of measuring, warm-up not counted; a round that has begun is finished.
        at_least: rounds, even where the budget is spent.
        at_most: rounds.
    """
    turns = []
    for worker in workers:
        if worker.memory in peers:
            calls = worker.ask(prepare=task, fields=fields, peers=list(peers[worker.memory]))
            turns += [(worker, peer, number) for peer, number in calls.items()]
    taken: dict[tuple[str, str, str, int], list[float]] = {}
    others = Others(worker.process_id for worker in workers)
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < at_least or (time.perf_counter() < end and rounds < at_most):
        # Who comes first after another process had the cores pays for it: now one, now the other.
        for worker, peer, calls in turns if rounds % 2 else turns[::-1]:
            for sample in worker.ask(turn=peer):
                for phase, seconds in sample.items():
                    taken.setdefault((peer, worker.memory, phase, calls), []).append(seconds)
        rounds += 1
    busy = others.cores()
    return [
        Measured(peer, memory, phase, calls, summary(values), busy)
        for (peer, memory, phase, calls), values in taken.items()
    ]


def _answer(request: dict[str, Any], contenders: dict[str, Contender]) -> Any:
    """Prepares the peers of a task (how many calls make a sample of each), or takes one peer's turn (its samples)."""
    if "turn" in request:
        return contenders[request["turn"]].turn()
    contenders.clear()
    gc.collect()
    if request["prepare"] == "network":
        import networks

        samplers = networks.samplers(**request["fields"], names=request["peers"])
    else:
        import peers
        import workloads

        samplers = peers.samplers(workloads.Case.of(request["fields"]), request["peers"])
    warm = _WARM if request["prepare"] == "network" else 0.0
    contenders.update({peer: Contender(sample, warm) for peer, sample in samplers.items()})
    return {peer: contender.calls for peer, contender in contenders.items()}


def _work() -> None:
    # Libraries print; the pipe is for answers only.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    contenders: dict[str, Contender] = {}
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), contenders)), file=pipe, flush=True)


if __name__ == "__main__":
    _work()
