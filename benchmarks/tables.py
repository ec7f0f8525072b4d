"""The tables of docs/performance.md, from the CSV of a run: no figure there is typed by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from plot import SERIES
from results import Row
from workers import AS_IT_COMES

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

_PHASES = (
    ("Forward, BN", "bn", "forward"),
    ("Backward, BN", "bn", "backward"),
    ("Forward + backward, BN + ReLU", "bn_relu", "forward+backward"),
    ("Forward + backward, BN + add + ReLU", "bn_add_relu", "forward+backward"),
    ("Inference, BN", "bn", "inference"),
)


def markdown(rows: Sequence[Row]) -> str:
    """Machine and versions, a table of times a copy for each phase and dtype, and the networks' times."""
    head = rows[0]
    parts = [
        f"{head['date']} UTC, commit {head['commit']}, {head['machine']}, {head['cores']} cores, {head['threads']} "
        f"threads, load average {head['load']} at the start. {head['versions']}. {head['settings']}.",
    ]
    for dtype in ("float32", "bfloat16"):
        for title, operation, phase in _PHASES:
            where = (dtype, operation, phase)
            chosen = [row for row in rows if (row["dtype"], row["operation"], row["phase"]) == where]
            if chosen:
                parts.append(f"### {title}, {dtype}\n\nTimes of a copy of the same tensor.\n\n{_cases(chosen)}")
    networks = [row for row in rows if row["group"] == "networks"]
    if networks:
        parts.append(f"### Networks\n\nMilliseconds, and times as fast as eager beside it.\n\n{_networks(networks)}")
    return "\n\n".join(parts)


def put_into(page: Path, text: str) -> None:
    """Puts `text` between the page's two marks.

    Raises:
        ValueError: the page lacks them.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}")
    part = page.with_name(f".{page.name}.part")
    part.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    os.replace(part, page)


def _cases(rows: list[Row]) -> str:
    columns = [
        series
        for series in SERIES
        if any((row["peer"] == series.peer and row["memory"] in series.memory) for row in rows)
    ]
    lines = [
        f"| shape | layout | {' | '.join(series.label for series in columns)} | a copy, us |",
        "| --- | --- |" + " ---: |" * (len(columns) + 1),
    ]
    for shape, layout in dict.fromkeys((row["shape"], row["layout"]) for row in rows):
        here = [row for row in rows if (row["shape"], row["layout"]) == (shape, layout)]
        cells = []
        for series in columns:
            found = [row for row in here if row["peer"] == series.peer and row["memory"] in series.memory]
            cells.append(f"{float(found[0]['times_copy']):.2f}" if found else "")
        some = next(row for row in here if row["peer"] == "ours")
        cells.append(f"{float(some['median_us']) / float(some['times_copy']):.4g}")
        lines.append(f"| {shape} | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _networks(rows: list[Row]) -> str:
    lines = ["| network | layout | operation | layers | memory | ms | 20 to 80 % | times as fast |"]
    lines.append("| --- | --- | --- | --- | --- | ---: | ---: | ---: |")
    eager = {(*_case(row), row["memory"]): row for row in rows if row["peer"] == "eager"}
    for row in rows:
        beside = eager.get((*_case(row), row["memory"])) or eager.get((*_case(row), AS_IT_COMES))
        ratio = f"{float(beside['median_us']) / float(row['median_us']):.2f}" if beside else ""
        median, low, high = (float(row[name]) / 1e3 for name in ("median_us", "p20_us", "p80_us"))
        lines.append(
            f"| {' | '.join(_case(row))} | {row['peer']} | {row['memory']} | {median:.1f} | "
            f"{low:.1f} to {high:.1f} | {ratio} |"
        )
    return "\n".join(lines)


def _case(row: Row) -> tuple[str, ...]:
    return row["shape"], row["layout"], row["operation"]
