"""records -> numbers: the best rate on validation, steps to a level, intervals over seeds. Nothing here trains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from scipy.special import stdtrit

from batchnorm.errors import ArgumentError
from batchnorm.lab.claim import Measure, Record
from batchnorm.reporting.numbers import interval, quantity

_CONFIDENCE = 0.95


def measure_over_seeds(name: str, label: str, unit: str, values: Sequence[float]) -> Measure:
    """A measure with the mean of its values and the 95 % Student-t interval of that mean.

    Args:
        name: Key in results.json.
        label: What it is, in words.
        unit: Unit of the values.
        values: One for each seed.

    Returns:
        The measure. With one seed there is no interval: both of its ends are the value.

    Raises:
        ArgumentError: There is no value.
    """
    return Measure(name, label, unit, tuple(values), *_interval(name, values))


def ratio_over_seeds(name: str, label: str, values: Sequence[float]) -> Measure:
    """A measure of ratios: geometric mean and 95 % Student-t interval on the logarithmic scale, unit "x".

    Args:
        name: Key in results.json.
        label: What it is, in words.
        values: One ratio for each seed, each above 0.

    Returns:
        The measure.

    Raises:
        ArgumentError: There is no value, or one is not above 0.
    """
    if any(not value > 0 for value in values):
        raise ArgumentError(f"expected ratios above 0 for {name!r}, got {list(values)}")
    mean, low, high = (math.exp(value) for value in _interval(name, [math.log(value) for value in values]))
    return Measure(name, label, "x", tuple(values), mean, low, high)


def find(measures: Iterable[Measure], name: str) -> Measure:
    """The measure of that name.

    Raises:
        ArgumentError: There is none.
    """
    measures = list(measures)
    for measure in measures:
        if measure.name == name:
            return measure
    raise ArgumentError(f"expected a measure {name!r}, there are {[measure.name for measure in measures]}")


def said(measure: Measure) -> str:
    r"""A measure as it stands in a sentence.

    >>> said(measure_over_seeds("width", "width", "decades", [2.0, 2.5, 2.1]))
    '2.20\xa0decades (95 % interval 1.54 to 2.86)'
    """
    around = f" (95 % interval {interval(measure.low, measure.high)})" if len(measure.values) > 1 else " (one seed)"
    return quantity(measure.mean, measure.unit) + around


def accuracy_over_seeds(name: str, label: str, records: Sequence[Record]) -> Measure:
    """Final test accuracy, in %, of one record for each seed."""
    return measure_over_seeds(name, label, "%", [100 * last(record, "test_accuracy") for record in records])


def gain_over_seeds(name: str, label: str, ours: Sequence[Record], theirs: Sequence[Record]) -> Measure:
    """How much higher the final test accuracy of `ours` is, seed by seed, in percentage points."""
    pairs = zip(ours, theirs, strict=True)
    values = [100 * (last(one, "test_accuracy") - last(other, "test_accuracy")) for one, other in pairs]
    return measure_over_seeds(name, label, "points", values)


def of_arm(records: Iterable[Record], arm: str) -> list[Record]:
    """The records of one arm.

    Raises:
        ArgumentError: There is none.
    """
    found = [record for record in records if record["arm"] == arm]
    if not found:
        raise ArgumentError(f"expected records of the arm {arm!r}, there are none: were all jobs of the claim run?")
    return found


def at_rate(records: Iterable[Record], rate: float) -> list[Record]:
    """The records at one rate, one for each seed, in the order of the seeds."""
    return sorted((record for record in records if record["rate"] == rate), key=lambda record: int(record["seed"]))


def best_rate(records: Iterable[Record], score: Callable[[Record], float]) -> float:
    """The rate with the highest mean score over the seeds: one rate for all seeds of an arm.

    Args:
        records: Of one arm, at several rates.
        score: Of a record, from its validation curves only; higher is better.

    Returns:
        The rate; of several with the same score the smallest.
    """
    scores: dict[float, list[float]] = {}
    for record in records:
        scores.setdefault(record["rate"], []).append(score(record))
    return min(scores, key=lambda rate: (-statistics.fmean(scores[rate]), rate))


def at_best_rate(records: Iterable[Record], score: Callable[[Record], float]) -> list[Record]:
    """The records at `best_rate`, one for each seed, in the order of the seeds."""
    records = list(records)
    return at_rate(records, best_rate(records, score))


def last(record: Record, curve: str) -> float:
    """The last value of a curve; where it is None (not finite), infinity for a loss and 0 for an accuracy."""
    value = record["curves"][curve][-1]
    if value is None:
        return math.inf if curve.endswith("loss") else 0.0
    return float(value)


def final_validation_accuracy(record: Record) -> float:
    """What most claims tune their rates on."""
    return last(record, "validation_accuracy")


def steps_to(record: Record, level: float, curve: str) -> int | None:
    """The first evaluation step at which a curve is at least at a level, or None if it never gets there."""
    for step, value in zip(record["curves"]["step"], record["curves"][curve], strict=True):
        if value is not None and value >= level:
            return int(step)
    return None


def longest_window(passes: Sequence[bool]) -> tuple[int, int]:
    """The longest run of neighbours that pass, as (first, number); of several the first, and (0, 0) if none passes.

    >>> longest_window([True, False, True, True, False])
    (2, 2)
    """
    best, start = (0, 0), 0
    for place, is_passed in enumerate([*passes, False]):
        if is_passed:
            continue
        if place - start > best[1]:
            best = (start, place - start)
        start = place + 1
    return best


def _interval(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        raise ArgumentError(f"expected one value for each seed for {name!r}, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1 or not all(math.isfinite(value) for value in values):
        return mean, mean, mean
    half = float(stdtrit(len(values) - 1, 0.5 + _CONFIDENCE / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
