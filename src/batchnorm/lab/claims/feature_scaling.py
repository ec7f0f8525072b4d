"""Feature scaling makes the error surface rounder and gradient descent faster."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import Job, Network, Run, Tier, Training
from batchnorm.lab.data import load
from batchnorm.lab.measures import (
    at_best_rate,
    at_rate,
    best_rate,
    find,
    last,
    measure_over_seeds,
    of_arm,
    ratio_over_seeds,
)
from batchnorm.lab.record import make_record, significant
from batchnorm.layers.feature import FeatureNormalization
from batchnorm.reporting.numbers import number, quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDER = 100.0
"""Shown: standardising divides the condition number by at least this much ..."""
FASTER = 10.0
"""... and the steps to the gap, each arm at its own best rate, by at least this much."""
GAP = 0.01
"""Descent has arrived when this part of the reachable fall of the loss is left."""
CAP = 10_000
"""Steps after which a descent that has not arrived is given up; it is then reported as "more than"."""
AT_LEAST_SEEDS = 5

ARMS = ("raw", "standardised", "whitened")
RATES = tuple(2.0**k for k in range(-22, 2))
PAIR = (0, 9)
"""The two features of the contour plot: alcohol (per cent) and colour intensity, whose raw scales are not so far apart
that nothing could be drawn."""
_PAIR_STEPS = (*range(11), 15, 20, 30, 50, 100)
_TRAIN_ROWS = 100
_ROUNDING = 1e-15  # of the start's gap; below it stands nothing but rounding
_DIVERGED = 1e6  # times the loss gap of the start

CARD = Card(
    name="feature_scaling",
    title="Scaled features make the error surface round and descent fast",
    claim="With features on one scale the error surface of a model is rounder, so that gradient descent reaches the "
    "minimum in fewer steps.",
    source="Courses on deep learning (normalising inputs); LeCun et al. 1998, Efficient BackProp, section 4.3",
    paper_figure="no number: a drawing of long and of round contours",
    setup=f"A linear model with bias and squared loss on the three classes of wine (13 features), full-batch gradient "
    f"descent. Each seed draws {_TRAIN_ROWS} of the 138 training and validation rows to train on and a start that is "
    f"the same function in all arms. Every arm runs at {len(RATES)} rates, a factor of 2 apart; its own best rate is "
    f"the one with the lowest validation loss, averaged over logarithmically spaced steps. Descent has arrived when "
    f"{GAP:.0%} of the reachable fall of the training loss is left, and is given up after {CAP:,} steps.",
    caveat="A linear model, whose surface stays the same wherever one stands. In a deep network the surface of a layer "
    "changes as the layers below learn, and scaled inputs help the first layer only.",
    threshold=f"Standardising divides the condition number of the Hessian by at least {ROUNDER:.0f}, and the steps, "
    f"each arm at its own best rate, by at least {FASTER:.0f} (lower ends of the intervals). Partly: one of the two.",
)

Array = npt.NDArray[np.float64]


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """One job for each arm: all seeds, at least five, at all rates."""
    training = Training(data="wine", batch_size=_TRAIN_ROWS, steps=CAP, evaluations=_spaced(1.25))
    several = sorted({*seeds, *range(AT_LEAST_SEEDS)}) if len(seeds) < AT_LEAST_SEEDS else list(seeds)
    network = Network(depth=0, activation="identity", init="gaussian", init_scale=0.1)
    return [
        Job(
            CARD.name,
            tuple(
                Run(CARD.name, arm, seed, rate, network, Training(**{**vars(training), "inputs": _INPUTS[arm]}))
                for seed in several
                for rate in RATES
            ),
        )
        for arm in ARMS
    ]


_INPUTS: dict[str, Any] = {arm: arm for arm in ARMS}


def run(job: Job) -> list[dict[str, Any]]:
    """Descend from each run's start; a record each.

    Its curves, at each evaluation step: "gap" (loss above the minimum, relative to the start's) and
    "validation_loss". Its values: "condition_number" of the Hessian, "steps_to_gap" (steps to a gap of at most 1 %,
    looked at after every step to 100 and then at steps 2 % apart; or None), "diverged_at" (or None), and "pair": the
    same descent with two weights only ("hessian", "minimum", "step", "path").
    """
    started = time.perf_counter()
    seeds = list(dict.fromkeys(run.seed for run in job.runs))
    rates = list(dict.fromkeys(run.rate for run in job.runs))
    problems = [_Problem(job.runs[0].arm, seed) for seed in seeds]
    descent = _descend(problems, np.array(rates))
    seconds = (time.perf_counter() - started) / len(job.runs)
    records = []
    for run in job.runs:
        s, r = seeds.index(run.seed), rates.index(run.rate)
        curves: dict[str, Sequence[float]] = {
            "step": list(run.training.evaluations),
            "gap": [significant(at[s, r], 4) for at in descent.gaps],
            "validation_loss": [significant(at[s, r], 4) for at in descent.validation_losses],
        }
        values = {
            "condition_number": significant(np.linalg.cond(problems[s].hessian)),
            "steps_to_gap": descent.steps_to_gap.get((s, r)),
            "diverged_at": descent.diverged_at.get((s, r)),
            "pair": problems[s].descend_pair(run.rate),
        }
        records.append(make_record(run, curves=curves, values=values, seconds=seconds, data_sha256=load("wine").sha256))
    return records


def _spaced(apart: float) -> tuple[int, ...]:
    """Steps from 0 to the cap: all of the first ones, then a factor of `apart` from each to the next."""
    steps = [0]
    while steps[-1] < CAP:
        steps.append(min(CAP, max(steps[-1] + 1, math.floor(steps[-1] * apart))))
    return tuple(steps)


@dataclass
class _Descent:
    """What gradient descent went through, for S seeds and R rates.

    Attributes:
        gaps: Loss above the minimum relative to the start's, (S, R) at each evaluation; NaN after divergence.
        validation_losses: Squared loss on the held-out rows, (S, R) at each evaluation.
        steps_to_gap: (seed's place, rate's place) -> steps, where descent arrived.
        diverged_at: (seed's place, rate's place) -> step.
    """

    gaps: list[Array] = field(default_factory=list)
    validation_losses: list[Array] = field(default_factory=list)
    steps_to_gap: dict[tuple[int, int], int] = field(default_factory=dict)
    diverged_at: dict[tuple[int, int], int] = field(default_factory=dict)


def _descend(problems: Sequence[_Problem], rates: Array) -> _Descent:
    """Full-batch gradient descent from each problem's start at each rate, all as one stack."""
    hessian = np.stack([problem.hessian for problem in problems])
    features, classes = problems[0].start.shape
    shape = (len(problems), features, len(rates), classes)  # one matrix product a seed serves all rates
    flat = (len(problems), features, len(rates) * classes)

    def spread(of_each: Sequence[Array]) -> Array:
        return np.broadcast_to(np.stack(of_each)[:, :, None], shape).reshape(flat).copy()

    weights = spread([problem.start for problem in problems])
    minimum = spread([problem.minimum for problem in problems])
    held_out_x = np.stack([problem.held_out[0] for problem in problems])
    held_out_y = np.stack([problem.held_out[1] for problem in problems])[:, :, None]
    steps = np.broadcast_to(rates[:, None], shape).reshape(flat).copy()
    evaluations, checks = frozenset(_spaced(1.25)), frozenset(_spaced(1.02)) | frozenset(range(101))
    descent = _Descent()
    first = np.full((len(problems), len(rates)), np.nan)
    for step in range(CAP + 1):
        gradient = hessian @ (weights - minimum)
        if step in checks or step in evaluations:
            gap = 0.5 * ((weights - minimum) * gradient).reshape(shape).sum(axis=(1, 3))
            first = gap if step == 0 else first
            gap = gap / first
            gap[gap < _ROUNDING] = 0.0
            for s, r in zip(*np.nonzero(gap <= GAP), strict=True):
                descent.steps_to_gap.setdefault((int(s), int(r)), step)
            for s, r in zip(*np.nonzero(gap > _DIVERGED), strict=True):
                descent.diverged_at[int(s), int(r)] = step
                weights.reshape(shape)[s, :, r] = np.nan
                gradient.reshape(shape)[s, :, r] = np.nan
        if step in evaluations:
            error = (held_out_x @ weights).reshape(*held_out_y.shape[:2], len(rates), classes) - held_out_y
            descent.gaps.append(gap)
            descent.validation_losses.append(0.5 * np.mean(np.sum(error**2, axis=3), axis=1))
        weights -= steps * gradient
    return descent


class _Problem:
    """The least-squares problem of an arm and a seed: features prepared, rows drawn, the start in its coordinates."""

    def __init__(self, arm: str, seed: int) -> None:
        data = load("wine")
        x = np.concatenate([data.train.x, data.validation.x]).astype(np.float64)
        y = np.concatenate([data.train.y, data.validation.y])
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(y))
        train, held_out = order[:_TRAIN_ROWS], order[_TRAIN_ROWS:]
        targets = np.eye(data.classes)[y]
        standardised = _with_bias(_prepared("standardised", x, train))
        prepared = _prepared(arm, x, train)
        every = _with_bias(prepared)
        self.x, self.y = every[train], targets[train]
        self.held_out = every[held_out], targets[held_out]
        start = 0.1 * generator.standard_normal((standardised.shape[1], data.classes))
        # The weights that give the start's predictions in this arm's coordinates.
        predictions = standardised[train] @ start
        self.start: Array = np.linalg.lstsq(self.x, predictions, rcond=None)[0].astype(np.float64)
        self.hessian = self.x.T @ self.x / len(train)
        self.minimum: Array = np.linalg.lstsq(self.x, self.y, rcond=None)[0].astype(np.float64)
        pair = [*PAIR]
        self.pair_hessian = prepared[train][:, pair].T @ prepared[train][:, pair] / len(train)
        # Two weights, no bias: targets without their mean, of the first class.
        target = self.y[:, 0] - self.y[:, 0].mean()
        self.pair_minimum = np.linalg.lstsq(prepared[train][:, pair], target, rcond=None)[0]
        scaled = standardised[train][:, pair]
        wanted = np.linalg.lstsq(scaled, target, rcond=None)[0] + np.array([-0.6, 0.5])
        self.pair_start = np.linalg.lstsq(prepared[train][:, pair], scaled @ wanted, rcond=None)[0]

    def descend_pair(self, rate: float) -> dict[str, Any]:
        """The descent with two weights: its quadratic surface, and the path until it leaves the neighbourhood."""
        weights, path = self.pair_start.copy(), []
        near = 1e3 * np.abs(self.pair_start - self.pair_minimum).max()
        for step in range(_PAIR_STEPS[-1] + 1):
            if np.abs(weights - self.pair_minimum).max() > near:
                break
            if step in _PAIR_STEPS:
                path.append([significant(weight) for weight in weights])
            weights -= rate * (self.pair_hessian @ (weights - self.pair_minimum))
        return {
            "hessian": [[significant(value) for value in row] for row in self.pair_hessian],
            "minimum": [significant(value) for value in self.pair_minimum],
            "step": list(_PAIR_STEPS[: len(path)]),
            "path": path,
        }


def _prepared(arm: str, x: Array, train: npt.NDArray[np.int64]) -> Array:
    if arm == "raw":
        return x
    layer = FeatureNormalization(x.shape[1], whiten=arm == "whitened").adapt(x[train])
    return np.asarray(layer(torch.from_numpy(x)).numpy())


def _with_bias(x: Array) -> Array:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def measure(records: Sequence[Record]) -> list[Measure]:
    """Condition numbers, steps at each arm's own best rate, and what is left of the gap at equal rates."""
    best = {arm: best_rate(of_arm(records, arm), _score) for arm in ARMS}
    at_best = {arm: at_rate(of_arm(records, arm), best[arm]) for arm in ARMS}
    condition = {arm: [float(one["values"]["condition_number"]) for one in at_best[arm]] for arm in ARMS}
    arrived = {arm: [one["values"]["steps_to_gap"] for one in at_best[arm]] for arm in ARMS}
    steps = {arm: [float(CAP if at is None else at) for at in arrived[arm]] for arm in ARMS}
    slow = at_rate(of_arm(records, "standardised"), best["raw"])
    fast = at_rate(of_arm(records, "raw"), best["standardised"])
    capped = " (a lower bound: raw was given up)" if None in arrived["raw"] else ""
    to_gap = f"steps to a gap of {GAP:.0%} at own best rate"
    return [
        ratio_over_seeds(
            "rounder",
            "condition number of the Hessian, raw over standardised",
            _ratios(condition["raw"], condition["standardised"]),
        ),
        ratio_over_seeds(
            "faster", f"{to_gap}, raw over standardised{capped}", _ratios(steps["raw"], steps["standardised"])
        ),
        *(measure_over_seeds(f"condition_{arm}", f"condition number, {arm}", "", condition[arm]) for arm in ARMS),
        *(measure_over_seeds(f"steps_{arm}", f"{to_gap}, {arm} (given up at {CAP:,})", "", steps[arm]) for arm in ARMS),
        ratio_over_seeds(
            "rate", "own best rate, standardised over raw", [best["standardised"] / best["raw"]] * len(slow)
        ),
        measure_over_seeds(
            "left_raw",
            f"gap left after {CAP:,} steps, raw at its own best rate",
            "%",
            [100.0 * last(one, "gap") for one in at_best["raw"]],
        ),
        measure_over_seeds(
            "left_standardised",
            f"gap left after {CAP:,} steps, standardised at the best rate of raw features",
            "%",
            [100.0 * last(one, "gap") for one in slow],
        ),
        measure_over_seeds(
            "diverges",
            "seeds in which raw features diverge at the best rate of standardised ones",
            "%",
            [100.0 * (one["values"]["diverged_at"] is not None) for one in fast],
        ),
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    by_name = {one.name: one for one in measures}
    mean = {name: number(one.mean) for name, one in by_name.items()}
    passed = (by_name["rounder"].low >= ROUNDER) + (by_name["faster"].low >= FASTER)
    raw = (
        f"it takes {mean['steps_raw']}"
        if by_name["steps_raw"].mean < CAP
        else f"it has not arrived after {CAP:,} steps, with {mean['left_raw']} % of the gap left"
    )
    reading = (
        f"The condition number falls from {mean['condition_raw']} to {mean['condition_standardised']} when the "
        f"features are standardised, and to {mean['condition_whitened']} when they are whitened. At its own best rate, "
        f"descent on standardised features arrives after {mean['steps_standardised']} steps and on whitened ones after "
        f"{mean['steps_whitened']}; on raw features {raw}. What scaling gains is the rate that the surface allows, "
        f"{quantity(by_name['rate'].mean, 'times')} as large. At equal rates there is no gain: at the best rate of raw "
        f"features, descent on standardised ones still has {mean['left_standardised']} % of the gap left after "
        f"{CAP:,} steps; at the best rate of standardised features, descent on raw ones diverges in "
        f"{mean['diverges']} % of the seeds."
    )
    return Verdict(_VERDICTS[passed], by_name["rounder"], reading)


_VERDICTS: tuple[Literal["not shown"], Literal["partly"], Literal["shown"]] = ("not shown", "partly", "shown")


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """The surface over two weights for each arm, with a descent on it; and the gap over steps."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, GREY, ORANGE, legend, log_axis, panel, power_of_ten

    found: Figures = {arm: _surface(records, arm) for arm in ARMS}
    drawing, axes = panel("The first seed's descent, own best rates", "step", "loss gap, relative")
    for arm, colour, dashes in zip(ARMS, (ORANGE, GREEN, BLUE), DASHES, strict=False):
        curves = at_best_rate(of_arm(records, arm), _score)[0]["curves"]
        gaps = np.maximum(np.asarray(curves["gap"], dtype=float), 1e-4)  # the axis ends there
        axes.plot(curves["step"], gaps, color=colour, linestyle=dashes, marker="o", markersize=3, label=arm)
    axes.axhline(GAP, color=GREY, linewidth=1, linestyle=":")
    axes.annotate("arrived", (CAP, GAP), xytext=(0, -3), ha="right", textcoords="offset points", va="top", fontsize=9)
    log_axis(axes.yaxis)
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)  # so that the start has a place
    axes.set_xticks([0, *(10**k for k in range(5))], labels=["0", *(power_of_ten(10**k) for k in range(5))])
    axes.set_xlim(-0.15, 1.3 * CAP)
    axes.set_ylim(1e-4, 2)
    legend(axes)
    arrived = ", ".join(f"{arm} {number(find(measures, f'steps_{arm}').mean)}" for arm in ARMS)
    alt = (
        f"Relative loss gap over steps on logarithmic axes. Mean steps over the seeds to a gap of {GAP:.0%}, given up "
        f"at {CAP:,}: {arrived}."
    )
    return found | {"descent": (drawing, alt)}


def _surface(records: Sequence[Record], arm: str) -> tuple[Figure, str]:
    """Contours of the loss over two weights, and the path of the descent that falls fastest on it."""
    from batchnorm.reporting.figures import BLUE, GREEN, GREY, ORANGE, RED, panel

    seed = min(one["seed"] for one in records)
    pairs = [one["values"]["pair"] for one in records if one["arm"] == arm and one["seed"] == seed]
    hessian, minimum = np.array(pairs[0]["hessian"]), np.array(pairs[0]["minimum"])

    def losses(weights: Array) -> Array:
        apart = weights - minimum
        return np.asarray(0.5 * np.einsum("...i,ij,...j->...", apart, hessian, apart))

    whole = [np.array(pair["path"]) for pair in pairs if len(pair["path"]) == len(_PAIR_STEPS)]
    path = min(whole, key=lambda path: float(losses(path).sum()))
    half = 1.4 * np.abs(path[0] - minimum).max()
    side = np.linspace(-half, half, 121)
    grid = np.stack(np.meshgrid(minimum[0] + side, minimum[1] + side), axis=-1)
    surface = losses(grid)
    drawing, axes = panel(f"Error surface, {arm} features", "weight of alcohol", "weight of colour intensity")
    levels = surface.max() * (np.arange(1, 10) / 9) ** 2  # evenly apart along a line through the minimum
    axes.contour(grid[..., 0], grid[..., 1], surface, levels=levels, colors=GREY, linewidths=0.8)
    colour = dict(zip(ARMS, (ORANGE, GREEN, BLUE), strict=True))[arm]
    axes.plot(path[:, 0], path[:, 1], color=colour, linestyle="-", linewidth=1.4, marker="o", markersize=3.5)
    axes.plot(*minimum, color=RED, marker="+", markersize=10, markeredgewidth=2)
    axes.set_aspect("equal")
    axes.locator_params(nbins=5)
    ratio = math.sqrt(np.linalg.cond(hessian))
    left = losses(path)[-1] / losses(path)[0]
    return drawing, (
        f"Contours of the loss over the weights of alcohol and colour intensity, {arm} features, both axes to one "
        f"scale: ellipses {number(ratio)} times as long as wide. The path of gradient descent keeps "
        f"{'nothing' if left < 1e-6 else number(100 * left) + ' %'} of its gap after {_PAIR_STEPS[-1]} steps."
    )


def _score(record: Record) -> float:
    """The lower the validation loss, averaged over the evaluation steps, the better the rate."""
    losses = record["curves"]["validation_loss"]
    return -math.inf if None in losses else -math.fsum(losses) / len(losses)


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]
