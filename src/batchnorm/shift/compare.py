"""compare(): two References become one ranked table of columns and layers, a joint test and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats
from threadpoolctl import threadpool_limits

from batchnorm.errors import ArgumentError
from batchnorm.shift import classifier, effect, shift_type, significance, units
from batchnorm.shift.bins import Bins, bins_of
from batchnorm.shift.column import Kind
from batchnorm.shift.effect import Effect
from batchnorm.shift.encoding import encode
from batchnorm.shift.importance import importances
from batchnorm.shift.reference import Reference
from batchnorm.shift.roles import Roles, left_out
from batchnorm.shift.rule import Rule
from batchnorm.shift.shift_type import UNKNOWN, ShiftType

FOLDS = 5
ROWS = 10_000
"""Of each side, that tests and classifiers learn from at most."""

LEVEL = 0.05
"""False discovery rate of the tests, and so the rate of false alarms where nothing has shifted."""


@dataclass(frozen=True)
class Variable:
    """A line of the table: a column, or a layer.

    Attributes:
        name: of the column or layer.
        kind: "number", "category", "date" or "layer".
        effect: see `Effect`.
        separation: a classifier of this column alone; None for layers and where a side has no sample.
        p_value: of "the same distribution"; None likewise.
        q_value: by Benjamini-Hochberg over all columns in the test and the joint test; None for columns left out.
        importance: for the target: by how much the error of a model grows when the column is shuffled, as a share.
        left_out: why the joint test and the verdict do without it; "" where they do not.
        is_shifted: whether it is over the rule's threshold, and its q-value (where it has one) below 5 %.
        bins: shares of both sides; None for layers.
    """

    name: str
    kind: str
    effect: Effect
    separation: classifier.Separation | None = None
    p_value: float | None = None
    q_value: float | None = None
    importance: float | None = None
    left_out: str = ""
    is_shifted: bool = False
    bins: Bins | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        variables: the largest effect first; columns that are left out at the end.
        joint: the domain classifier of all columns that are not left out; None where there was none.
        joint_q: its q-value.
        joint_effect: sqrt(2) times the normal quantile of its AUC: the mean difference, in standard deviations, of two
            Gaussians that are as far apart.
        joint_is_shifted: as for a variable.
        shift_type: see `ShiftType`.
        rule: what counts as over the threshold.
        old_rows: rows of the reference.
        new_rows: rows of the new side.
        sampled: rows of both that the tests have seen.
        unit_count: groups or blocks of time in the sample; None where each row is its own.
        notes: what was not compared, and why.
    """

    variables: tuple[Variable, ...]
    joint: classifier.Separation | None
    joint_q: float | None
    joint_effect: float | None
    joint_is_shifted: bool
    shift_type: ShiftType
    rule: Rule
    old_rows: int
    new_rows: int
    sampled: int
    unit_count: int | None
    notes: tuple[str, ...]

    @property
    def is_significant(self) -> bool:
        """Whether any test is below 5 % after Benjamini-Hochberg: raised in about 5 % of cases without shift."""
        q_values = [variable.q_value for variable in self.variables] + [self.joint_q]
        return any(q is not None and q < LEVEL for q in q_values)

    @property
    def is_shifted(self) -> bool:
        """The verdict: some variable, or all together, over the threshold of the rule and significant."""
        return self.joint_is_shifted or any(variable.is_shifted for variable in self.variables)


def compare(
    reference: Reference,
    new: Reference,
    *,
    target: str | None = None,
    time: str | None = None,
    block: str | None = None,
    group: str | None = None,
    fail_on: str = "effect>0.1",
    seed: int = 0,
) -> Comparison:
    """Compares what is remembered of two tables or networks.

    Effect sizes come from all rows; tests and classifiers from the samples. Columns are encoded for both sides
    together. See docs/shift.md for each number.

    Args:
        reference: the old side.
        new: the new side, made with like=reference so that kinds agree. The target may be missing.
        target: column that a model predicts; not an input.
        time: column with dates or seconds; with `block`, rows of one block stay together in folds and tests.
        block: length of a block, as in 7D.
        group: column whose equal values belong together.
        fail_on: what counts as a shift: see `Rule`.
        seed: of folds and models.

    Raises:
        ArgumentError: the two have no variable in common, columns are of different kinds, a name is wrong, or there are
            too few rows, groups or blocks.

    Example:
        >>> import numpy as np, polars as pl
        >>> rng = np.random.default_rng(0)
        >>> old = Reference.of(pl.DataFrame({"x": rng.normal(size=300), "y": rng.normal(size=300)}))
        >>> new = Reference.of(pl.DataFrame({"x": rng.normal(1.0, size=300), "y": rng.normal(size=300)}))
        >>> found = compare(old, new)
        >>> found.is_shifted, found.variables[0].name, found.shift_type.name
        (True, 'x', 'cannot be told without labels')
    """
    rule = Rule.parse(fail_on)
    roles = Roles(target, time, block, group)
    roles.check(reference.columns)
    common: dict[str, Kind] = {name: column.kind for name, column in reference.columns.items() if name in new.columns}
    notes = _check(reference, new, roles)
    reasons = left_out(reference, new, roles)
    variables = [
        Variable(
            name,
            kind,
            effect.of_columns(reference.columns[name], new.columns[name]),
            left_out=reasons.get(name, ""),
            bins=bins_of(reference.columns[name], new.columns[name]),
        )
        for name, kind in common.items()
    ]
    tests = _Tests()
    if min(reference.sample.height, new.sample.height) > 0:
        inputs = [name for name in common if name not in reasons]
        with threadpool_limits(1, "openmp"):  # more threads gain little on so few rows, and lose much on a busy machine
            tests = _tests(reference, new, common, inputs, roles, seed)
        variables = [
            replace(
                one,
                separation=tests.singles[one.name],
                p_value=tests.p_values[one.name],
                importance=tests.importances.get(one.name),
            )
            for one in variables
        ]
    elif common:
        notes.append("no tests: a side has no sample of rows")
    variables += _layers(reference, new)
    variables, joint_q = _corrected(variables, tests.joint)
    variables = [replace(one, is_shifted=not one.left_out and rule.is_over(one)) for one in variables]
    variables.sort(key=lambda one: (bool(one.left_out), -one.effect.overall))
    joint_effect = None if tests.joint is None else _effect_of(tests.joint.auc)
    return Comparison(
        variables=tuple(variables),
        joint=tests.joint,
        joint_q=joint_q,
        joint_effect=joint_effect,
        joint_is_shifted=rule.is_over_jointly(tests.joint, joint_effect, joint_q),
        shift_type=tests.shift_type,
        rule=rule,
        old_rows=reference.rows,
        new_rows=new.rows,
        sampled=tests.rows,
        unit_count=tests.unit_count,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Tests:
    """What the samples tell."""

    singles: Mapping[str, classifier.Separation] = field(default_factory=dict)
    p_values: Mapping[str, float] = field(default_factory=dict)
    importances: Mapping[str, float] = field(default_factory=dict)
    joint: classifier.Separation | None = None
    shift_type: ShiftType = UNKNOWN
    rows: int = 0
    unit_count: int | None = None


def _tests(
    reference: Reference, new: Reference, kinds: Mapping[str, Kind], inputs: list[str], roles: Roles, seed: int
) -> _Tests:
    old_rows, new_rows = reference.sample.head(ROWS), new.sample.head(ROWS)
    unit = roles.units(old_rows, new_rows)
    data = encode(old_rows, new_rows, kinds)
    fold = units.folds(unit, data.is_new, FOLDS, seed)
    dealing = significance.Dealing(data.is_new, unit, seed)
    columns = list(zip(data.names, data.values.T, data.is_category, strict=True))
    p_values = {
        name: significance.column_p_value(values, bool(is_category), dealing) for name, values, is_category in columns
    }
    joint = classifier.joint(data.only(inputs), fold, unit, seed) if inputs else None
    target = roles.target
    weights: dict[str, float] = {}
    if target is not None and inputs:
        old_side = encode(
            old_rows, old_rows.clear(), {name: reference.columns[name].kind for name in [*inputs, target]}
        )
        weights = importances(old_side, target, seed)
    found = UNKNOWN
    if (
        joint is not None
        and joint.p_value is not None
        and target is not None
        and target in kinds
        and new.columns[target].missing < new.rows
    ):
        values, is_class = data.values[:, data.names.index(target)], kinds[target] == "category"
        found = shift_type.decide(
            min(significance.benjamini_hochberg([joint.p_value, *(p_values[name] for name in inputs)])),
            p_values[target],
            shift_type.target_given_inputs(data.only(inputs), values, is_class, fold, unit),
            shift_type.inputs_given_target(data.only(inputs), values, is_class, fold, unit),
            joint.overlap if joint.overlap is not None else 1.0,
        )
    return _Tests(
        {name: classifier.single(values, bool(flag), data.is_new, fold) for name, values, flag in columns},
        p_values,
        weights,
        joint,
        found,
        data.is_new.size,
        None if unit is None else int(np.unique(unit).size),
    )


def _check(reference: Reference, new: Reference, roles: Roles) -> list[str]:
    """What is not compared; raises where the two do not go together."""
    columns = [name for name in reference.columns if name in new.columns]
    lacking = [name for name in reference.columns if name not in new.columns and name != roles.target]
    if lacking and new.columns:
        raise ArgumentError(f"the new side lacks the columns {', '.join(lacking[:8])}: compare tables of one kind")
    for name in columns:
        kinds = reference.columns[name].kind, new.columns[name].kind
        if kinds[0] != kinds[1]:
            raise ArgumentError(f"column {name!r} was a {kinds[0]} and is a {kinds[1]}: make it with like=reference")
    if not columns and not set(reference.layers) & set(new.layers):
        raise ArgumentError("the two References have no column and no layer in common")
    notes = [f"column {name}: not in the reference" for name in new.columns if name not in reference.columns]
    if reference.layers and new.layers:
        notes += [f"layer {name}: on one side only" for name in sorted(set(reference.layers) ^ set(new.layers))]
    elif reference.layers or new.layers:
        notes.append("layers: on one side only (give the model to both commands)")
    if roles.target is not None and roles.target not in new.columns:
        notes.append(f"target {roles.target}: not in the new data")
    return notes


def _layers(reference: Reference, new: Reference) -> list[Variable]:
    found = []
    for name, old in reference.layers.items():
        if name in new.layers:
            other = new.layers[name]
            if other.mean.shape != old.mean.shape:
                raise ArgumentError(f"layer {name!r} had {old.mean.size} channels and has {other.mean.size}")
            rows = [0 if layer.count is None else side.rows for layer, side in ((old, reference), (other, new))]
            found.append(Variable(name, "layer", effect.of_layers(old, other, old_rows=rows[0], new_rows=rows[1])))
    return found


def _corrected(variables: list[Variable], joint: classifier.Separation | None) -> tuple[list[Variable], float | None]:
    """q-values over one family: every column that is not left out, and the joint test."""
    family = [one for one in variables if one.p_value is not None and not one.left_out]
    p_values = [one.p_value for one in family if one.p_value is not None]
    joint_p = [] if joint is None or joint.p_value is None else [joint.p_value]
    q_values = significance.benjamini_hochberg([*p_values, *joint_p])
    by_name = dict(zip((one.name for one in family), q_values, strict=False))
    corrected = [
        replace(one, q_value=by_name[one.name]) if one.name in by_name and one.kind != "layer" else one
        for one in variables
    ]
    return corrected, q_values[-1] if joint_p else None


def _effect_of(auc: float) -> float:
    return math.sqrt(2) * float(stats.norm.ppf(min(max(auc, 1e-9), 1 - 1e-9)))
