"""A network that goes with a table: made by a factory, loaded from a file, fed with rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from batchnorm.cli import weights as files
from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.objects import from_module
from batchnorm.shift.reference import Reference
from batchnorm.shift.tables import Table, as_kinds, batches, scan

_ROWS = 4096
"""Of a batch that goes through the network."""

Forward = Callable[[torch.nn.Module, Any], Any]


def network(model: str, weights: Path | None) -> torch.nn.Module:
    """The model of a factory, with the weights of a file, in evaluation mode.

    Raises:
        ArgumentError: the factory gives no module, or the file does not go with it.
    """
    made = from_module(model, "--model")()
    if not isinstance(made, torch.nn.Module):
        raise ArgumentError(f"--model: {model} must give a torch.nn.Module, got {type(made).__name__}")
    if weights is not None:
        files.load_into(made, files.read(weights), weights)
    return made.eval()


def forward_of(spec: str | None, columns: list[str]) -> Forward:
    """forward(model, frame): the user's, or the numeric `columns` as one float32 tensor, (N, C)."""
    if spec is not None:
        found: Forward = from_module(spec, "--forward")
        return found
    if not columns:
        raise ArgumentError("the table has no numeric column to feed to the model: give --forward")

    def forward(model: torch.nn.Module, frame: pl.DataFrame) -> Any:
        rows = frame.select(columns).to_numpy().astype(np.float32)
        try:
            return model(torch.from_numpy(np.ascontiguousarray(rows)))
        except (RuntimeError, ShapeError) as error:
            raise ArgumentError(
                f"the model does not take the {len(columns)} numeric columns {', '.join(columns[:8])}: give --forward "
                f"package.module:function(model, polars_frame), or leave columns out by --target. {error}"
            ) from error

    return forward


def numeric_columns(reference: Reference, *others: str | None) -> list[str]:
    """The numeric columns in the table's order, without the `others` (target, time, group)."""
    return [name for name, column in reference.columns.items() if column.kind == "number" and name not in others]


def rows_of(table: Table, reference: Reference) -> Iterator[pl.DataFrame]:
    """The rows of a table in batches, as the Reference's kinds read them."""
    kinds = {name: column.kind for name, column in reference.columns.items()}
    for batch in batches(as_kinds(scan(table, kinds, nulls=reference.nulls), kinds, table), table):
        yield from batch.iter_slices(_ROWS)


def losses(net: torch.nn.Module, forward: Forward, table: Table, reference: Reference, target: str) -> Any:
    """The network's loss on each row that has a target, (N,), float64.

    Squared error for a number and one output; else cross-entropy: one output is the logit of the second class, several
    are logits of the classes, which are the sorted categories, or whole numbers from 0.

    Raises:
        ArgumentError: output and target do not go together.
    """
    column = reference.columns[target]
    classes = sorted(column.categories.counts)
    found = []
    for batch in rows_of(table, reference):
        rows = batch.filter(pl.col(target).is_not_null())
        if not rows.height:
            continue
        with torch.no_grad():
            output = forward(net, rows.drop(target)).double().reshape(rows.height, -1)
        if column.kind == "category":
            unknown = sorted(set(rows[target].to_list()) - set(classes))
            if unknown:
                raise ArgumentError(f"the target has classes that the reference lacks: {', '.join(unknown[:5])}")
            goal = torch.tensor([classes.index(value) for value in rows[target].to_list()])
        else:
            goal = torch.from_numpy(rows[target].to_numpy().copy())
        found.append(_loss(output, goal, column.kind == "category").numpy())
    if not found:
        raise ArgumentError(f"no labelled row has a value in {target!r}")
    return np.concatenate(found)


def _loss(output: torch.Tensor, goal: torch.Tensor, is_class: bool) -> torch.Tensor:
    if output.shape[1] == 1:
        if not is_class:
            return (output[:, 0] - goal) ** 2
        return torch.nn.functional.binary_cross_entropy_with_logits(output[:, 0], goal.double(), reduction="none")
    whole = goal.long()
    if not torch.equal(whole.double(), goal.double()) or int(whole.min()) < 0 or int(whole.max()) >= output.shape[1]:
        raise ArgumentError(
            f"the network gives {output.shape[1]} outputs, and the target is no class of 0 to {output.shape[1] - 1}"
        )
    return torch.nn.functional.cross_entropy(output, whole, reduction="none")
