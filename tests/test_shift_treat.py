"""Density ratios against known ones, with scikit-learn's manners; treat() adopts on evidence and nothing else."""

from __future__ import annotations

import pickle

import numpy as np
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from batchnorm.errors import ArgumentError
from batchnorm.shift import KLIEP, ULSIF, ClassifierRatio, Reference, RuLSIF, treat
from batchnorm.shift.density_ratio import effective_sample_size
from batchnorm.shift.evidence import adopted, paired
from batchnorm.shift.partitions import from_parts, spark_partition

ESTIMATORS = (ClassifierRatio(), KLIEP(), ULSIF(), RuLSIF(), RuLSIF(alpha=0.5))


@pytest.fixture(scope="module")
def gaussians():
    """Rows of N(0, 1) and N(0.7, 1), and the true ratio exp(0.7 x - 0.245)."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, 1500), rng.normal(0.7, 1, 1500)])[:, None]
    return x, np.arange(3000) >= 1500


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_ratios_of_gaussians_are_found(gaussians, estimator):
    x, is_new = gaussians
    grid = np.linspace(-1.5, 1.5, 31)[:, None]
    true = np.exp(0.7 * grid[:, 0] - 0.245)
    alpha = getattr(estimator, "alpha", 0.0)
    expected = true / (alpha * true + 1 - alpha)
    found = clone(estimator).fit(x, is_new).transform(grid)
    assert found.shape == (31, 1)
    assert np.corrcoef(found[:, 0], expected)[0, 1] > 0.8
    np.testing.assert_allclose(found[:, 0].mean(), expected.mean(), rtol=0.25)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_weights_move_the_mean_of_the_old_side_to_the_new_one(gaussians, estimator):
    x, is_new = gaussians
    weight = clone(estimator).fit(x, is_new).sample_weight(x[~is_new])
    assert weight.mean() == pytest.approx(1.0)
    moved = np.average(x[~is_new, 0], weights=weight)
    assert 0.25 < moved < 0.95


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_estimators_stand_in_a_pipeline_and_can_be_cloned_and_pickled(gaussians, estimator):
    x, is_new = gaussians
    twin = clone(estimator)
    assert twin.get_params() == estimator.get_params()
    pipe = make_pipeline(StandardScaler(), twin).fit(x, is_new)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pipe)).transform(x[:5]), pipe.transform(x[:5]))


def test_rulsif_is_bounded_and_equal_sides_weigh_the_same(gaussians):
    x, is_new = gaussians
    assert RuLSIF(alpha=0.5).fit(x * 5, is_new).transform(x * 5).max() < 2.5
    same = np.random.default_rng(1).random(3000) < 0.5
    for estimator in (ClassifierRatio(), KLIEP(), ULSIF(), RuLSIF()):
        assert effective_sample_size(clone(estimator).fit(x, same).sample_weight(x)) > 0.9


def test_a_ratio_refuses_bad_sides(gaussians):
    x, is_new = gaussians
    with pytest.raises(ArgumentError, match="y must say the side of each of the 3000 rows"):
        ULSIF().fit(x, np.full(3000, 2))
    with pytest.raises(ArgumentError, match="at least 6 rows on each side"):
        ULSIF().fit(x, np.arange(3000) < 3)
    with pytest.raises(ArgumentError, match="groups must be 3000 integers, got float64"):
        ULSIF().fit(x, is_new, groups=x[:, 0])
    with pytest.raises(ArgumentError, match="alpha must be at least 0 and below 1"):
        RuLSIF(alpha=1.0).fit(x, is_new)


def test_a_gain_must_be_shown_after_the_correction():
    rng = np.random.default_rng(0)
    base = rng.random(50) + 1
    evidence = {"worse": paired(base, base + 0.5), "chance": paired(base, base + rng.normal(0, 0.5, 50))}
    assert adopted(evidence) is None
    evidence["better"] = paired(base, base - 0.3 + 0.1 * rng.normal(size=50))
    assert adopted(evidence) == "better"
    assert adopted({}) is None
    with pytest.raises(ArgumentError, match="at least 10 labelled rows, got 9"):
        paired(base[:9], base[:9])
    with pytest.raises(ArgumentError, match="not finite"):
        paired(base, np.full(50, np.nan))


def test_repeated_rows_of_a_group_are_no_evidence():
    """Twelve patients' rows, 20 times each: row by row a chance difference looks sure."""
    rng = np.random.default_rng(2)
    few = rng.normal(-0.3, 1.0, 12)
    base, difference, group = np.full(240, 9.0), np.repeat(few, 20), np.repeat(np.arange(12), 20)
    by_rows, by_groups = paired(base, base + difference), paired(base, base + difference, group)
    assert by_rows.p_value < 0.001
    assert by_groups.p_value == pytest.approx(paired(base[:12], base[:12] + few).p_value)
    assert by_groups.change == pytest.approx(by_rows.change)
    with pytest.raises(ArgumentError, match="at least 10 groups or time blocks, got 9"):
        paired(base[:180], base[:180], group[:180])


def test_chance_adopts_nothing_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(1000):
        base = rng.normal(size=50) ** 2 + 1
        count += adopted({str(i): paired(base, base + rng.normal(size=50)) for i in range(6)}) is not None
    assert count <= 70


def units_changed(rows, scale, shift, rng):
    """A target of standardised inputs whose unit has changed on the new side: own moments put it right."""
    x = rng.normal(size=(rows, 3))
    y = 3 * x[:, 0] + x[:, 1]
    return pl.DataFrame({"a": x[:, 0] * scale + shift, "b": x[:, 1] * scale + shift, "c": x[:, 2], "y": y})


def test_treat_adopts_a_treatment_that_helps():
    rng = np.random.default_rng(0)
    old, new, few = (units_changed(n, s, m, rng) for n, s, m in ((800, 1, 0), (800, 4, 9), (50, 4, 9)))
    reference = Reference.of(old)
    ahead = Reference.of(new.drop("y"), like=reference.without("y"))
    found = treat(reference, ahead, target="y", labels=few)
    assert found.adopted == "standardise each side"
    assert found.labels == 50
    blind = treat(reference, ahead, target="y")
    assert blind.adopted is None
    assert all(one.evidence is None for one in blind.candidates)


def test_disjoint_sides_have_no_overlap_whatever_the_effective_sample_size_reads():
    rng = np.random.default_rng(0)
    old, new = units_changed(400, 1, 0, rng), units_changed(400, 1, 50, rng)
    found = treat(Reference.of(old), Reference.of(new, like=Reference.of(old)), target="y")
    classifier = next(one for one in found.candidates if one.name == "classifier weights")
    assert classifier.effective_sample_size > 0.95
    assert found.overlap < 0.05


def test_treat_does_nothing_where_nothing_has_moved():
    """Once in twenty times it may: of the seeds 0 to 59 it does for one, the first."""
    rng = np.random.default_rng(1)
    old, new, few = (units_changed(n, 1, 0, rng) for n in (500, 500, 50))
    reference = Reference.of(old)
    assert treat(reference, Reference.of(new, like=reference), target="y", labels=few).adopted == "nothing"


def test_what_an_executor_of_spark_runs_merges_to_the_whole():
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = units_changed(300, 1, 0, np.random.default_rng(0))
    kinds = {name: column.kind for name, column in Reference.of(table).columns.items()}
    frames = [table[a : a + 100].to_pandas() for a in (0, 100, 200)]
    parts = [
        pickle.loads(row["reference"][0]) for f in frames for row in spark_partition([f], kinds=kinds, sample_rows=50)
    ]
    whole = parts[0].merge(*parts[1:])
    assert whole.rows == 300
    assert whole.sample.height == 50
    expected = Reference.of(table).columns["a"]
    assert whole.columns["a"].histogram.count.tolist() == expected.histogram.count.tolist()
    assert (
        from_parts([table[:100], table[100:]]).columns["a"].histogram.index.tolist()
        == expected.histogram.index.tolist()
    )
    with pytest.raises(ArgumentError, match="no parts came"):
        from_parts([])
