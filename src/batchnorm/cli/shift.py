"""`batchnorm shift`: what is remembered of a table and a network, how others differ, and what to do about it."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import batchnorm
from batchnorm.cli import shift_treat
from batchnorm.errors import ArgumentError

# What needs polars, scikit-learn or torch is imported inside the commands, so that --help answers at once.
if TYPE_CHECKING:
    from batchnorm.shift.reference import Reference

SHIFTED = 1
"""Exit status for a shift over the threshold."""

app = typer.Typer(help="Covariate shift in tables and layers: find it, and treat it on evidence.", no_args_is_help=True)
app.command("treat")(shift_treat.treat)

Model = Annotated[str | None, typer.Option(help="package.module:factory of a network: its layers are compared too.")]
Weights = Annotated[Path | None, typer.Option(help="Its state_dict: .safetensors, or .pt/.pth.")]
ForwardOption = Annotated[
    str | None,
    typer.Option(help="package.module:function(model, polars_frame); else the numeric columns are one tensor."),
]
Null = Annotated[list[str] | None, typer.Option(help="Text that means missing in csv files; several times for more.")]


class EngineName(str, Enum):
    """Where partitions are read."""

    local = "local"
    dask = "dask"
    spark = "spark"


@app.command("reference")
def reference(
    table: Annotated[
        list[str], typer.Argument(metavar="TABLE...", help=".csv, .csv.gz or .parquet; several are parts of one table.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Reference, JSON.")],
    model: Model = None,
    weights: Weights = None,
    forward: ForwardOption = None,
    target: Annotated[str | None, typer.Option(help="Column that is not fed to the network.")] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Column whose numbers are codes; several times for more.")
    ] = None,
    null: Null = None,
    rows: Annotated[int | None, typer.Option(min=0, help="Rows to keep for the tests; 0 keeps none.")] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Where the parts are read: here, on Dask's workers, on Spark's executors.")
    ] = EngineName.local,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Remember a table, and the layers of a network that it goes through.

    One pass over the rows in bounded memory. Exit status: 0 done, 2 bad input.
    """
    from batchnorm.cli.shift_tables import refuse_existing
    from batchnorm.shift.reference import SAMPLE_ROWS

    refuse_existing(out, force)

    options: dict[str, Any] = {
        "kinds": dict.fromkeys(category or (), "category"),
        "sample_rows": SAMPLE_ROWS if rows is None else rows,
    }
    if null:
        options["nulls"] = tuple(null)
    from batchnorm.shift import partitions

    read = {"local": partitions.from_parts, "dask": partitions.from_dask, "spark": partitions.from_spark}[engine.value]
    found = read(table, **options)
    if model is not None:
        found = _with_layers(found, table, found, model, weights, forward, (target,))
    found.save(out)
    layers = f", {len(found.layers)} layers" if found.layers else ""
    typer.echo(f"{found.rows:,} rows, {len(found.columns)} columns{layers}. Written: {out}")


@app.command("compare")
def compare(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="As 'shift reference' wrote it.")],
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="The new rows: .csv, .csv.gz or .parquet; or a Reference.")
    ],
    target: Annotated[str | None, typer.Option(help="Column that a model predicts.")] = None,
    time: Annotated[str | None, typer.Option(help="Column that says when; with --block.")] = None,
    block: Annotated[str | None, typer.Option(help="Rows of a block of time stay together: 7D, 12h.")] = None,
    group: Annotated[str | None, typer.Option(help="Rows with the same value stay together.")] = None,
    model: Model = None,
    weights: Weights = None,
    forward: ForwardOption = None,
    null: Null = None,
    fail_on: Annotated[str, typer.Option(help="MEASURE>NUMBER: what counts as a shift.")] = "effect>0.1",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Report: .html or .json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    seed: Annotated[int, typer.Option(help="Of folds and models.")] = 0,
) -> None:
    """Compare a table, and the layers of a network that it goes through, with a Reference.

    Exit status: 0 no shift over the threshold, 1 a shift over it, 2 bad input.
    """
    if out is not None and out.suffix not in (".html", ".json"):
        raise ArgumentError(f"expected -o *.html or *.json, got {out}")
    from batchnorm.cli.shift_tables import new_side
    from batchnorm.shift import render
    from batchnorm.shift.compare import compare as run
    from batchnorm.shift.reference import Reference
    from batchnorm.shift.rule import Rule
    from batchnorm.shift.storage import write_whole

    Rule.parse(fail_on)  # a wrong rule is said before anything is read
    old = Reference.load(reference)
    if table.endswith(".json"):
        new = Reference.load(table)
    else:
        new = new_side(old, table, target, null)
        if model is not None:
            new = _with_layers(new, [table], old, model, weights, forward, (target, time, group))
    found = run(old, new, target=target, time=time, block=block, group=group, fail_on=fail_on, seed=seed)
    text = json.dumps(render.as_dict(found), indent=2, allow_nan=False)
    if out is not None:
        html = out.suffix == ".html"
        page = (
            render.as_html(found, reference=reference.name, new=Path(table).name, version=batchnorm.__version__)
            if html
            else text
        )
        write_whole(out, page.encode("utf-8"))
    if as_json:
        typer.echo(text)
    else:
        typer.echo(render.as_text(found))
        if out is not None:
            typer.echo(f"Written: {out}")
    if found.is_shifted:
        raise typer.Exit(SHIFTED)


def _with_layers(
    found: Reference,
    tables: list[str],
    known: Reference,
    model: str,
    weights: Path | None,
    forward: str | None,
    others: tuple[str | None, ...],
) -> Reference:
    """`found` with Moments of the layers that the rows go through."""
    from batchnorm.cli import shift_network as nets
    from batchnorm.shift.layers import measured

    net = nets.network(model, weights)
    run = nets.forward_of(forward, nets.numeric_columns(known, *others))
    rows = (batch for table in tables for batch in nets.rows_of(table, found))
    return found.with_layers(measured(net, rows, run))
