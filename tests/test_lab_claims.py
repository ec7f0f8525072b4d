"""Every claim: the protocol, a small run from end to end, and hand-made records that must give each verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchnorm.lab.claim import Claim, Measure
from batchnorm.lab.claims import (
    CLAIMS,
    batch_size,
    distribution_drift,
    inference_statistics,
    initial_scale,
    learning_rates,
    placement,
    sigmoid_steps,
)
from batchnorm.lab.config import Job, Run
from batchnorm.lab.drift import drift
from batchnorm.lab.measures import find
from batchnorm.lab.record import make_record
from batchnorm.reporting.figures import look, to_svg
from batchnorm.stats import Running

OURS = (sigmoid_steps, distribution_drift, learning_rates, initial_scale, batch_size, inference_statistics, placement)
SEEDS = (0, 1, 2)
ids = [claim.__name__.rpartition(".")[2] for claim in OURS]


def drawn(claim: Claim, records: list[dict[str, Any]], measures: list[Measure]) -> None:
    assert {one.measure for one in claim.CARD.reported} <= {measure.name for measure in measures}
    with look():
        figures = claim.figure(records, measures)
        assert figures
        for figure, alt in figures.values():
            assert len(alt) > 40
            assert "nan" not in alt
            assert to_svg(figure, alt).startswith("<svg")


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.CARD.name for claim in CLAIMS])
def test_a_claim_has_all_that_the_protocol_asks_for(claim: Claim) -> None:
    for name, text in vars(claim.CARD).items():
        assert text or name in ("paper_figure", "reported")  # no paper has measured your network
        assert name == "reported" or text == text.strip()
    jobs = claim.jobs(SEEDS, "quick")
    keys = [run.key for job in jobs for run in job.runs]
    assert len(keys) == len(set(keys))
    assert {run.claim for job in jobs for run in job.runs} == {claim.CARD.name}
    assert set(SEEDS) <= {run.seed for job in jobs for run in job.runs}
    for function in (claim.run, claim.measure, claim.judge, claim.figure):
        assert callable(function)


def test_names_of_claims_are_distinct_and_those_of_their_modules() -> None:
    names = [claim.CARD.name for claim in CLAIMS]
    assert len(set(names)) == len(names)
    assert names == [claim.__name__.rpartition(".")[2] for claim in CLAIMS]  # type: ignore[attr-defined]


@pytest.mark.parametrize("claim", OURS, ids=ids)
def test_arms_are_paired_by_seed_and_differ_in_the_arm_alone(claim: Claim) -> None:
    by_arm: dict[str, set[tuple[int, float]]] = {}
    for job in claim.jobs(SEEDS, "quick"):
        for run in job.runs:
            by_arm.setdefault(run.arm, set()).add((run.seed, run.rate))
    assert len(by_arm) >= 2
    assert len({frozenset(pairs) for pairs in by_arm.values()}) == 1


def small(run: Run) -> Run:
    return replace(run, network=replace(run.network, width=6)).with_training(steps=4, evaluations=(0, 2, 4))


@pytest.mark.parametrize("claim", OURS, ids=ids)
def test_a_small_run_goes_from_end_to_end(claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if claim is inference_statistics:
        monkeypatch.setattr(claim, "EARLY", 2)
        monkeypatch.setattr(claim, "LATE", 4)
    jobs = [Job(job.claim, tuple(small(run) for run in job.runs)) for job in claim.jobs((0, 1), "quick")]
    records = [record for job in jobs for record in claim.run(job)]
    assert [record["key"] for record in records] == [run.key for job in jobs for run in job.runs]
    measures = claim.measure(records)
    verdict = claim.judge(measures)
    assert verdict.headline in measures
    assert verdict.verdict in ("shown", "partly", "not shown")
    assert "nan" not in verdict.reading
    assert len({measure.name for measure in measures}) == len(measures)
    drawn(claim, records, measures)


Make = Callable[[Run], tuple[dict[str, list[Any]], dict[str, Any]]]


def made(claim: Claim, make: Make) -> list[dict[str, Any]]:
    records = []
    for job in claim.jobs(SEEDS, "quick"):
        for run in job.runs:
            curves, values = make(run)
            records.append(make_record(run, curves=curves, values=values, seconds=1.0, data_sha256=""))
    return records


def ends_at(accuracy: Callable[[Run], float]) -> Make:
    """Records whose accuracies are constant; validation agrees with test."""

    def make(run: Run) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        steps = list(run.training.evaluations)
        heights = [accuracy(run)] * len(steps)
        curves = {"step": steps, "test_accuracy": heights, "validation_accuracy": heights, "seconds": steps}
        return curves, {}

    return make


def reaches_at(step: Callable[[Run], int]) -> Make:
    """Records that reach 90 % accuracy at the first evaluation that is not before a step."""

    def make(run: Run) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        steps = list(run.training.evaluations)
        heights = [0.9 if at >= step(run) else 0.1 for at in steps]
        curves = {"step": steps, "test_accuracy": heights, "validation_accuracy": heights, "seconds": steps}
        return curves, {}

    return make


def drifts(plain: float, normalised: float) -> Make:
    def make(run: Run) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        curves, _ = ends_at(lambda _: 0.9)(run)
        looks = len(run.training.evaluations)
        histogram = {"step": 5, "low": -1.0, "high": 1.0, "counts": [1, 2, 1], "mean": 0.0, "std": 0.5}
        drift = [(plain if run.arm == "plain" else normalised) / (looks - 1)] * (looks - 1)
        typical = {"unit": 3, "percentiles": [[-1.0, 0.0, 1.0]] * looks, "histograms": [histogram, histogram]}
        return curves, {"drift": drift, "drift_before": drift, "typical": typical}

    return make


def lags(accuracy: float, distance: float) -> Make:
    """The slow moving average: accuracy (fraction) and distance at all steps; population statistics: 0.9 and 0.01."""

    def make(run: Run) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        curves, _ = ends_at(lambda _: 0.9)(run)
        looks = len(run.training.evaluations)
        is_slow = run.arm == "momentum 0.01"
        right = dict.fromkeys(("batch", "mean of batches", "population", "truth"), [0.9] * looks)
        near = dict.fromkeys(("batch", "mean of batches", "population", "truth"), [0.01] * looks)
        right["moving average"] = [accuracy if is_slow else 0.9] * looks
        near["moving average"] = [distance if is_slow else 0.02] * looks
        return curves, {"accuracy": right, "distance": near}

    return make


def by_size(batch_at_2: float, layer_at_2: float = 0.9) -> Make:
    at_2 = {"batch norm": batch_at_2, "layer norm": layer_at_2}
    return ends_at(lambda run: at_2[run.arm] if run.training.batch_size == 2 else 0.9)


def rates_to(plain: float, normalised: float) -> Make:
    largest = {"plain": plain, "batch norm": normalised}
    return ends_at(lambda run: 0.95 if 0.01 < run.rate < largest[run.arm] else 0.1)


def scales_to(plain: float, normalised: float) -> Make:
    largest = {"plain": plain, "batch norm": normalised}
    return ends_at(lambda run: 0.95 if 0.002 < run.network.init_scale < largest[run.arm] else 0.1)


def places(sigmoid: float, relu: float) -> Make:
    """How much higher accuracy is before the activation."""
    gain = {"before sigmoid": sigmoid, "before ReLU": relu}
    return ends_at(lambda run: 0.9 + gain.get(run.arm, 0.0))


def slower(run: Run) -> int:
    return 600 if run.arm.startswith("plain") else 50


CASES = [
    (sigmoid_steps, reaches_at(slower), "shown"),
    (sigmoid_steps, reaches_at(lambda run: 70 if run.arm.startswith("plain") else 50), "partly"),
    (sigmoid_steps, reaches_at(lambda run: 600 if run.arm == "plain" else 50), "partly"),  # the control does not show
    (sigmoid_steps, reaches_at(lambda _: 50), "not shown"),
    (sigmoid_steps, reaches_at(lambda run: 650 - slower(run)), "not shown"),
    (sigmoid_steps, reaches_at(lambda _: 10**6), "not shown"),  # nobody ever gets there
    (distribution_drift, drifts(6.0, 1.0), "shown"),
    (distribution_drift, drifts(1.2, 1.0), "partly"),
    (distribution_drift, drifts(0.8, 1.0), "not shown"),
    (learning_rates, rates_to(0.3, 30.0), "shown"),
    (learning_rates, rates_to(0.3, 0.5), "partly"),
    (learning_rates, rates_to(0.3, 0.3), "not shown"),
    (learning_rates, rates_to(0.0, 0.0), "not shown"),  # no rate trains
    (initial_scale, scales_to(0.02, 2.0), "shown"),
    (initial_scale, scales_to(0.02, 0.05), "partly"),
    (initial_scale, scales_to(0.0, 0.0), "not shown"),
    (batch_size, by_size(0.5), "shown"),
    (batch_size, by_size(0.87), "partly"),
    (batch_size, by_size(0.5, layer_at_2=0.5), "partly"),  # layer normalisation loses as much
    (batch_size, by_size(0.9), "not shown"),
    (inference_statistics, lags(0.6, 0.5), "shown"),
    (inference_statistics, lags(0.89, 0.5), "partly"),
    (inference_statistics, lags(0.9, 0.01), "not shown"),
    (placement, places(0.02, 0.01), "shown"),
    (placement, places(0.02, 0.0), "partly"),
    (placement, places(0.02, -0.03), "not shown"),
    (placement, places(0.0, 0.0), "not shown"),
]


@pytest.mark.parametrize(
    ("claim", "make", "expected"), CASES, ids=[f"{case[0].CARD.name}-{n}-{case[2]}" for n, case in enumerate(CASES)]
)
def test_hand_made_records_give_the_verdict(claim: Claim, make: Make, expected: str) -> None:
    records = made(claim, make)
    measures = claim.measure(records)
    assert claim.judge(measures).verdict == expected


def test_an_interval_that_reaches_below_the_threshold_is_not_shown() -> None:
    """The mean alone would pass; the seeds do not agree."""
    step = {0: 55, 1: 900, 2: 900}
    records = made(sigmoid_steps, reaches_at(lambda run: step[run.seed] if run.arm.startswith("plain") else 50))
    measures = sigmoid_steps.measure(records)
    assert find(measures, "ratio_own").mean > sigmoid_steps.FEWER
    assert sigmoid_steps.judge(measures).verdict == "not shown"


def test_runs_that_never_reach_the_level_are_counted_in_the_label() -> None:
    records = made(sigmoid_steps, reaches_at(lambda run: 10**6 if run.arm.startswith("plain") else 50))
    assert "3 of 6 runs never reach it" in find(sigmoid_steps.measure(records), "ratio_own").label


def test_the_rate_is_tuned_on_validation_rows() -> None:
    """One rate is best on the validation rows, another one on the test rows: the first is reported."""

    def make(run: Run) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        curves, values = ends_at(lambda _: 0.9)(run)
        curves["validation_accuracy"] = [0.95 if run.rate == 0.3 else 0.9] * len(curves["step"])
        curves["test_accuracy"] = [0.6 if run.rate == 0.3 else 0.99] * len(curves["step"])
        return curves, values

    measures = placement.measure(made(placement, make))
    assert find(measures, "accuracy_relu_before").mean == pytest.approx(60)


def test_drift_does_not_depend_on_the_scale_of_the_inputs() -> None:
    looks = np.cumsum(np.random.default_rng(0).uniform(size=(7, 2, 3, 5)), axis=2)
    found = drift(looks)
    assert found.shape == (6, 2, 5)
    assert drift(10 * looks) == pytest.approx(found)
    shifted = looks + np.arange(7)[:, None, None, None]
    assert drift(shifted).sum() > found.sum()
    assert (drift(np.ones((3, 1, 3, 2))) == 0).all()


def test_distance_is_in_standard_deviations_of_the_truth() -> None:
    import torch

    truth = [Running(torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 4.0]]))]
    shifted = [Running(torch.tensor([[2.0, 1.0]]), torch.tensor([[4.0, 9.0]]))]
    assert inference_statistics.distance(truth, truth).item() == 0
    assert inference_statistics.distance(shifted, truth).item() == pytest.approx(0.5, abs=1e-4)
    assert math.isfinite(inference_statistics.distance(shifted, [Running(truth[0].mean, 0 * truth[0].var)]).item())
