"""Measures batch normalization against its peers: layers over shape classes, whole networks in training and evaluation.

Everything in one run is interleaved, sample by sample; see README.md. Writes a CSV and a plot, and says which targets
were met.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import peers
import plot
import results
import tables
import targets
import workloads
from workers import AS_IT_COMES, POOL_OFF, TUNED, Measured, Worker, environments, measure

_PEERS = ["clone", "eager", "compile", "jax", "onnxruntime"]
_NETWORK_SECONDS = {"MLP-3x100": 10.0, "MLP-3x256": 10.0, "ResNet-20": 15.0, "ResNet-50": 60.0}


def main() -> None:
    """Command line."""
    options = _options()
    if options.check:
        print(targets.report(results.read(options.check)))
        return
    if options.publish:
        _publish(results.read(options.publish))
        return
    started = time.perf_counter()
    head = machine.stamp()
    _announce(head)
    settings = environments(machine.settings().get("output pool", "off"))
    workers = [Worker(memory, environment) for memory, environment in settings.items()]
    rows: list[results.Row] = []
    try:
        _measure_layers(workers, _chosen(options), options, head, rows)
        if not options.no_networks:
            _measure_networks(workers, options, head, rows)
    finally:
        for worker in workers:
            worker.close()
    kind = "quick" if options.quick else "shapes" if options.shape or options.only else head["machine"].split(" (")[0]
    path = options.out / f"{head['date'][:10]}-{'-'.join(kind.split())}.csv"
    results.write(path, rows)
    read = results.read(path)
    plotted = plot.save(read, path.with_suffix(""))
    print("\n" + targets.report(read))
    print(f"\nwrote {path}{plotted} in {(time.perf_counter() - started) / 60:.1f} minutes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a shape of each class and ResNet-20, under two minutes")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NxCxHxW", type=_shape, help="these shapes alone, no networks"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this, no networks")
    parser.add_argument("--no-networks", action="store_true", help="layers alone")
    parser.add_argument("--no-layers", action="store_true", help="networks alone")
    parser.add_argument("--out", type=Path, help="folder (default results/ for the whole run, else build/benchmarks)")
    parser.add_argument("--check", type=Path, metavar="CSV", help="measure nothing: the targets of a finished run")
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="CSV",
        help="measure nothing: a finished run into docs/performance.md and docs/images",
    )
    options = parser.parse_args()
    is_part = options.quick or options.shape or options.only or options.no_layers or options.no_networks
    options.no_networks = bool(options.no_networks or options.shape or options.only)
    if options.out is None:
        options.out = machine.HERE.parent / "build" / "benchmarks" if is_part else machine.HERE / "results"
    return options


def _publish(rows: list[dict[str, str]]) -> None:
    docs = machine.HERE.parent / "docs"
    image = f"![{plot.ALT}](images/benchmark.png)"
    tables.put_into(docs / "performance.md", f"{image}\n\n{tables.markdown(rows)}")
    endings = plot.save(rows, docs / "images" / "benchmark")
    print(f"wrote {docs / 'performance.md'} and {docs / 'images' / 'benchmark'}{endings}")


def _shape(text: str) -> tuple[int, ...]:
    try:
        return workloads.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _chosen(options: argparse.Namespace) -> list[workloads.Case]:
    if options.no_layers:
        return []
    every = workloads.quick_cases() if options.quick and not options.shape else workloads.cases(options.shape)
    chosen = [case for case in every if options.only in case.name]
    if not chosen:
        raise SystemExit(f"no case's name contains {options.only!r}; one is {every[0].name!r}")
    return chosen


def _announce(head: dict[str, Any]) -> None:
    print(f"{head['machine']}, {head['cores']} cores, {head['threads']} threads; {head['versions']}")
    print(f"{head['settings']}")
    for peer, command in peers.absent().items():
        print(f"{peer} is not installed and is left out; to measure it: {command}")
    if float(head["load"]) > 0.5:
        print(f"LOAD AVERAGE {head['load']}: other processes use the cores, and times will show it", file=sys.stderr)
    for phase, meaning in workloads.PHASES.items():
        print(f"  {phase}: {meaning}")


def _peers(case: workloads.Case, other: str, *, is_quick: bool) -> dict[str, list[str]]:
    """Who is measured under which setting of the memory; compilation takes most of the time of a quick run."""
    turns = {AS_IT_COMES: ["copy", "ours"], TUNED: ["copy", "eager", "ours"], other: ["copy", "ours"]}
    if not is_quick and case.dtype == "float32" and case.operation == "bn_relu":
        turns[AS_IT_COMES].append("ours, compiled")
    turns[_left_alone(other)] += [
        peer for peer in _PEERS if not (is_quick and case.operation != "bn" and peer == "compile")
    ]
    return turns


def _left_alone(other: str) -> str:
    """The setting of the process in which our library leaves the memory alone; peers are measured there."""
    return other if other == POOL_OFF else AS_IT_COMES


def _measure_layers(
    workers: list[Worker],
    chosen: list[workloads.Case],
    options: argparse.Namespace,
    head: dict[str, Any],
    rows: list[results.Row],
) -> None:
    for number, case in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {case.name}", flush=True)
        found = measure(
            workers,
            "layer",
            asdict(case),
            _peers(case, workers[-1].memory, is_quick=options.quick),
            budget=1.0 if options.quick else 3.0,
            at_least=3 if options.quick else 5,
        )
        copies = {each.memory: each.time.median for each in found if each.peer == "copy"}
        new = [_row({**head, **case.columns()}, each, copies[each.memory]) for each in found]
        rows += new
        _print_rows(new)


def _measure_networks(
    workers: list[Worker], options: argparse.Namespace, head: dict[str, Any], rows: list[results.Row]
) -> None:
    from networks import NETWORKS, OPERATIONS

    everywhere = {worker.memory: ["ours"] for worker in workers}
    everywhere[AS_IT_COMES].append("ours, fused")
    everywhere[TUNED].append("eager")
    everywhere[_left_alone(workers[-1].memory)].append("eager")
    for name, seconds in _NETWORK_SECONDS.items():
        for layout in ("contiguous", "channels_last"):
            if name.startswith("MLP") and layout != "contiguous":
                continue
            if options.quick and (name, layout) != ("ResNet-20", "contiguous"):
                continue
            shape = workloads.size(NETWORKS[name][1])
            print(f"{name} {shape} {layout}", flush=True)
            found = measure(
                workers,
                "network",
                {"name": name, "layout": layout},
                everywhere,
                budget=8.0 if options.quick else seconds,
                at_least=5,
                at_most=400,
            )
            where = {"group": "networks", "shape": f"{name} {shape}", "dtype": "float32", "layout": layout}
            new = [_row({**head, **where, "operation": OPERATIONS[each.phase]}, each, None) for each in found]
            rows += new
            _print_rows(new)


def _row(columns: dict[str, Any], found: Measured, copy: float | None) -> dict[str, Any]:
    times = {"median_us": found.time.median, "p20_us": found.time.low, "p80_us": found.time.high}
    return {
        **columns,
        "peer": found.peer,
        "memory": AS_IT_COMES if found.memory == POOL_OFF and found.peer in _PEERS else found.memory,
        "phase": found.phase,
        **{name: f"{seconds * 1e6:.2f}" for name, seconds in times.items()},
        "samples": found.time.samples,
        "calls": found.calls,
        "others": f"{found.others:.2f}",
        "times_copy": "" if copy is None else f"{found.time.median / copy:.3f}",
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for peer, memory in dict.fromkeys((row["peer"], row["memory"]) for row in rows):
        here = [row for row in rows if (row["peer"], row["memory"]) == (peer, memory)]
        texts = []
        for row in here:
            times = f" = {row['times_copy']} copies" if row["times_copy"] else ""
            texts.append(f"{row['phase']} {row['median_us']} us{times}")
        print(f"    {peer:14s} {memory:12s} {'; '.join(texts)}")


if __name__ == "__main__":
    main()
