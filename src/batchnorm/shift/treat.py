"""treat(): candidates against a shift of a table, and the one that labelled rows of the new side speak for, if any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from threadpoolctl import threadpool_limits

from batchnorm.errors import ArgumentError
from batchnorm.shift.column import Column, Kind
from batchnorm.shift.compare import Comparison, compare
from batchnorm.shift.density_ratio import KLIEP, ULSIF, ClassifierRatio, RuLSIF, effective_sample_size
from batchnorm.shift.encoding import Encoded, dense, encode
from batchnorm.shift.evidence import Evidence, adopted, paired
from batchnorm.shift.reference import Reference
from batchnorm.shift.roles import Roles
from batchnorm.shift.tables import Table, as_kinds, readable, scan
from batchnorm.shift.task import fitted, losses

Floats = npt.NDArray[np.float64]

NOTHING = "nothing"
_KERNEL_ROWS = 2000
"""Rows of a side that a kernel estimator learns from: its cost grows with their square."""
_MATTERS = 0.01
"""Importance from which on a column matters to the target."""


@dataclass(frozen=True)
class Candidate:
    """Something that could be done.

    Attributes:
        name: "nothing", "drop", "classifier weights", "KLIEP weights", "uLSIF weights", "RuLSIF weights",
            "standardise each side".
        what: what it would do, in words.
        effective_sample_size: of the weights, as a share of the rows; None for others. Weights that are all clipped are
            all equal and read 100 %: it means something only beside the overlap.
        evidence: against doing nothing; None without labels, and for "nothing".
    """

    name: str
    what: str
    effective_sample_size: float | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Treatment:
    """What `treat` found.

    Attributes:
        adopted: name of the candidate that a paired test speaks for; "nothing" where none has shown a gain; None
            without labels: no recommendation.
        candidates: "nothing" first.
        overlap: mass that the inputs of both sides share, in [0, 1].
        labels: labelled rows; 0 where there are none.
        loss: of doing nothing on the labelled rows; None without labels.
        weights: name of a weighting -> weights of the reference's sampled rows that have a target, (N,), mean 1.
        rows: those rows.
        comparison: of the two sides.
    """

    adopted: str | None
    candidates: tuple[Candidate, ...]
    overlap: float
    labels: int
    loss: float | None
    weights: Mapping[str, Floats]
    rows: pl.DataFrame
    comparison: Comparison


def treat(
    reference: Reference,
    new: Reference,
    *,
    target: str,
    labels: Table | None = None,
    time: str | None = None,
    block: str | None = None,
    group: str | None = None,
    seed: int = 0,
) -> Treatment:
    """Tries what could be done about a shift, and adopts what helps on labelled rows of the new side; else nothing.

    A model of the target (gradient boosting, on the reference's sampled rows) stands for the user's own. Each candidate
    trains it again; the labelled rows are looked at by nothing but the paired test.

    Args:
        reference: the side that the model is trained on, with a sample and the target.
        new: the other one, made with like=reference.
        target: the column that is predicted.
        labels: rows of the new side with the target, 10 or more (50 are enough for large gains); None for diagnostics
            without a recommendation. They must not be among the rows that the model is trained on.
        time: column with dates or seconds; with `block`, rows of one block stay together in folds, and the paired test
            counts blocks (10 or more) instead of rows.
        block: length of a block, as in 7D.
        group: the same for rows with one value.
        seed: of folds and models.

    Raises:
        ArgumentError: a sample, the target or a column is missing, or there are too few labels.
    """
    if target not in reference.columns:
        raise ArgumentError(f"target: the reference has no column {target!r}; it has {', '.join(reference.columns)}")
    if not min(reference.sample.height, new.sample.height):
        raise ArgumentError("treat needs a sample of rows on both sides: make the References with sample_rows > 0")
    labelled = None if labels is None else labelled_rows(labels, reference, target)
    found = compare(reference, new, target=target, time=time, block=block, group=group, seed=seed)
    roles = Roles(target, time, block, group)
    names = [one.name for one in found.variables if not one.left_out and one.kind != "layer"]
    train = reference.sample.filter(pl.col(target).is_not_null())
    if not names or found.joint is None or train.height < 20:
        raise ArgumentError("treat needs at least one input column and 20 sampled rows with a target")
    with threadpool_limits(1, "openmp"):
        work = _Work(reference, new, roles, names, train, labelled)
        candidates, weights = work.candidates(found, seed)
    evidence = {one.name: one.evidence for one in candidates if one.evidence is not None}
    return Treatment(
        adopted=None if labelled is None else adopted(evidence) or NOTHING,
        candidates=tuple(candidates),
        overlap=found.joint.overlap or 0.0,
        labels=0 if labelled is None else labelled.height,
        loss=None if work.base is None else float(work.base.mean()),
        weights=weights,
        rows=train,
        comparison=found,
    )


class _Work:
    """One task: training rows of the reference, unlabelled new rows, and labelled ones."""

    def __init__(
        self,
        reference: Reference,
        new: Reference,
        roles: Roles,
        names: list[str],
        train: pl.DataFrame,
        labelled: pl.DataFrame | None,
    ) -> None:
        target = str(roles.target)
        kinds: dict[str, Kind] = {name: reference.columns[name].kind for name in names}
        ahead = new.sample.select(names)
        tests = ahead.clear() if labelled is None else labelled.select(names)
        # Training rows, new rows and labelled rows are encoded in one go; labels enter nothing but the losses.
        self._data = encode(train, pl.concat([ahead, tests]), kinds)
        self._train = np.arange(train.height)
        self._ahead = train.height + np.arange(ahead.height)
        self._test = train.height + ahead.height + np.arange(tests.height)
        goal = train[target] if labelled is None else pl.concat([train[target], labelled[target]])
        whole = encode(pl.DataFrame({target: goal}), pl.DataFrame({target: goal}).clear(), _one(reference, target))
        self._y = whole.values[: train.height, 0]
        self._y_test = whole.values[train.height :, 0]
        self._is_class = reference.columns[target].kind == "category"
        self._columns = reference.columns, new.columns
        self._unit = roles.units(train, new.sample)
        self._unit_test = None if labelled is None else roles.units(labelled.clear(), labelled)
        self.base = None if labelled is None else self._losses(self._data)

    def candidates(self, found: Comparison, seed: int) -> tuple[list[Candidate], dict[str, Floats]]:
        """All candidates that apply, and the weights of those that weight."""
        listed = [Candidate(NOTHING, "keep the model as it is")]
        useless = [
            one.name
            for one in found.variables
            if one.is_shifted and one.kind != "layer" and one.importance is not None and one.importance < _MATTERS
        ]
        kept = [name for name in self._data.names if name not in useless]
        if useless and kept:
            what = f"leave out what drifts and does not matter to the target: {', '.join(useless)}"
            listed.append(Candidate("drop", what, evidence=self._evidence(self._data.only(kept))))
        weights = self._weights(seed)
        for name, weight in weights.items():
            share = effective_sample_size(weight)
            evidence = self._evidence(self._data, weight)
            listed.append(Candidate(name, "train with importance weights", share, evidence))
        own = self._standardised()
        if own is not None:
            what = "standardise the numeric columns of each side by its own moments"
            listed.append(Candidate("standardise each side", what, evidence=self._evidence(own)))
        return listed, weights

    def _evidence(self, data: Encoded, weight: Floats | None = None) -> Evidence | None:
        return None if self.base is None else paired(self.base, self._losses(data, weight), self._unit_test)

    def _losses(self, data: Encoded, weight: Floats | None = None) -> Floats:
        model: Any = fitted(
            data.values[self._train],
            self._y,
            is_class=self._is_class,
            is_category=data.is_category,
            sample_weight=weight,
        )
        return losses(model, data.values[self._test], self._y_test, is_class=self._is_class)

    def _weights(self, seed: int) -> dict[str, Floats]:
        # Labelled rows stay out of what weights are learned from, too.
        both = np.concatenate([self._train, self._ahead])
        side = np.arange(both.size) >= self._train.size
        plain = self._data.values[both]
        smooth = dense(self._data, both)
        some = np.concatenate(
            [self._train[:_KERNEL_ROWS], self._train.size + np.arange(self._ahead.size)[:_KERNEL_ROWS]]
        )
        unit = self._unit
        classifier = ClassifierRatio(seed=seed).fit(plain, side, groups=unit)
        found = {"classifier weights": classifier.sample_weight(plain[self._train])}
        kernels = {
            "KLIEP weights": KLIEP(seed=seed),
            "uLSIF weights": ULSIF(seed=seed),
            "RuLSIF weights": RuLSIF(seed=seed),
        }
        for name, estimator in kernels.items():
            groups = None if unit is None else unit[some]
            found[name] = estimator.fit(smooth[some], side[some], groups=groups).sample_weight(smooth[self._train])
        return found

    def _standardised(self) -> Encoded | None:
        values = self._data.values.copy()
        old, new = self._columns
        numeric = [i for i, name in enumerate(self._data.names) if not self._data.is_category[i] and _varies(old[name])]
        for i in numeric:
            name = self._data.names[i]
            for rows, side in ((self._train, old[name]), (np.concatenate([self._ahead, self._test]), new[name])):
                std = float(np.sqrt(side.moments.var[0])) or 1.0
                values[rows, i] = (values[rows, i] - float(side.moments.mean[0])) / std
        return replace(self._data, values=values) if numeric else None


def _varies(column: Column) -> bool:
    return column.kind != "category" and bool(column.moments.var[0] > 0)


def _one(reference: Reference, name: str) -> dict[str, Kind]:
    return {name: reference.columns[name].kind}


def labelled_rows(labels: Table, reference: Reference, target: str) -> pl.DataFrame:
    """The labelled rows that have a target, read as the reference is."""
    kinds = {name: column.kind for name, column in reference.columns.items()}
    with readable(labels):
        rows = as_kinds(scan(labels, kinds, nulls=reference.nulls), kinds, labels).collect()
    return rows.filter(pl.col(target).is_not_null())
