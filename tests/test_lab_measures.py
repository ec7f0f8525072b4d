"""Intervals, own best rates, steps to a level, windows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats

from batchnorm.errors import ArgumentError
from batchnorm.lab.measures import (
    at_best_rate,
    best_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    last,
    measure_over_seeds,
    of_arm,
    ratio_over_seeds,
    said,
    steps_to,
    window,
)


def record(rate: float, seed: int, validation: float | None, test: float, arm: str = "a") -> dict[str, Any]:
    curves = {"step": [0, 10], "validation_accuracy": [0.1, validation], "test_accuracy": [0.1, test]}
    return {"arm": arm, "rate": rate, "seed": seed, "curves": curves}


def test_the_interval_is_student_t() -> None:
    values = [0.3, 0.9, 0.4, 0.8, 0.55]
    found = measure_over_seeds("x", "x", "%", values)
    low, high = scipy.stats.t.interval(0.95, 4, loc=found.mean, scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.mean == pytest.approx(0.59)


def test_the_interval_of_ratios_is_on_the_logarithmic_scale() -> None:
    values = [2.0, 8.0, 4.0]
    found = ratio_over_seeds("x", "x", values)
    logs = [math.log(value) for value in values]
    low, high = scipy.stats.t.interval(0.95, 2, loc=math.log(4), scale=scipy.stats.sem(logs))
    assert found.mean == pytest.approx(4)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert found.unit == "x"


def test_one_seed_has_no_interval() -> None:
    found = measure_over_seeds("x", "x", "%", [3.0])
    assert (found.mean, found.low, found.high) == (3.0, 3.0, 3.0)
    assert "one seed" in said(found)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ArgumentError, match="got none"):
        measure_over_seeds("x", "x", "%", [])
    with pytest.raises(ArgumentError, match="above 0"):
        ratio_over_seeds("x", "x", [1.0, 0.0])
    with pytest.raises(ArgumentError, match="there are none"):
        of_arm([record(1, 0, 0.5, 0.5)], "other")
    with pytest.raises(ArgumentError, match="expected a measure 'x'"):
        find([], "x")


def test_the_best_rate_is_chosen_on_validation_and_never_on_test() -> None:
    records = [
        record(0.1, 0, 0.8, 0.2),
        record(0.1, 1, 0.9, 0.2),
        record(1.0, 0, 0.7, 0.99),
        record(1.0, 1, 0.95, 0.99),
    ]
    assert best_rate(records, final_validation_accuracy) == 0.1
    for one in records:
        one["curves"]["test_accuracy"] = [0.0, 0.0]
    assert best_rate(records, final_validation_accuracy) == 0.1


def test_of_equally_good_rates_the_smallest_and_seeds_in_order() -> None:
    records = [record(1.0, 1, 0.8, 0.5), record(1.0, 0, 0.8, 0.5), record(0.5, 1, 0.8, 0.4), record(0.5, 0, 0.8, 0.3)]
    assert [(one["rate"], one["seed"]) for one in at_best_rate(records, final_validation_accuracy)] == [
        (0.5, 0),
        (0.5, 1),
    ]


def test_what_is_not_finite_counts_as_the_worst() -> None:
    assert last(record(1, 0, None, 0.5), "validation_accuracy") == 0
    assert last({"curves": {"validation_loss": [1.0, None]}}, "validation_loss") == math.inf


def test_steps_to_a_level() -> None:
    one = {"curves": {"step": [0, 5, 10, 20], "test_accuracy": [0.1, None, 0.8, 0.9]}}
    assert steps_to(one, 0.8, "test_accuracy") == 10
    assert steps_to(one, 0.05, "test_accuracy") == 0
    assert steps_to(one, 0.95, "test_accuracy") is None


def test_gains_are_paired_by_seed() -> None:
    ours = [record(1, seed, 0.9, 0.5 + 0.1 * seed) for seed in range(3)]
    theirs = [record(1, seed, 0.9, 0.4 + 0.1 * seed) for seed in range(3)]
    found = gain_over_seeds("gain", "gain", ours, theirs)
    assert found.values == pytest.approx((10, 10, 10))
    assert found.high - found.low == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0, 0, 0, 0], None),
        ([1, 1, 1, 1], (0, 3)),
        ([0, 1, 0, 0], (0.5, 1.5)),
        ([1, 0, 1, 1], (1.5, 3)),
        ([0, 0, 0, 1], (2.5, 3)),
        ([1, 0, 0, 0], (0, 0.5)),
    ],
)
def test_the_window_in_which_a_curve_is_high(heights: list[float], expected: tuple[float, float] | None) -> None:
    assert window([0, 1, 2, 3], heights, 0.5) == expected
