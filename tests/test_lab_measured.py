"""Panels of measures: every seed is drawn, what a source reports too, and the words say the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from batchnorm.lab.claim import Measure
from batchnorm.lab.measured import measured
from batchnorm.lab.measures import measure_over_seeds, ratio_over_seeds

TIMES = "\N{MULTIPLICATION SIGN}"
WHERE = "paper: Inception on ImageNet"


def entry(*measures: Measure, reported: tuple[tuple[str, float], ...] = ()) -> dict[str, Any]:
    listed = [{"measure": name, "value": value, "where": WHERE} for name, value in reported]
    return {"headline": asdict(measures[0]), "measures": [asdict(one) for one in measures], "reported": listed}


def points(figure: Figure) -> set[float]:
    """All values that marks stand at."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "|", None)]
    return {float(x) for line in lines for x in np.asarray(line.get_xdata(), dtype=float)}


def test_every_seed_and_what_is_reported_is_drawn() -> None:
    steps = ratio_over_seeds("steps", "steps, plain over BN", [2.0, 3.0, 4.0])
    gain = measure_over_seeds("gain", "points gained", "points", [0.5, 1.0])
    other = measure_over_seeds("other", "seconds", "s", [7.0])
    figures = measured([entry(steps, gain, other, reported=(("steps", 14.8), ("gain", 2.6)))])
    assert list(figures) == ["measures_ratios", "measures_points"]
    assert points(figures["measures_ratios"][0]) == {2.0, 3.0, 4.0, 14.8}
    assert points(figures["measures_points"][0]) == {0.5, 1.0, 2.6}
    assert f"steps, plain over BN: 2.88{TIMES} (" in figures["measures_ratios"][1]
    assert f"{WHERE} 14.8{TIMES}" in figures["measures_ratios"][1]
    assert figures["measures_ratios"][0].axes[0].get_xscale() == "log"


def test_a_panel_has_twelve_rows_and_never_drops_what_is_reported() -> None:
    many = [ratio_over_seeds(f"m{k}", f"measure {k}", [1.0 + k]) for k in range(20)]
    ((figure, alt),) = measured([entry(*many, reported=(("m19", 2.3),))]).values()
    assert points(figure) == {1.0 + k for k in (*range(11), 19)} | {2.3}
    assert "measure 19" in alt


def test_two_studies_stand_in_one_panel() -> None:
    one, other = (entry(ratio_over_seeds("steps", "steps", values)) for values in ([2.0, 3.0], [5.0, 6.0]))
    other["measures"].append(asdict(ratio_over_seeds("new", "new", [9.0])))
    ((figure, alt),) = measured([one, other], ("a", "b")).values()
    assert points(figure) == {2.0, 3.0, 5.0, 6.0}
    assert f"steps: a 2.45{TIMES} (" in alt
    assert f"b 5.48{TIMES} (" in alt


def test_numbers_that_are_not_finite_are_left_out() -> None:
    broken = entry(measure_over_seeds("loss", "loss", "", [1.0, 2.0]))
    broken["measures"][0] |= {"values": [None, 2.0], "mean": None, "low": None, "high": None}
    ((figure, _),) = measured([broken]).values()
    assert points(figure) == {2.0}
