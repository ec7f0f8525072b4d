"""The plot for README and docs: times of a copy for each peer, shape and layout; copy = 1 is the limit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import workloads
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from results import Row
from workers import AS_IT_COMES, TUNED

from batchnorm.reporting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALT = "Time of batch normalization by shape, memory layout and library, in times of a copy of the same tensor"


class Series(NamedTuple):
    """One peer under one setting of the memory, and how it is drawn."""

    label: str
    peer: str
    memory: tuple[str, ...]
    colour: str
    marker: str
    is_filled: bool = True


SERIES = (
    Series("PyTorch eager", "eager", (AS_IT_COMES,), figures.ORANGE, "D"),
    Series("eager, malloc tuned", "eager", (TUNED,), figures.ORANGE, "D", False),
    Series("torch.compile", "compile", (AS_IT_COMES,), figures.GREEN, "s"),
    Series("JAX jit", "jax", (AS_IT_COMES,), figures.PURPLE, "^"),
    Series("ONNX Runtime", "onnxruntime", (AS_IT_COMES,), figures.GREY, "v"),
    Series("batchnorm", "ours", (AS_IT_COMES,), figures.BLUE, "o"),
    Series("batchnorm, pool on", "ours", ("pool on",), figures.BLUE, "o", False),
    Series("batchnorm, pool off", "ours", ("pool off",), figures.BLUE, "o", False),
)
PANELS = (
    ("BN, forward", "bn", "forward"),
    ("BN + ReLU, forward + backward", "bn_relu", "forward+backward"),
    ("BN, inference", "bn", "inference"),
)
_LAYOUTS = {"contiguous": "contiguous", "channels_last": "channels-last"}
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def save(rows: Iterable[Row], stem: Path) -> str:
    """Writes `stem`.svg and `stem`.png; the endings, for a message, or nothing where no row can be drawn.

    The SVG follows a reader's dark or light colours also as an image; the PNG is on white.
    """
    drawn = [row for row in rows if row["dtype"] == "float32" and row["times_copy"]]
    if not drawn:
        return ""
    figure = draw(drawn)
    figures.save(figure, stem, ALT)
    svg = stem.with_name(stem.name + ".svg")
    style = "<style>svg{color:#16191d}@media(prefers-color-scheme:dark){svg{color:#e8eaed}}</style>"
    svg.write_text(svg.read_text(encoding="utf-8").replace("</title>", f"</title>\n {style}", 1), encoding="utf-8")
    return ", .svg and .png"


def draw(rows: list[Row]) -> Figure:
    """A line for each shape, a mark for each peer with its 20 and 80 percentile; layouts side by side."""
    lines = _lines(rows)
    layouts = [layout for layout in _LAYOUTS if any(row["layout"] == layout for row in rows)]
    with figures.look():
        figure = Figure(figsize=(8.4, 1.2 + len(PANELS) * (0.6 + 0.165 * len(lines))))
        figure.get_layout_engine().set(rect=(0.02, 0, 0.98, 1))  # type: ignore[union-attr]  # bold labels are wider
        grid = figure.subplots(len(PANELS), len(layouts), sharex=True, sharey=True, squeeze=False)
        for (title, operation, phase), across in zip(PANELS, grid, strict=True):
            for layout, axes in zip(layouts, across, strict=True):
                chosen = [
                    row for row in rows if (row["layout"], row["operation"], row["phase"]) == (layout, operation, phase)
                ]
                _panel(axes, chosen, lines)
                axes.set_title(f"{title}, {_LAYOUTS[layout]}", fontsize=8.5)
        for axes in grid[-1]:
            axes.set_xlabel("times a copy of the same tensor", fontsize=8.5)
        entries: dict[str, object] = {}
        for axes in grid.flat:
            handles, labels = axes.get_legend_handles_labels()
            entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
        order = [series.label for series in SERIES if series.label in entries]
        figure.legend(
            [entries[label] for label in order],
            order,
            loc="outside upper center",
            ncols=4,
            fontsize=8.5,
            markerscale=1.2,
        )
    return figure


def _lines(rows: list[Row]) -> list[tuple[str, bool]]:
    """The lines of a panel from above: name, and whether it names a class or a shape."""
    found: list[tuple[str, bool]] = []
    for group in (workloads.LARGE, workloads.ABOUT, workloads.SMALL_MAPS, workloads.FEW, workloads.TINY):
        shapes = list(dict.fromkeys(row["shape"] for row in rows if row["group"] == group))
        if shapes:
            found += [(group, True), *((shape, False) for shape in shapes)]
    return found


def _panel(axes: Axes, rows: list[Row], lines: list[tuple[str, bool]]) -> None:
    places = {name: -number for number, (name, _) in enumerate(lines)}
    for series in SERIES:
        found = [row for row in rows if row["peer"] == series.peer and row["memory"] in series.memory]
        if not found:
            continue
        x = [float(row["times_copy"]) for row in found]
        ends = [
            [abs(float(row["times_copy"]) * (float(row[end]) / float(row["median_us"]) - 1)) for row in found]
            for end in ("p20_us", "p80_us")
        ]
        axes.errorbar(
            x,
            [places[row["shape"]] for row in found],
            xerr=ends,
            linestyle="none",
            marker=series.marker,
            markersize=4.6 if series.marker != "^" else 5,
            markerfacecolor=series.colour if series.is_filled else "none",
            markeredgecolor=series.colour,
            markeredgewidth=1.1,
            color=series.colour,
            elinewidth=0.9,
            label=series.label,
        )
    axes.axvline(1, color=figures.RED, linewidth=1.2, linestyle="-")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "copy = 1" if value == 1 else f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks([places[name] for name, _ in lines], [name for name, _ in lines], fontsize=7.5)
    for tick, (_, is_class) in zip(axes.yaxis.get_major_ticks(len(lines)), lines, strict=True):
        tick.label1.set_fontweight("bold" if is_class else "normal")
        tick.gridline.set_visible(not is_class)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(lines) + 0.4, 0.6)
