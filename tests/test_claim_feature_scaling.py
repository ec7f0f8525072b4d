"""The descent of the feature-scaling claim against its closed form, and its verdicts against its thresholds."""

import numpy as np
import pytest
from sklearn.datasets import load_wine

from batchnorm.lab.claims import feature_scaling as claim
from batchnorm.lab.measures import measure_over_seeds, ratio_over_seeds


@pytest.fixture(scope="module")
def records():
    return [record for job in claim.jobs((0, 1), "quick") for record in claim.run(job)]


def _one(records, arm, seed, rate):
    return next(r for r in records if (r["arm"], r["seed"], r["rate"]) == (arm, seed, rate))


def test_gap_follows_the_closed_form_of_gradient_descent(records):
    problem = claim._Problem("standardised", 0)
    eigenvalues, vectors = np.linalg.eigh(problem.hessian)
    apart = ((vectors.T @ (problem.start - problem.minimum)) ** 2).sum(axis=1)
    record = _one(records, "standardised", 0, 2.0**-4)
    for step, gap in zip(record["curves"]["step"], record["curves"]["gap"], strict=True):
        left = (eigenvalues * apart * (1 - record["rate"] * eigenvalues) ** (2 * step)).sum()
        assert gap == pytest.approx(left / (eigenvalues * apart).sum(), rel=1e-3, abs=1e-12)


def test_condition_number_of_raw_wine_is_enormous_and_of_whitened_one(records):
    assert _one(records, "raw", 0, 2.0**-19)["values"]["condition_number"] > 1e8
    assert _one(records, "whitened", 0, 1.0)["values"]["condition_number"] == pytest.approx(1.0, rel=1e-5)


def test_all_arms_start_from_the_same_predictions():
    starts = [claim._Problem(arm, 3) for arm in claim.ARMS]
    predictions = [problem.x @ problem.start for problem in starts]
    for other in predictions[1:]:
        np.testing.assert_allclose(other, predictions[0], atol=1e-6)
    assert len(load_wine().target) - len(starts[0].x) - len(starts[0].held_out[0]) == 40  # the test rows stay out


def test_whitened_descent_arrives_in_one_step_and_too_large_a_rate_diverges(records):
    assert _one(records, "whitened", 0, 1.0)["values"]["steps_to_gap"] == 1
    record = _one(records, "standardised", 0, 2.0)
    assert record["values"]["diverged_at"] is not None
    assert record["curves"]["gap"][-1] is None


def test_at_least_five_seeds_and_those_asked_for():
    assert {run.seed for run in claim.jobs((7,), "quick")[0].runs} == {0, 1, 2, 3, 4, 7}
    assert {run.seed for run in claim.jobs(tuple(range(6)), "quick")[0].runs} == set(range(6))


@pytest.mark.parametrize(
    ("rounder", "faster", "verdict"),
    [(1e6, 600.0, "shown"), (1e6, 5.0, "partly"), (50.0, 600.0, "partly"), (50.0, 5.0, "not shown")],
)
def test_verdict_follows_the_thresholds(records, rounder, faster, verdict):
    measures = {one.name: one for one in claim.measure(records)}
    measures["rounder"] = ratio_over_seeds("rounder", "", [rounder] * 3)
    measures["faster"] = ratio_over_seeds("faster", "", [faster] * 3)
    assert claim.judge(list(measures.values())).verdict == verdict


def test_reading_says_so_when_raw_features_arrive(records):
    measures = {one.name: one for one in claim.measure(records)}
    assert "has not arrived" in claim.judge(list(measures.values())).reading
    measures["steps_raw"] = measure_over_seeds("steps_raw", "", "", [400.0] * 3)
    assert "on raw features it takes 400." in claim.judge(list(measures.values())).reading


def test_figures_have_alternative_text(records):
    figures = claim.figure(records, claim.measure(records))
    assert list(figures) == ["raw", "standardised", "whitened", "descent"]
    assert all(len(alt) > 40 for _, alt in figures.values())
