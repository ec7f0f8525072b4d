"""`batchnorm shift treat`: what could be done about a shift, and what labelled rows speak for, if anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.errors import ArgumentError

# What needs polars, scikit-learn or torch is imported inside the command, so that --help answers at once.
if TYPE_CHECKING:
    from batchnorm.shift.reference import Reference
    from batchnorm.shift.roles import Roles
    from batchnorm.shift.treat import Treatment


def treat(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="As 'shift reference' wrote it.")],
    table: Annotated[str, typer.Argument(metavar="TABLE", help="The new rows: .csv, .csv.gz or .parquet.")],
    target: Annotated[str, typer.Option(help="Column that is predicted.")],
    labels: Annotated[
        str | None, typer.Option(help="New rows with the target, 10 or more; without them nothing is recommended.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Column that says when; with --block.")] = None,
    block: Annotated[str | None, typer.Option(help="Rows of a block of time stay together: 7D, 12h.")] = None,
    group: Annotated[str | None, typer.Option(help="Rows with the same value stay together.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="weights.parquet, or model.safetensors with --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:factory of a network: its statistics are what is treated.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Its state_dict: .safetensors, or .pt/.pth.")] = None,
    forward: Annotated[str | None, typer.Option(help="package.module:function(model, polars_frame) -> output.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    seed: Annotated[int, typer.Option(help="Of folds and models.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Try what could be done about a shift; adopt what a paired test on labelled rows speaks for, else nothing.

    OUT is written only where something that it can hold is adopted: importance weights of the reference's sampled rows,
    or the network with recalibrated statistics. Exit status: 0 done (also where nothing is adopted), 2 bad input.
    """
    _check_out(out, model, weights, force)
    from batchnorm.cli.shift_tables import new_side
    from batchnorm.shift.reference import Reference
    from batchnorm.shift.roles import Roles

    old = Reference.load(reference)
    roles = Roles(target, time, block, group)
    roles.check(old.columns)
    if model is not None:
        result = _network(old, table, roles, labels, out, model, weights, forward)
    else:
        result = _table(old, new_side(old, table, target), roles, labels, out, seed)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(_text(result, out))


def _check_out(out: Path | None, model: str | None, weights: Path | None, force: bool) -> None:
    from batchnorm.cli.shift_tables import refuse_existing

    if model is None and weights is not None:
        raise ArgumentError("--weights goes with --model package.module:factory")
    wanted = (".parquet",) if model is None else (".safetensors", ".pt", ".pth")
    if out is not None:
        if out.suffix not in wanted:
            raise ArgumentError(f"expected -o {' or '.join(f'*{one}' for one in wanted)}, got {out}")
        refuse_existing(out, force)


def _table(
    old: Reference, new: Reference, roles: Roles, labels: str | None, out: Path | None, seed: int
) -> dict[str, Any]:
    from batchnorm.shift.treat import treat as run

    found = run(old, new, labels=labels, seed=seed, **asdict(roles))
    written = _write_weights(found, out)
    return {
        "adopted": found.adopted,
        "labels": found.labels,
        "loss": found.loss,
        "overlap": found.overlap,
        "candidates": [asdict(one) for one in found.candidates],
        "written": written,
    }


def _write_weights(found: Treatment, out: Path | None) -> str | None:
    import io

    import polars as pl

    from batchnorm.shift.sample import KEY
    from batchnorm.shift.storage import write_whole

    if out is None or found.adopted is None or found.adopted not in found.weights:
        return None
    buffer = io.BytesIO()
    weight = pl.Series("weight", found.weights[found.adopted])
    found.rows.drop(KEY).with_columns(weight).write_parquet(buffer)
    write_whole(out, buffer.getvalue())
    return str(out)


def _network(
    old: Reference,
    table: str,
    roles: Roles,
    labels: str | None,
    out: Path | None,
    model: str,
    weights: Path | None,
    forward: str | None,
) -> dict[str, Any]:
    """AdaBN (Li et al. 2017): the same weights with the new rows' statistics."""
    from batchnorm.cli import shift_network as nets
    from batchnorm.cli import weights as files
    from batchnorm.recalibration import recalibrate
    from batchnorm.shift.evidence import adopted, paired
    from batchnorm.shift.treat import labelled_rows

    net, target = nets.network(model, weights), str(roles.target)
    run = nets.forward_of(forward, nets.numeric_columns(old, target, roles.time, roles.group))
    few = None if labels is None else labelled_rows(labels, old, target)
    before = None if few is None else nets.losses(net, run, few, old, target)
    report = recalibrate(net, list(nets.rows_of(table, old.without(target))), forward=run, group="local")
    evidence = None
    if few is not None and before is not None:
        evidence = paired(before, nets.losses(net, run, few, old, target), roles.units(few.clear(), few))
    name = "recalibrated statistics"
    choice = None if evidence is None else adopted({name: evidence}) or "nothing"
    written = None
    if out is not None and choice == name:
        saved = files.Saved({**net.state_dict()}, None)
        files.write(out, saved)
        written = str(out)
    what = f"statistics of {len(report.layers)} layers from the new rows (AdaBN)"
    return {
        "adopted": choice,
        "labels": 0 if before is None else before.size,
        "loss": None if before is None else float(before.mean()),
        "overlap": None,
        "candidates": [
            {"name": "nothing", "what": "keep the model as it is", "effective_sample_size": None, "evidence": None},
            {
                "name": name,
                "what": what,
                "effective_sample_size": None,
                "evidence": None if evidence is None else asdict(evidence),
            },
        ],
        "written": written,
    }


def _text(result: dict[str, Any], out: Path | None) -> str:
    """The result as lines for the terminal."""
    if result["adopted"] is None:
        lines = ["No recommendation: without labelled rows nobody can tell whether a treatment helps (--labels)."]
    elif result["adopted"] == "nothing":
        lines = [f"Do nothing: no candidate shows a gain on the {result['labels']} labelled rows."]
    else:
        lines = [f"Adopted: {result['adopted']}, on the evidence of {result['labels']} labelled rows."]
    if result["overlap"] is not None:
        lines.append(
            f"Overlap of the sides: {result['overlap']:.0%}"
            + (" - too little for weights" if result["overlap"] < 0.1 else "")
        )
    for one in result["candidates"]:
        parts = [f"  {one['name']:<24}"]
        if one["evidence"] is not None:
            found = one["evidence"]
            parts.append(
                f"{found['change']:+7.1%} ({found['low']:+.1%} to {found['high']:+.1%}), p {found['p_value']:.3g}"
            )
        if one["effective_sample_size"] is not None:
            parts.append(f"effective sample size {one['effective_sample_size']:.0%}")
        lines.append("  ".join([*parts, one["what"]]))
    if result["written"]:
        lines.append(f"Written: {result['written']}")
    elif out is not None:
        lines.append(f"Not written: {out}, as nothing that it can hold was adopted")
    return "\n".join(lines)
