"""The look of the figures: the same bytes each time, legible in light and dark, safe to put into one page."""

import re
from xml.etree import ElementTree

import pytest

from batchnorm.reporting import figures


def _figure(label: str = "loss"):
    with figures.look():
        figure, axes = figures.panel("A panel", "step", "loss")
        axes.plot([1, 10, 100], [1.0, 0.1, 1e-5], label=label)
        axes.plot([1, 10, 100], [1.0, 0.5, 1e-2], label="other")
        figures.log_axis(axes.xaxis)
        figures.log_axis(axes.yaxis)
        figures.legend(axes)
    return figure


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("paper", ["#ffffff", "#14171c"])
@pytest.mark.parametrize("colour", figures.PALETTE)
def test_series_colours_are_legible_on_light_and_on_dark(colour, paper):
    assert _contrast(colour, paper) >= 3.5


def test_svg_is_the_same_each_time():
    assert figures.to_svg(_figure(), "alt") == figures.to_svg(_figure(), "alt")


def test_png_is_the_same_each_time():
    assert figures.to_png(_figure()) == figures.to_png(_figure())


def test_svg_has_text_as_text_in_the_colour_around_it():
    root = ElementTree.fromstring(figures.to_svg(_figure(), "alt"))
    texts = root.findall(".//{http://www.w3.org/2000/svg}text")
    assert "A panel" in [text.text for text in texts]
    assert all("currentColor" in text.get("style", "") for text in texts)


def test_svg_has_no_style_sheet_no_metadata_and_the_alternative_text_as_title():
    svg = figures.to_svg(_figure(), 'a < b & "c"')
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert ElementTree.fromstring(svg).find("{http://www.w3.org/2000/svg}title").text == 'a < b & "c"'


def test_hostile_labels_stay_text():
    root = ElementTree.fromstring(figures.to_svg(_figure("<script>$\\frac{1}{2}$"), "alt"))
    assert "<script>$\\frac{1}{2}$" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_log_axis_writes_plain_numbers():
    texts = re.findall(r">([^<>]+)</text>", figures.to_svg(_figure(), "alt"))
    assert {"1", "10", "100", "0.001"} <= set(texts)


def test_save_writes_both_formats(tmp_path):
    figures.save(_figure(), tmp_path / "one.panel", "alt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.panel.png", "one.panel.svg"]
    assert (tmp_path / "one.panel.png").read_bytes().startswith(b"\x89PNG")
