"""A comparison as text for the terminal, as plain data for machines, and as one HTML page; nothing is computed here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from batchnorm.reporting.figures import BLUE, ORANGE, legend, look, panel, to_svg
from batchnorm.reporting.numbers import interval, number
from batchnorm.reporting.page import render
from batchnorm.shift.bins import Bins
from batchnorm.shift.compare import Comparison, Variable

_SCHEMA = 1
_MINUS = "\N{MINUS SIGN}"
_MOST_FIGURES = 12
_MOST_LINES = 40
_LABEL = 14
"""Characters of a category under a figure."""


def as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison as plain dicts, lists and numbers, for JSON; NaN and infinity become None."""
    body = dataclasses.asdict(found)
    body["rule"] = str(found.rule)
    whole = {"schema": _SCHEMA, "is_shifted": found.is_shifted, "is_significant": found.is_significant, **body}
    plain: dict[str, Any] = _finite(whole)
    return plain


def as_text(found: Comparison) -> str:
    """The comparison as a table for the terminal."""
    lines = [headline(found), *_joint_lines(found), ""]
    header = ("variable", "effect", "AUC", "q", "matters", "")
    rows = [
        (
            one.name,
            number(one.effect.overall),
            number(one.separation.auc if one.separation else None),
            chance(one.q_value),
            number(one.importance),
            _remark(one),
        )
        for one in found.variables
    ]
    cut = rows[:_MOST_LINES]
    widths = [max(len(row[i]) for row in [header, *cut]) for i in range(len(header))]
    for row in [header, *cut]:
        name, *figures, remark = row
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=False))]
        lines.append("  ".join([*cells, remark]).rstrip())
    if len(rows) > len(cut):
        lines.append(f"and {len(rows) - len(cut)} more with smaller effects: --json has them all")
    lines += [f"Note: {note}" for note in found.notes]
    return "\n".join(lines)


def headline(found: Comparison) -> str:
    """The verdict in a sentence."""
    shifted = [one.name for one in found.variables if one.is_shifted]
    if not found.is_shifted:
        more = " (some differences are significant, and smaller than that)" if found.is_significant else ""
        return f"No shift over the threshold {found.rule}{more}."
    what = (
        f"{len(shifted)} of {len(found.variables)} variables"
        if shifted
        else "all columns together, though no single one"
    )
    return f"Shift over the threshold {found.rule}: {what}."


def as_html(found: Comparison, *, reference: str, new: str, version: str) -> str:
    """The comparison as one self-contained HTML page, whose size does not depend on the number of rows.

    Args:
        found: what to show.
        reference: name of the old side.
        new: name of the new side.
        version: of this package.
    """
    shown = [one for one in found.variables if one.bins is not None and not one.left_out][:_MOST_FIGURES]
    figures = [{"svg": _figure(one), "alt": _alt(one)} for one in shown]
    return render(
        "shift.html",
        found=found,
        headline=headline(found),
        figures=figures,
        chance=chance,
        remarks={one.name: _remark(one) for one in found.variables},
        reference=reference,
        new=new,
        version=version,
    )


def chance(value: float | None) -> str:
    """A p-value or q-value; below 0.0001 no digit of it means anything.

    >>> chance(3e-70), chance(0.0312)
    ('<0.0001', '0.0312')
    """
    return "<0.0001" if value is not None and value < 1e-4 else number(value)


def _joint_lines(found: Comparison) -> list[str]:
    lines = [f"Rows: {found.old_rows:,} in the reference, {found.new_rows:,} new; tests on {found.sampled:,} of them."]
    if found.unit_count is not None:
        lines[0] += f" {found.unit_count} groups or blocks."
    if found.joint is not None:
        one = found.joint
        lines.append(
            f"All columns together: AUC {number(one.auc)} ({interval(one.low, one.high)}), q {chance(found.joint_q)}, "
            f"overlap {number(one.overlap)}."
        )
    lines.append(f"Type of shift: {found.shift_type.name}.")
    return lines


def _remark(one: Variable) -> str:
    parts = ["SHIFTED"] if one.is_shifted else []
    if one.left_out:
        parts.append(f"left out: {one.left_out}")
    change = one.effect.missing_change
    if change is not None and abs(change) >= 0.005:
        parts.append(f"missing {'+' if change > 0 else _MINUS}{abs(change):.1%}")
    if one.effect.new_categories:
        share = one.effect.new_categories
        parts.append("new categories " + (f"{share:.1%}" if share >= 0.001 else "below 0.1%"))
    if one.kind == "layer":
        parts.append(f"layer; channel {one.effect.worst_channel} most")
    return ", ".join(parts)


def _figure(one: Variable) -> str:
    assert one.bins is not None
    bins = one.bins
    title = one.name if len(one.name) <= 40 else f"{one.name[:39]}…"
    with look():
        drawing, axes = panel(title, "" if bins.labels else "value", "share of rows, %", height=0.85)
        if bins.labels:
            _bars(axes, bins)
        else:
            _steps(axes, bins)
        legend(axes)
    return to_svg(drawing, _alt(one))


def _steps(axes: Any, bins: Bins) -> None:
    sides = ((bins.old, BLUE, "reference", "-"), (bins.new, ORANGE, "new", (0, (4, 1.6))))
    for shares, colour, label, dash in sides:
        percent = [100 * share for share in shares]
        axes.stairs(percent, bins.edges, color=colour, label=label, linestyle=dash, linewidth=1.8)
    axes.set_ylim(bottom=0)


def _bars(axes: Any, bins: Bins) -> None:
    places = range(len(bins.labels))
    for shares, colour, label, shift in ((bins.old, BLUE, "reference", 0.2), (bins.new, ORANGE, "new", -0.2)):
        percent = [100 * share for share in shares]
        axes.barh([-place + shift for place in places], percent, 0.38, color=colour, label=label)
    names = [label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…" for label in bins.labels]
    axes.set_yticks([-place for place in places], names)
    axes.set_xlabel("share of rows, %")
    axes.set_ylabel("")


def _alt(one: Variable) -> str:
    return f"Distribution of {one.name} in the reference and in the new rows; effect {number(one.effect.overall)}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
