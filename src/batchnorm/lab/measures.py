"""records -> numbers: the best rate on validation, steps to a level, intervals over seeds. Nothing here trains."""

from __future__ import annotations

import math
import re
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


def key(words: str) -> str:
    """Words as a part of a measure's name.

    >>> key("BN-x5, sigmoid"), key("deep linear + batch norm")
    ('bn_x5_sigmoid', 'deep_linear_batch_norm')
    """
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def median_of(record: Record, what: str) -> float:
    """The median of the numbers in a value of a record, above 0 so that ratios exist; those not finite are left out.

    Where none is finite the network diverged at once, and the value counts as 1e12.
    """
    values = [value for value in record["values"][what] if value is not None]
    return max(statistics.median(values), 1e-12) if values else 1e12


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


def window(places: Sequence[float], heights: Sequence[float], level: float) -> tuple[float, float] | None:
    """The widest stretch in which a curve is at least at a level.

    Args:
        places: Where the curve is known, ascending (logarithms, for a quantity that spans powers of ten).
        heights: The curve, one value for each place.
        level: The level.

    Returns:
        Its two ends, interpolated linearly between the last place below the level and the first one above it, or the
        first or last place of all; None if the curve is nowhere at the level.

    >>> window([0, 1, 2, 3], [0.0, 1.0, 1.0, 0.5], 0.75)
    (0.75, 2.5)
    """
    stretches, start = [], 0
    for at, height in enumerate([*heights, -math.inf]):
        if height >= level:
            continue
        if at > start:
            low = _crossing(places, heights, level, start, start - 1) if start > 0 else float(places[0])
            high = _crossing(places, heights, level, at - 1, at) if at < len(places) else float(places[-1])
            stretches.append((low, high))
        start = at + 1
    return max(stretches, key=lambda stretch: stretch[1] - stretch[0], default=None)


def _crossing(places: Sequence[float], heights: Sequence[float], level: float, inside: int, outside: int) -> float:
    share = (heights[inside] - level) / (heights[inside] - heights[outside])
    return places[inside] + share * (places[outside] - places[inside])


def _interval(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        raise ArgumentError(f"expected one value for each seed for {name!r}, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1 or not all(math.isfinite(value) for value in values):
        return mean, mean, mean
    half = float(stdtrit(len(values) - 1, 0.5 + _CONFIDENCE / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
