"""The one look of all figures: small panels, drawn once, legible on white and on near-black.

A claim draws each panel as its own figure of one size; the page lays the panels side by side where there is room and
below each other on a phone, so that text never shrinks with the screen. Text and axes take the colour of the text
around them (``currentColor``), and every series colour has a contrast of at least 3.5 to 1 on white and on the page's
near-black, so that one drawing serves light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#2a7fd4", "#d9650b", "#1a9565", "#a05ccf", "#d8433f", "#7c8590"
"""Series colours. By convention BLUE is with batch normalization, ORANGE without it, GREEN layer normalization."""

PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4)), (0, (8, 2)), (0, (2.5, 1)))
"""Line styles in the palette's order: colour is never the only difference between two series."""

# A colour that nothing else draws: it is written as currentColor in the SVG and stays near-black in the PNG.
_INK = "#16191d"
_WIDTH, _HEIGHT = 4.4, 3.1  # inches: 317 x 223 points, just under a phone's column in CSS pixels
_FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_LOOK: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "grid.alpha": 0.14,
    "grid.color": _INK,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "patch.linewidth": 0.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchnorm",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "xtick.labelsize": 9.5,
    "xtick.major.size": 3,
    "xtick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.color": _INK,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 3,
    "ytick.major.width": 0.7,
    "ytick.minor.size": 0,
}


@contextmanager
def look() -> Iterator[None]:
    """Give everything that is drawn inside the block the look of the report.

    Matplotlib reads most of its settings when a line or an axis is made, so the whole of a drawing belongs inside.
    """
    settings: Any = {**_LOOK, "axes.prop_cycle": cycler(color=PALETTE) + cycler(linestyle=DASHES)}
    with mpl.rc_context(settings):
        yield


def panel(title: str, x_label: str, y_label: str, *, height: float = 1.0) -> "tuple[Figure, Axes]":
    """Give one empty panel with its title and labels.

    Args:
        title: what the panel shows, short (about 42 characters fit).
        x_label: quantity and unit of the horizontal axis.
        y_label: quantity and unit of the vertical axis.
        height: height relative to the usual one.

    Returns:
        The figure, never known to pyplot, and its axes.
    """
    with look():
        figure = Figure(figsize=(_WIDTH, _HEIGHT * height))
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return figure, axes


def legend(axes: "Axes", *, columns: int = 3) -> None:
    """Place the legend between the title and the axes, where it hides no data.

    Args:
        axes: the panel, with its labelled lines drawn.
        columns: entries in a row.
    """
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // columns)
    axes.set_title(axes.get_title(loc="left"), pad=9 + 14 * rows)
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.01),
        ncols=columns,
        borderaxespad=0.0,
        borderpad=0.2,
        columnspacing=1.4,
        labelspacing=0.3,
        handletextpad=0.6,
    )


def log_axis(axis: "Axis") -> None:
    """Make an axis logarithmic, its ticks written as people read them: 0.01, 1, 10k, 10⁻⁸.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
    """
    scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    scale("log")
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """Write a tick of a logarithmic axis.

    Args:
        value: a positive number.

    Returns:
        Plain digits between 0.001 and 1000, k and M up to 10 million, powers in Unicode superscripts beyond.

    >>> [power_of_ten(x) for x in (1e-8, 0.001, 0.5, 1, 200, 1e4, 1e6, 1e9)]
    ['10⁻⁸', '0.001', '0.5', '1', '200', '10k', '1M', '10⁹']
    """
    mantissa, exponent = f"{value:.0e}".split("e")
    if -3 <= int(exponent) < 3:
        return f"{value:.3g}"
    if 3 <= int(exponent) < 6:
        return f"{value / 1e3:.3g}k"
    if 6 <= int(exponent) < 8:
        return f"{value / 1e6:.3g}M"
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def to_svg(figure: Figure, alt: str) -> str:
    """Give the figure as SVG: transparent, text as text, and the same bytes for the same drawing.

    Args:
        figure: a figure from `panel`.
        alt: the alternative text; it becomes the drawing's title.

    Returns:
        An SVG document whose text and axes have the colour of the text around it.
    """
    buffer = io.StringIO()
    with look():
        _settle(figure)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue().replace(_INK, "currentColor")
    # A document inside a page has no prologue; the drawing's own style sheet would reach beyond it, so it moves inside.
    svg = re.sub(r"^.*?(?=<svg)", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("'DejaVu Sans'", _FONT_STACK)
    title = alt.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(
        r"<svg([^>]*)>",
        lambda tag: f'<svg{tag[1]} role="img" stroke-linejoin="round" stroke-linecap="butt">\n <title>{title}</title>',
        svg,
        count=1,
    )


def to_png(figure: Figure) -> bytes:
    """Give the figure as PNG on white, for places that show no SVG.

    Args:
        figure: a figure from `panel`.

    Returns:
        The file's bytes, without date and version, so that the same drawing gives the same bytes.
    """
    buffer = io.BytesIO()
    with look():
        _settle(figure)
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_pdf(figure: Figure) -> bytes:
    """Give the figure as PDF, for papers: vectors, text as text.

    Args:
        figure: a figure from `panel`.

    Returns:
        The file's bytes, without date and version, so that the same drawing gives the same bytes.
    """
    buffer = io.BytesIO()
    with look():
        _settle(figure)
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return buffer.getvalue()


def _settle(figure: Figure) -> None:
    """Fix the layout, which would otherwise be worked out anew for each format.

    No engine stays behind: with any, even "none", saving draws everything twice.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        with mpl.rc_context({"figure.constrained_layout.use": False}):
            figure.set_layout_engine(None)


def save(figure: Figure, stem: Path, alt: str) -> None:
    """Write the figure as `stem`.svg and `stem`.png.

    Args:
        figure: a figure from `panel`.
        stem: the path without its ending; its folder exists.
        alt: the alternative text.
    """
    stem.with_name(stem.name + ".svg").write_text(to_svg(figure, alt), encoding="utf-8")
    stem.with_name(stem.name + ".png").write_bytes(to_png(figure))
