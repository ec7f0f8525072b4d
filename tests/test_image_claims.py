"""Claims that train on images: cards, a small run from end to end, and records that must give each verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchnorm.lab.claim import Claim
from batchnorm.lab.claims import (
    CLAIMS,
    cost,
    dense_batches,
    domain_shift,
    image_statistics,
    landscape,
    noisy,
    paper_mnist,
    paper_rates,
    regularisation,
    residual_gradients,
    small_batches,
    whitening,
)
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run
from batchnorm.lab.datasets.images import Images
from batchnorm.lab.datasets.stored import store
from batchnorm.lab.record import make_record
from batchnorm.reporting.figures import look, to_svg

OURS = [claim for claim in CLAIMS if claim.CARD.tier in ("standard", "full")]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of ten classes that differ in a stripe."""
    generator = np.random.default_rng(0)
    y = np.arange(400) % 10
    x = generator.integers(0, 120, (400, 16, 16, 3))
    x[np.arange(400), y] += 120
    x = x.astype(np.uint8)
    return str(store(Images(x[:300], y[:300], x[300:], y[300:], "stripes"), tmp_path_factory.mktemp("a") / "stored"))


def small(run: Run) -> Run:
    training, network = run.training, run.network
    assert isinstance(training, ImageTraining)
    steps = min(training.steps, 4)
    size = 8 if training.order == "by_class" else min(training.batch_size, 32)
    looks = tuple({0: 0, steps // 2: 0, steps: 0})
    training = replace(training, rows=160, batch_size=size, steps=steps, evaluations=looks)
    if isinstance(network, ImageNetwork):
        network = replace(network, depth=min(network.depth, 5))
    return replace(run, training=training, network=replace(network, width=8))


@pytest.mark.parametrize("claim", OURS, ids=[claim.CARD.name for claim in OURS])
def test_a_small_run_goes_from_end_to_end(claim: Claim, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if claim is image_statistics:
        monkeypatch.setattr(claim, "EARLY", 2)
        monkeypatch.setattr(claim, "LATE", 4)
    if claim is dense_batches:
        monkeypatch.setattr(claim, "RATES", (0.1,))
    jobs = [
        replace(job, runs=tuple(small(run) for run in job.runs), images=folder)
        for job in claim.jobs((0, 1), claim.CARD.tier)
    ]
    keys = [run.key for job in jobs for run in job.runs]
    assert len(keys) == len(set(keys))
    records = [record for job in jobs for record in claim.run(job)]
    assert [record["key"] for record in records] == keys
    check(claim, records)


def check(claim: Claim, records: list[dict[str, Any]]) -> str:
    """Records -> measures -> verdict -> figures, all of it fit to be shown."""
    ordered = sorted(records, key=lambda record: (record["arm"], record["seed"], record["rate"], record["key"]))
    measures = claim.measure(ordered)
    assert len({measure.name for measure in measures}) == len(measures)
    assert {one.measure for one in claim.CARD.reported} <= {measure.name for measure in measures}
    verdict = claim.judge(measures)
    assert verdict.headline in measures
    assert "nan" not in verdict.reading
    with look():
        figures = claim.figure(ordered, measures)
        assert figures
        for figure, alt in figures.values():
            assert len(alt) > 40
            assert "nan" not in alt
            assert to_svg(figure, alt).startswith("<svg")
    return verdict.verdict


Make = Callable[[Run], dict[str, Any]]


def made(
    claim: Claim, values: Make, accuracy: Callable[[Run, float], float] = lambda run, at: at
) -> list[dict[str, Any]]:
    """Records whose accuracy, `at` of the way through the training, is `accuracy(run, at)`; more with each seed."""
    records = []
    for job in claim.jobs(SEEDS, claim.CARD.tier):
        for run in job.runs:
            steps = list(run.training.evaluations)
            heights = [accuracy(run, step / max(run.training.steps, 1)) + 0.001 * run.seed for step in steps]
            curves = {"step": steps, "validation_accuracy": heights, "seconds": steps}
            curves["test_accuracy"] = [None] * (len(steps) - 1) + heights[-1:]
            records.append(make_record(run, curves=curves, values=values(run), seconds=1.0, data_sha256=""))
    return records


def nothing(run: Run) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("speed", "gain", "verdict"),
    [(4.0, 0.1, "shown"), (4.0, -0.1, "partly"), (1.0, 0.1, "partly"), (1.0, -0.1, "not shown")],
)
def test_paper_rates(speed: float, gain: float, verdict: str) -> None:
    def accuracy(run: Run, at: float) -> float:
        if "plain" in run.arm:
            return 0.5 * at
        return min(0.5 * at * speed, 0.502) if at < 1 else 0.5 + gain

    assert check(paper_rates, made(paper_rates, nothing, accuracy)) == verdict


@pytest.mark.parametrize(
    ("batch", "group", "verdict"),
    [(0.10, 0.01, "shown"), (0.10, 0.12, "partly"), (0.02, 0.0, "partly"), (0.0, 0.0, "not shown")],
)
def test_small_batches(batch: float, group: float, verdict: str) -> None:
    def accuracy(run: Run, at: float) -> float:
        lost = {"batch": batch, "group": group}.get(run.arm.split()[0], 0.0)
        return 0.5 - (lost if run.training.batch_size == small_batches.SMALL else 0.0)

    assert check(small_batches, made(small_batches, nothing, accuracy)) == verdict


@pytest.mark.parametrize(
    ("batch", "layer", "verdict"),
    [(0.10, 0.01, "shown"), (0.10, 0.12, "partly"), (0.02, 0.0, "partly"), (0.0, 0.0, "not shown")],
)
def test_dense_batches(batch: float, layer: float, verdict: str) -> None:
    def accuracy(run: Run, at: float) -> float:
        lost = {"batch": batch, "layer": layer}.get(run.arm.split()[0], 0.0)
        return 0.5 - (lost if run.training.batch_size == dense_batches.SMALL else 0.0)

    assert check(dense_batches, made(dense_batches, nothing, accuracy)) == verdict


@pytest.mark.parametrize(
    ("heights", "verdict"), [((0.4, 0.5, 0.49), "shown"), ((0.4, 0.5, 0.45), "partly"), ((0.4, 0.5, 0.3), "not shown")]
)
def test_noisy(heights: Sequence[float], verdict: str) -> None:
    of = dict(zip(noisy._NETWORKS, heights, strict=True))
    assert check(noisy, made(noisy, nothing, lambda run, at: of[run.arm])) == verdict


@pytest.mark.parametrize(
    ("bn", "both", "verdict"),
    [(1.3, 1.0, "shown"), (1.3, 1.2, "partly"), (1.0, 1.0, "partly"), (1.0, 1.2, "not shown")],
)
def test_residual_gradients(bn: float, both: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        factor = {"plain + BN": bn, "residual + BN": both}.get(run.arm, 1.0)
        return {"norms": [factor ** (21 - layer) for layer in range(21)]}

    assert check(residual_gradients, made(residual_gradients, values)) == verdict


@pytest.mark.parametrize(
    ("gain", "loss", "verdict"), [(0.2, 0.2, "shown"), (0.2, 0.0, "partly"), (0.0, 0.2, "not shown")]
)
def test_domain_shift(gain: float, loss: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        old = dict.fromkeys(domain_shift.SHIFTS, 0.4)
        new = {**old, "brightness": 0.4 + gain, "contrast": 0.4 + gain, domain_shift.CLASS: 0.4 - loss}
        return {"old": old, "new": new}

    assert check(domain_shift, made(domain_shift, values)) == verdict


@pytest.mark.parametrize(
    ("gradient", "band", "verdict"),
    [(3.0, 2.0, "shown"), (3.0, 0.5, "partly"), (1.2, 0.5, "partly"), (0.5, 0.5, "not shown")],
)
def test_landscape(gradient: float, band: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        is_plain = run.arm == landscape.PLAIN
        sizes = {"band": band if is_plain else 1.0, "predictiveness": gradient if is_plain else 1.0, "beta": 1.0}
        return {name: [size * (1 + 0.001 * run.seed)] * 5 for name, size in sizes.items()}

    assert check(landscape, made(landscape, values)) == verdict


@pytest.mark.parametrize(
    ("bn", "both", "verdict"),
    [(0.02, 0.001, "shown"), (0.02, 0.02, "partly"), (-0.02, 0.001, "partly"), (-0.02, 0.02, "not shown")],
)
def test_regularisation(bn: float, both: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        return {"ensemble": 0.95} if run.arm == regularisation.NORMALISED and run.seed == 5 else {}

    heights = {regularisation.NORMALISED: 0.9 + bn, regularisation.BOTH: 0.9 + bn + both}
    records = made(regularisation, values, lambda run, at: heights.get(run.arm, 0.9))
    assert check(regularisation, records) == verdict


@pytest.mark.parametrize(
    ("speed", "drift", "verdict"),
    [(4.0, 2.0, "shown"), (4.0, 0.5, "partly"), (1.0, 2.0, "partly"), (1.0, 0.5, "not shown")],
)
def test_paper_mnist(speed: float, drift: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        looks = len(run.training.evaluations)
        is_plain = run.arm == paper_mnist.PLAIN
        typical = {"unit": 3, "percentiles": [[-1.0, 0.0, 1.0]] * looks}
        return {"drift": [drift if is_plain else 1.0] * (looks - 1), "typical": typical}

    def accuracy(run: Run, at: float) -> float:
        return min(0.97, at * (10 if run.arm == paper_mnist.PLAIN else 10 * speed))

    records = made(paper_mnist, values, accuracy)
    for record in records:
        record["curves"]["test_accuracy"] = record["curves"]["validation_accuracy"]
    assert check(paper_mnist, records) == verdict


@pytest.mark.parametrize(
    ("lag", "ruin", "verdict"),
    [(0.2, 0.3, "shown"), (0.2, 0.0, "partly"), (0.0, 0.3, "partly"), (0.0, 0.0, "not shown")],
)
def test_image_statistics(lag: float, ruin: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        looks = len(run.training.evaluations)
        lost = {image_statistics.SLOW: lag, image_statistics.BY_CLASS: ruin}.get(run.arm, 0.0)
        moving, other = [0.5 - lost] * looks, [0.5] * looks
        return {"moving average": moving, "population": other, "batch": other}

    assert check(image_statistics, made(image_statistics, values)) == verdict


@pytest.mark.parametrize(
    ("whitened", "verdict"),
    [
        ({0.1: (0.6, 0.6)}, "shown"),
        ({0.1: (0.5, 0.7), 0.3: (0.6, 0.4)}, "partly"),  # the rate that validation likes best is not the equal one
        ({0.1: (0.4, 0.4)}, "not shown"),
    ],
)
def test_whitening(whitened: dict[float, tuple[float, float]], verdict: str) -> None:
    records = made(whitening, nothing, lambda run, at: 0.5 if run.rate == 0.1 else 0.2)
    for record in records:
        if record["arm"] == whitening.WHITENED:
            on_validation, on_test = whitened.get(record["rate"], (0.1, 0.1))
            record["curves"]["validation_accuracy"][-1] = on_validation
            record["curves"]["test_accuracy"][-1] = on_test + 0.001 * record["seed"]
    assert check(whitening, records) == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(1.1, 1.3, "shown"), (1.1, 1.0, "partly"), (1.5, 1.6, "partly"), (1.5, 1.4, "not shown")],
)
def test_cost(ours: float, theirs: float, verdict: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        return {"seconds": {cost.OURS: ours, cost.TORCH: theirs}.get(run.arm, 1.0) / 100, "kept": 1_000_000}

    assert check(cost, made(cost, values)) == verdict


def test_jobs_of_images_are_no_part_of_a_key() -> None:
    job = paper_rates.jobs((0,), "full")[0]
    assert [run.key for run in replace(job, images="elsewhere").runs] == [run.key for run in job.runs]
    assert isinstance(job, Job)
