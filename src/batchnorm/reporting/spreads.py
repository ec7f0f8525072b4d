"""Measures as they are drawn: every seed a dot, the mean and its interval, and beside them what a source reports."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from matplotlib.ticker import LogLocator

from batchnorm.reporting.figures import BLUE, GREY, ORANGE, RED, legend, log_axis, look, panel
from batchnorm.reporting.numbers import interval, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXIS = {"x": "ratio (times)", "points": "percentage points", "": "value"}
_NO_EFFECT = {"x": 1.0, "points": 0.0, "decades": 0.0}
_LABEL = 56
"""Characters in a line of a row's label."""
_INCHES_A_LINE, _INCHES_A_MARK = 0.165, 0.26
_INCHES_AROUND = 0.75
_PANEL_INCHES = 3.1
_LOOKS = ((BLUE, "o", True), (ORANGE, "s", False))
REPORTED: dict[str, Any] = {"color": RED, "marker": "D", "fillstyle": "none", "linestyle": "", "markersize": 5.5}
"""How a number that is not ours is marked."""


class Spread(Protocol):
    """One value a seed, their mean, and the ends of its interval; a number that is not finite may be None."""

    @property
    def values(self) -> Sequence[float | None]:
        """One for each seed."""

    @property
    def mean(self) -> float | None:
        """Their mean."""

    @property
    def low(self) -> float | None:
        """The lower end of its interval."""

    @property
    def high(self) -> float | None:
        """The upper end."""


@dataclass(frozen=True)
class Row:
    """A measure in a panel of rows.

    Attributes:
        label: What it is.
        spreads: The measure, of one study or of two.
        reported: (value, whose and of what) of the source, in the same unit.
    """

    label: str
    spreads: tuple[Spread, ...]
    reported: tuple[tuple[float, str], ...] = ()


def over(axes: Axes, places: Sequence[float], measures: Sequence[Spread], *, label: str, **look_of_line: Any) -> None:
    """Draw a measure over a quantity: a line through the means, the intervals as a band, every seed a dot.

    Args:
        axes: The panel.
        places: The quantity.
        measures: One for each place.
        label: In the legend.
        look_of_line: color, linestyle and what else `Axes.plot` takes.
    """
    (line,) = axes.plot(places, [one.mean for one in measures], label=label, **look_of_line)  # type: ignore[arg-type]
    dots = [(place, value) for place, one in zip(places, measures, strict=True) for value in one.values]
    axes.plot(*zip(*dots, strict=True), color=line.get_color(), linestyle="", marker=".", markersize=4, alpha=0.6)
    # The dots alone set the limits: an interval of three seeds can be wider than all that was measured.
    limits = axes.dataLim.get_points().copy()
    lows, highs = [one.low for one in measures], [one.high for one in measures]
    axes.fill_between(places, lows, highs, color=line.get_color(), alpha=0.16)  # type: ignore[arg-type]
    axes.dataLim.set_points(limits)


def rows_panel(title: str, unit: str, rows: Sequence[Row], *, names: Sequence[str] = ("",)) -> tuple[Figure, str]:
    """Draw measures of one unit below each other.

    Args:
        title: Of the panel.
        unit: Of all rows, as `numbers.quantity` takes it; ratios ("x") get a logarithmic axis.
        rows: From top to bottom.
        names: Of the studies that the rows' spreads are of.

    Returns:
        The figure and its alternative text, which says every number of it.
    """
    labels = [textwrap.wrap(row.label, _LABEL) for row in rows]
    sources = dict.fromkeys(where for row in rows for _, where in row.reported)
    markers = dict(zip(sources, itertools.cycle("Dv^s"), strict=False))
    tops, bottom = [], 0.0
    for lines in labels:
        tops.append(bottom)
        bottom += _INCHES_A_LINE * len(lines) + _INCHES_A_MARK
    legend_rows = 2 * len(names) + len(markers)
    height = (bottom + _INCHES_AROUND + 0.2 * legend_rows) / _PANEL_INCHES
    with look():
        drawing, axes = panel(title, _AXIS.get(unit, unit), "", height=height)
        for row, lines, top in zip(rows, labels, tops, strict=True):
            middle = top + _INCHES_A_LINE * len(lines) + 0.085
            _row(axes, row, lines, top, middle, markers)
        _empty_for_legend(axes, names, markers)
        if unit == "x":
            log_axis(axes.xaxis)
            if axes.dataLim.x1 < 50 * axes.dataLim.x0:
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        if unit in _NO_EFFECT:
            axes.axvline(_NO_EFFECT[unit], color=GREY, linewidth=1, linestyle=":")
        axes.set_ylim(bottom, -0.04)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        legend(axes, columns=1)
    return drawing, _alt(rows, unit, names)


def _row(axes: Axes, row: Row, lines: Iterable[str], top: float, middle: float, markers: Mapping[str, str]) -> None:
    axes.text(0, top, "\n".join(lines), transform=axes.get_yaxis_transform(), va="top", fontsize=9, linespacing=1.25)
    for place, spread in enumerate(row.spreads):
        colour, marker, is_filled = _LOOKS[place]
        at = middle + (place - (len(row.spreads) - 1) / 2) * 0.085
        if spread.low is not None and spread.high is not None:
            axes.plot([spread.low, spread.high], [at, at], color=colour, linewidth=2.4, alpha=0.45, linestyle="-")
        if spread.mean is not None:
            axes.plot([spread.mean], [at], color=colour, marker="|", markersize=9, markeredgewidth=2, linestyle="")
        there = [value for value in spread.values if value is not None]
        axes.plot(
            there,
            [at] * len(there),
            color=colour,
            marker=marker,
            markersize=4,
            linestyle="",
            alpha=0.75,
            fillstyle="full" if is_filled else "none",
        )
    for value, source in row.reported:
        axes.plot([value], [middle], **REPORTED | {"marker": markers[source]})


def _empty_for_legend(axes: Axes, names: Sequence[str], markers: Mapping[str, str]) -> None:
    """Entries of the legend, drawn of nothing."""
    for name, (colour, marker, is_filled) in zip(names, _LOOKS, strict=False):
        of = f"{name}: " if name else ""
        fill: Any = "full" if is_filled else "none"
        axes.plot(
            [], [], color=colour, marker=marker, markersize=4, linestyle="", fillstyle=fill, label=f"{of}each seed"
        )
        axes.plot([], [], color=colour, linewidth=2.4, alpha=0.6, linestyle="-", label=f"{of}95 % interval of the mean")
    for source, marker in markers.items():
        axes.plot([], [], label=source, **REPORTED | {"marker": marker})


def _alt(rows: Sequence[Row], unit: str, names: Sequence[str]) -> str:
    told = []
    for row in rows:
        parts = []
        for name, spread in zip(names, row.spreads, strict=False):
            span = interval(spread.low, spread.high)
            parts.append(f"{name} {quantity(spread.mean, unit)}".strip() + (f" ({span})" if span else ""))
        parts += [f"{where} {quantity(value, unit)}" for value, where in row.reported]
        told.append(f"{row.label}: {', '.join(parts)}")
    return f"Every seed, mean and interval. {'; '.join(told)}."
