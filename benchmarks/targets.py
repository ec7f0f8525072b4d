"""What the CPU core is meant to reach, as data, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from results import Row
from workers import AS_IT_COMES, TUNED
from workloads import ABOUT, FEW, LARGE, SMALL_MAPS, TINY


class Target(NamedTuple):
    """Bounds for one class of shapes; None where nothing is asked."""

    group: str
    kinds: tuple[str, ...]
    """"contiguous", "channels_last", or "matrix" for (N, C)."""
    forward: float | None = None
    """At most so many times a copy; BN alone. Likewise backward and inference."""
    backward: float | None = None
    inference: float | None = None
    eager: float | None = None
    """At least so many times as fast as torch, BN+ReLU forward and backward, both with memory as it comes."""
    tuned: float | None = None
    """Likewise against torch with malloc tuned."""
    compile: float | None = None
    """At least so many times as fast as torch.compile, BN forward."""
    call_us: float | None = None
    """At most so many microseconds for a forward call."""


TARGETS = (
    Target(LARGE, ("contiguous",), 1.1, 1.7, 0.85, eager=10, tuned=3, compile=6),
    Target(LARGE, ("channels_last", "matrix"), 1.35, 2.3, 0.9, eager=7, tuned=1.8, compile=5),
    Target(ABOUT, ("contiguous", "channels_last"), 1.4, 2.7, 1.1, eager=2.5, compile=2.5),
    Target(ABOUT, ("matrix",), 1.7, 3.2, eager=2.5, compile=2.5),
    Target(SMALL_MAPS, ("contiguous", "channels_last"), 1.8, 2.8, 1.3, eager=4, compile=4),
    Target(FEW, ("contiguous",), 1.5, 2.4, 1.05, eager=7, compile=5),
    Target(FEW, ("channels_last", "matrix"), 1.5, 2.4, 1.05, eager=50, compile=5),
    Target(TINY, ("contiguous", "channels_last", "matrix"), eager=1.8, compile=4, call_us=5),
)
NETWORK_SPEEDUP = {"ResNet-20": 1.3}
"""A training step, layers swapped and nothing else, against eager; memory as it comes."""

_QUANTITIES = {
    "forward": "BN forward, times a copy",
    "backward": "BN backward, times a copy",
    "inference": "BN inference, times a copy",
    "eager": "BN+ReLU forward+backward, times as fast as eager",
    "tuned": "BN+ReLU forward+backward, times as fast as eager, malloc tuned",
    "compile": "BN forward, times as fast as torch.compile",
    "call_us": "BN forward call, microseconds",
}
BUSY = 0.15
"""Cores in use by others from which on a row proves nothing: a thread that waits for one without a core loses whole
time slices, 16 ms for a call of 20 us, and whose call has more barriers loses more of them."""
_AT_MOST = ("forward", "backward", "inference", "call_us")


class Verdict(NamedTuple):
    """One bound and the figure seen; `where` says which case was worst."""

    title: str
    quantity: str
    is_at_most: bool
    bound: float
    figure: float
    where: str
    is_busy: bool
    """Whether other processes used the cores while any case of the class was measured."""

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps the bound, on a machine that nobody else used."""
        keeps = self.figure <= self.bound if self.is_at_most else self.figure >= self.bound
        return keeps and not self.is_busy

    @property
    def judgement(self) -> str:
        """ "met", "missed", or "no verdict" for a figure taken beside other work."""
        return "no verdict" if self.is_busy else "met" if self.is_met else "missed"


class _Table:
    """Rows by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        names = ("shape", "dtype", "layout", "operation", "peer", "memory", "phase")
        self._rows = {tuple(row[name] for name in names): row for row in rows}
        self.cases = {key[:3]: row["group"] for key, row in self._rows.items()}
        self._busy = {key[:3] for key, row in self._rows.items() if not float(row["others"] or "nan") <= BUSY}
        self.memories = tuple(dict.fromkeys(key[5] for key in self._rows))

    def is_busy(self, cases: Iterable[tuple[str, ...]]) -> bool:
        """Whether any of the cases was measured beside other work, or nobody knows."""
        return any(case in self._busy for case in cases)

    def us(self, case: tuple[str, ...], operation: str, peer: str, memory: str, phase: str) -> float | None:
        row = self._rows.get((*case, operation, peer, memory, phase))
        return None if row is None else float(row["median_us"])

    def copies(self, case: tuple[str, ...], memory: str, phase: str) -> float | None:
        row = self._rows.get((*case, "bn", "ours", memory, phase))
        return None if row is None else float(row["times_copy"])

    def pairs(self) -> Iterable[tuple[str, float]]:
        """Each row of ours that has one of eager's beside it: its name, and how many times as fast it is."""
        for key, row in self._rows.items():
            *where, peer, memory, phase = key
            eager = self._rows.get((*where, "eager", memory, phase))
            if peer == "ours" and eager is not None:
                yield f"{' '.join(where)} {phase}, {memory}", float(eager["median_us"]) / float(row["median_us"])


def verdicts(rows: Iterable[Row], dtype: str, memory: str) -> list[Verdict]:
    """Every bound for which there are rows, with the worst figure of its class.

    Args:
        rows: of one run.
        dtype: "float32" or "bfloat16".
        memory: under which setting ours is judged; the peers are judged as their targets say.
    """
    table = _Table(rows)
    found = []
    for target in TARGETS:
        for name, quantity in _QUANTITIES.items():
            bound = getattr(target, name)
            if bound is None:
                continue
            figures = [
                (figure, case)
                for case, group in table.cases.items()
                if group == target.group and case[1] == dtype and _kind(case) in target.kinds
                if (figure := _figure(table, case, name, memory)) is not None
            ]
            if figures:
                worst = max(figures) if name in _AT_MOST else min(figures)
                title = f"{target.group}, {' and '.join(target.kinds)}"
                busy = table.is_busy(case for _, case in figures)
                where = f"{worst[1][0]} {worst[1][2]}"
                found.append(Verdict(title, quantity, name in _AT_MOST, bound, worst[0], where, busy))
    for case, group in table.cases.items():
        network = case[0].split(" ")[0]
        if group != "networks" or network not in NETWORK_SPEEDUP or case[1] != dtype:
            continue
        eager, ours = (
            table.us(case, "training step", peer, where, "step")
            for peer, where in (("eager", AS_IT_COMES), ("ours", memory))
        )
        if eager and ours:
            what = "training step, times as fast as eager"
            bound = NETWORK_SPEEDUP[network]
            found.append(
                Verdict(f"{network}, {case[2]}", what, False, bound, eager / ours, case[0], table.is_busy([case]))
            )
    return found


def slower_than_eager(rows: Iterable[Row]) -> tuple[list[str], int]:
    """Where ours takes longer than eager under the same setting of the memory, worst first; and of how many rows."""
    pairs = sorted((ratio, name) for name, ratio in _Table(rows).pairs())
    return [f"{ratio:.2f} times as fast: {name}" for ratio, name in pairs if ratio < 1], len(pairs)


def report(rows: Sequence[Row]) -> str:
    """The targets beside the figures seen, as text."""
    memories = [memory for memory in _Table(rows).memories if memory != TUNED]
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for memory in memories:
            found = verdicts(rows, dtype, memory)
            if not found:
                continue
            met = sum(verdict.is_met for verdict in found)
            note = "" if dtype == "float32" else " (bounds set for float32)"
            lines.append(
                f"\nTargets, {dtype}{note}, memory {memory}: {met} of {len(found)} met; worst shape of each class"
            )
            lines += _lines(found)
    slower, count = slower_than_eager(rows)
    busy = [float(row["others"] or "nan") for row in rows if not float(row["others"] or "nan") <= BUSY]
    judged = "missed" if slower else "no verdict" if busy else "met"
    lines.append(f"\nNever slower than eager: {judged}, slower in {len(slower)} of {count} rows")
    lines += [f"  {line}" for line in slower]
    if busy:
        lines.append(
            f"\nOTHER PROCESSES USED THE CORES (up to {max(busy):.1f} of them) in {len(busy)} of {len(rows)} rows: "
            "ratios there can be wrong by orders of magnitude, either way. Run it again with the machine at rest."
        )
    return "\n".join(lines).strip()


def _lines(found: list[Verdict]) -> list[str]:
    lines: list[str] = []
    title = ""
    for verdict in found:
        if verdict.title != title:
            title = verdict.title
            lines.append(f"  {title}")
        sign = "<=" if verdict.is_at_most else ">="
        figures = f"{sign} {verdict.bound:5.2f} {verdict.figure:7.2f}"
        lines.append(f"    {verdict.quantity:63s} {figures}  {verdict.judgement:10s}  {verdict.where}")
    return lines


def _kind(case: tuple[str, ...]) -> str:
    return "matrix" if case[0].count("x") == 1 else case[2]


def _figure(table: _Table, case: tuple[str, ...], name: str, memory: str) -> float | None:
    if name in ("forward", "backward", "inference"):
        return table.copies(case, memory, name)
    if name == "call_us":
        return table.us(case, "bn", "ours", memory, "forward")
    if name == "compile":
        theirs = table.us(case, "bn", "compile", AS_IT_COMES, "forward")
        ours = table.us(case, "bn", "ours", memory, "forward")
    else:
        theirs_memory = AS_IT_COMES if name == "eager" else TUNED
        theirs = table.us(case, "bn_relu", "eager", theirs_memory, "forward+backward")
        # Tuned malloc serves our outputs too; the pool takes its place.
        ours_memory = TUNED if name == "tuned" and memory == AS_IT_COMES else memory
        ours = table.us(case, "bn_relu", "ours", ours_memory, "forward+backward")
    return theirs / ours if theirs and ours else None
