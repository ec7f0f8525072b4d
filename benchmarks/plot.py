"""The plot for README and docs, from a CSV of `layers.py`: times of a copy for each peer; copy = 1 is the limit."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

TICKS = (1, 2, 5, 10, 20, 50, 100)
PEERS = {"ours": "#0b84a5", "compile": "#9dd866", "eager": "#ca472f"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="an .svg or .png file")
    options = parser.parse_args()
    with options.table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["malloc"] == "as it comes"]
    draw(rows).savefig(options.out, dpi=150, bbox_inches="tight")
    print(f"wrote {options.out}")


def draw(rows: list[dict[str, str]]) -> Figure:
    """One panel a phase; a row for each case, a point for each peer, on a logarithmic axis from a copy upward."""
    chosen = [row for row in rows if row["case"].endswith(("float32 contiguous bn", "float32 channels_last bn"))]
    cases = list(dict.fromkeys(row["case"] for row in chosen))
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(cases)), layout="constrained")
    for panel, phase in zip(figure.subplots(1, 3, sharey=True), ("forward", "backward", "inference"), strict=True):
        for peer, colour in PEERS.items():
            points = {
                row["case"]: float(row["times_copy"]) for row in chosen if (row["peer"], row["phase"]) == (peer, phase)
            }
            panel.plot(list(points.values()), [cases.index(case) for case in points], "o", color=colour, label=peer)
        panel.axvline(1, color="0.4", linewidth=1)
        panel.set_xscale("log")
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(f"{phase}, times a copy")
        panel.grid(axis="x", alpha=0.3)
    first = figure.axes[0]
    first.set_yticks(range(len(cases)), [case.removesuffix(" bn").replace(" float32", "") for case in cases])
    first.invert_yaxis()
    first.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
