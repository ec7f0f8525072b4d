"""Batch normalization on a GPU: a copy, PyTorch eager, torch.compile and ours, side by side in one run.

    make bench-gpu          # or: PYTHONPATH=src python3 benchmarks/gpu.py

Needs the source tree, PyTorch and Triton, and nothing installed: the CPU core may be absent. The twelve activations
of ResNet-50 at batch 256, forward and backward, and the four at which two branches meet that are both normalised; then
a training step of ResNet-50, its time and its memory. Takes less
than eight minutes: what torch.compile has not compiled by then is left out, and said. --dry-run goes through everything
on the CPU with tiny shapes and writes nothing; its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import machine
import torch
import torch.nn.functional as F
from networks import Block, FusedBlock, resnet20, resnet50
from timing import summary
from torch import nn

import batchnorm
from batchnorm.kernels import dispatch
from batchnorm.kernels.contract import Activation

SHAPES = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
"""Channels, and height and width, of the activations that ResNet-50 normalises."""
DUAL = "dual_bn_relu"
DUAL_SHAPES = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
"""Those in which a block with a convolution in its shortcut ends."""
UNITS = {"bn": (3, 5), "bn_relu": (3, 5), "bn_add_relu": (4, 6), DUAL: (5, 8)}
"""Passes over the activation, forward and backward, that kernels with two passes cannot do without; the bits that add
and ReLU keep, a sixteenth of a bfloat16 tensor, are left out."""
COLUMNS = (
    "date", "commit", "machine", "versions", "shape", "dtype", "layout", "operation", "peer", "phase",
    "median_us", "p20_us", "p80_us", "samples", "floor_us", "of_floor", "copy_gb_s", "peak_mb",
)  # fmt: skip
"""floor_us: UNITS at the bandwidth of the copy; of_floor: that over the median. peak_mb: most memory in a step beyond
what was taken before it."""


class Case(NamedTuple):
    """One activation and what is done with it."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str
    operation: str


class Device:
    """Where it runs, and how time is taken there."""

    def __init__(self, is_gpu: bool) -> None:
        self.is_gpu = is_gpu
        self.name = "cuda" if is_gpu else "cpu"
        # Written before each sample: the caches then hold nothing of it, and the GPU is busy while Python launches.
        self._flushed = torch.empty(1 << 30 if is_gpu else 8, dtype=torch.uint8, device=self.name)

    def flush(self) -> None:
        """Empties the caches."""
        self._flushed.zero_()

    def times(self, *parts: Callable[[], object]) -> list[float]:
        """Seconds of each of the parts, done one after another."""
        self.flush()
        if not self.is_gpu:
            marks = [time.perf_counter(), *((part(), time.perf_counter())[1] for part in parts)]
            return [after - before for before, after in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


class Layer(nn.Module):
    """PyTorch's own layer, with the addition and the ReLU of `operation` behind it."""

    def __init__(self, channels: int, operation: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.shortcut = nn.BatchNorm2d(channels) if operation == DUAL else nn.Identity()
        self.operation = operation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        y = self.norm(x)
        if residual is not None:
            y += self.shortcut(residual)
        return y if self.operation == "bn" else F.relu(y, inplace=True)


class Branches(nn.Module):
    """Our layers of two branches, in one pass or one after the other."""

    def __init__(self, channels: int, *, in_turn: bool) -> None:
        super().__init__()
        self.norm = batchnorm.BatchNorm2d(channels, activation="relu")
        self.shortcut = batchnorm.BatchNorm2d(channels)
        self.in_turn = in_turn

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
        if self.in_turn:
            return self.norm(x, self.shortcut(other))
        return batchnorm.dual_batch_norm(self.norm, x, self.shortcut, other)


def peers(case: Case, device: Device, *, with_compile: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """Each contender as a function of x and the residual."""
    channels = case.shape[1]
    eager = Layer(channels, case.operation).to(device.name)
    found: dict[str, Callable[..., torch.Tensor]] = {"eager": eager}
    if case.operation == DUAL:
        found["ours"] = Branches(channels, in_turn=False).to(device.name)
        found["ours, in turn"] = Branches(channels, in_turn=True).to(device.name)
    else:
        activation: Activation | None = None if case.operation == "bn" else "relu"
        found["ours"] = batchnorm.BatchNorm2d(channels, activation=activation).to(device.name)
    if with_compile:
        torch._dynamo.reset()
        found["compile"] = compiled(Layer(channels, case.operation).to(device.name), device)
    return found


def compiled(model: nn.Module, device: Device) -> Any:
    """The model as torch.compile runs it; in a dry run without a compiler behind it, which would take minutes."""
    return torch.compile(model, dynamic=False, backend="inductor" if device.is_gpu else "eager")


def tensors(case: Case, device: Device) -> list[torch.Tensor]:
    """x, residual and dy."""
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device.name).manual_seed(0)
    made = (torch.randn(case.shape, generator=generator, device=device.name, dtype=case.dtype) for _ in range(3))
    return [one.to(memory_format=layout) for one in made]


def measure(case: Case, device: Device, samples: int, *, with_compile: bool) -> dict[tuple[str, str], list[float]]:
    """Seconds by peer and phase, the peers taking turns.

    Raises:
        AssertionError: peers disagree about the same activation.
    """
    x, residual, dy = tensors(case, device)
    x.requires_grad_()
    added = residual.requires_grad_() if case.operation in ("bn_add_relu", DUAL) else None
    wanted = [t for t in (x, added) if t is not None]
    seconds: dict[tuple[str, str], list[float]] = {}
    contenders = peers(case, device, with_compile=with_compile)

    def turn(function: Callable[..., torch.Tensor]) -> list[float]:
        kept: list[torch.Tensor] = []
        return device.times(
            lambda: kept.append(function(x, added)),
            lambda: torch.autograd.grad(kept.pop(), wanted, dy),
        )

    expected = contenders["eager"](x, added).detach()
    tolerance = 5e-2 if case.dtype == torch.bfloat16 else 1e-3
    for name, function in contenders.items():
        torch.testing.assert_close(function(x, added).detach(), expected, rtol=tolerance, atol=tolerance, msg=name)
        for _ in range(3):
            turn(function)
    del expected
    for _ in range(samples):
        for name, function in contenders.items():
            forward, backward = turn(function)
            for phase, took in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                seconds.setdefault((name, phase), []).append(took)
    return seconds


def copy_bandwidth(device: Device, samples: int) -> float:
    """Bytes read and written a second by a copy of half a gigabyte."""
    source = torch.randn(1 << (28 if device.is_gpu else 10), device=device.name).to(torch.bfloat16)
    target = torch.empty_like(source)
    took = [device.times(lambda: target.copy_(source))[0] for _ in range(3 + samples)][3:]
    return 2 * source.nbytes / summary(took).median


def rows_of(
    case: Case, seconds: dict[tuple[str, str], list[float]], bandwidth: float, stamp: dict[str, Any]
) -> Iterable[dict[str, Any]]:
    """What the table says of a case."""
    forward, backward = UNITS[case.operation]
    nbytes = torch.Size(case.shape).numel() * case.dtype.itemsize
    for (peer, phase), taken in seconds.items():
        units = {"forward": forward, "backward": backward, "both": forward + backward}[phase]
        floor = units * nbytes / bandwidth
        found = summary(taken)
        yield {
            **stamp, "shape": "x".join(map(str, case.shape)), "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout, "operation": case.operation, "peer": peer, "phase": phase,
            **_microseconds(found), "floor_us": f"{floor * 1e6:.2f}", "of_floor": f"{floor / found.median:.3f}",
            "copy_gb_s": f"{bandwidth / 1e9:.0f}", "peak_mb": "",
        }  # fmt: skip


def _microseconds(found: Any) -> dict[str, Any]:
    names = zip(("median_us", "p20_us", "p80_us"), found[:3], strict=True)
    return {**{name: f"{value * 1e6:.2f}" for name, value in names}, "samples": found.samples}


def training_steps(
    device: Device, samples: int, stamp: dict[str, Any], *, with_compile: bool
) -> Iterable[dict[str, Any]]:
    """Whole steps of ResNet-50 at batch 256 in bfloat16, channels-last, the networks taking turns."""
    build, shape = (resnet50, (256, 3, 224, 224)) if device.is_gpu else (resnet20, (4, 3, 32, 32))
    torch.manual_seed(0)
    state = build(nn.BatchNorm2d).state_dict()
    x = torch.randn(shape, device=device.name).to(memory_format=torch.channels_last)
    labels = torch.randint(10, shape[:1], device=device.name)

    def network(norm: Any, block: type[Block]) -> nn.Module:
        made = build(norm, block)
        made.load_state_dict(state)
        return made.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]

    saving = "ours, fused, save_memory"
    networks = {
        "eager": network(nn.BatchNorm2d, Block),
        "ours": network(batchnorm.BatchNorm2d, Block),
        "ours, fused": network(batchnorm.BatchNorm2d, FusedBlock),
        saving: network(batchnorm.BatchNorm2d, FusedBlock),
    }
    if with_compile:
        torch._dynamo.reset()
        networks["compile"] = compiled(network(nn.BatchNorm2d, Block), device)
    optimizers = {name: torch.optim.SGD(one.parameters(), 0.01, momentum=0.9) for name, one in networks.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        memory = batchnorm.save_memory() if name == saving else nullcontext()
        with memory, torch.autocast("cuda", torch.bfloat16) if device.is_gpu else nullcontext():
            loss = F.cross_entropy(networks[name](x), labels)
        loss.backward()
        optimizers[name].step()

    seconds: dict[str, list[float]] = {name: [] for name in networks}
    peak = dict.fromkeys(networks, "")
    for name in networks:
        for _ in range(3 if device.is_gpu else 1):
            step(name)
        if device.is_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(name)
            torch.cuda.synchronize()
            peak[name] = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
    for _, name in itertools.product(range(samples), networks):
        seconds[name] += device.times(lambda name=name: step(name))  # type: ignore[misc]
    for name, taken in seconds.items():
        yield {
            **stamp, "shape": "x".join(map(str, shape)), "dtype": "bfloat16" if device.is_gpu else "float32",
            "layout": "channels_last", "operation": "training step", "peer": name, "phase": "step",
            **_microseconds(summary(taken)), "floor_us": "", "of_floor": "", "copy_gb_s": "", "peak_mb": peak[name],
        }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> str:
    """Ours against each peer, over the shapes: median ratio, worst ratio, and the share of the copy's bandwidth."""
    lines = []
    keys = ("dtype", "layout", "operation")
    shapes = [row for row in rows if row["phase"] == "both"]
    for kind in dict.fromkeys(tuple(row[key] for key in keys) for row in shapes):
        of_kind = [row for row in shapes if tuple(row[key] for key in keys) == kind]
        by_peer = {
            peer: {row["shape"]: float(row["median_us"]) for row in of_kind if row["peer"] == peer}
            for peer in ("eager", "compile", "ours, in turn", "ours")
        }
        parts = []
        for peer in ("eager", "compile", "ours, in turn"):
            ratios = sorted(took / by_peer["ours"][shape] for shape, took in by_peer[peer].items())
            if ratios:
                parts.append(f"{peer} {ratios[len(ratios) // 2]:.2f}x (least {ratios[0]:.2f}x of {len(ratios)})")
        large = [row for row in of_kind if row["peer"] == "ours" and float(row["floor_us"]) >= _LARGE_US]
        if large:
            least = min(float(row["of_floor"]) for row in large)
            parts.append(f"at least {least:.0%} of the copy's bandwidth on {len(large)} large tensors")
        lines.append(f"{' '.join(kind):<40} ours against {'; '.join(parts)}")
    steps = {row["peer"]: row for row in rows if row["phase"] == "step"}
    for peer, row in steps.items():
        ratio = float(steps["eager"]["median_us"]) / float(row["median_us"])
        memory = f", {row['peak_mb']} MB" if row["peak_mb"] else ""
        lines.append(f"training step, {peer:<26} {float(row['median_us']) / 1e3:.1f} ms, {ratio:.2f}x eager{memory}")
    return "\n".join(lines)


_LARGE_US = 8 * 100e6 / 4.8e12 * 1e6
"""The floor of 100 MB in eight passes at the bandwidth of an H200: from there on a tensor is large."""


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which torch.compile compiles no more")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny; writes nothing")
    asked = parser.parse_args()
    start = time.monotonic()
    if not asked.dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here: benchmarks/gpu.py --dry-run goes through it on the CPU.")
    device = Device(not asked.dry_run)
    stamp = _stamp(device)
    bandwidth = copy_bandwidth(device, asked.samples)
    print(f"{stamp['machine']}, {stamp['versions']}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    if device.is_gpu:
        why = dispatch.why_no_triton(torch.device("cuda", torch.cuda.current_device()))
        if why:
            sys.exit(f"The GPU kernels cannot run here: {why}")
    # What is asked for first comes first: bfloat16 and channels-last, as networks are trained on GPUs.
    dtypes, layouts = (torch.bfloat16, torch.float32), ("channels_last", "contiguous")
    if not device.is_gpu:
        dispatch.set_backend("triton")
    rows: list[dict[str, Any]] = []
    seconds = asked.minutes * 60
    steps_take = 0.4 * seconds  # of which most is compiling ResNet-50
    left_out = 0
    cases = [
        Case((256, channels, size, size) if device.is_gpu else (4, 8, 3, 3), dtype, layout, operation)
        for dtype, layout, operation in itertools.product(dtypes, layouts, UNITS)
        for channels, size in (DUAL_SHAPES if operation == DUAL else SHAPES)[: None if device.is_gpu else 1]
    ]
    for case in cases:
        with_compile = time.monotonic() - start < seconds - steps_take
        left_out += not with_compile
        rows += rows_of(case, measure(case, device, asked.samples, with_compile=with_compile), bandwidth, stamp)
    dispatch.set_backend("auto")
    with_compile = time.monotonic() - start < 0.8 * seconds
    rows += training_steps(device, asked.samples, stamp, with_compile=with_compile)
    print(report(rows))
    if left_out:
        print(f"torch.compile was left out of {left_out} cases: there was no time to compile them (--minutes).")
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s")
    if device.is_gpu:
        path = asked.out / f"gpu-{time.strftime('%Y-%m-%d-%H%M')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"written to {path}")


def _stamp(device: Device) -> dict[str, Any]:
    found = machine.stamp()
    name = torch.cuda.get_device_name() if device.is_gpu else found["machine"]
    return {"date": found["date"], "commit": found["commit"], "machine": name, "versions": found["versions"]}


if __name__ == "__main__":
    main()
