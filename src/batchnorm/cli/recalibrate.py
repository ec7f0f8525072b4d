"""`batchnorm recalibrate` estimates the inference statistics of a saved model again, and saves it."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.surgery import check_out, network

# What needs torch is imported inside the command, so that --help answers at once.


class EstimatorName(str, Enum):
    """Which mean and variance."""

    population = "population"
    mean_of_batches = "mean_of_batches"
    moving_average = "moving_average"


class ReadingName(str, Enum):
    """What earlier layers normalise with meanwhile."""

    sequential = "sequential"
    batch = "batch"


def recalibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="package.module:factory, which makes the model.")],
    weights: Annotated[Path, typer.Option(help="Its state_dict: .safetensors, or .pt/.pth, read with weights_only.")],
    data: Annotated[str, typer.Option(help="package.module:factory, which makes the batches (a DataLoader, a list).")],
    out: Annotated[Path, typer.Option(help="Where the new state_dict goes: .safetensors, .pt or .pth.")],
    estimator: Annotated[EstimatorName, typer.Option(help="Which mean and variance.")] = EstimatorName.population,
    reading: Annotated[
        ReadingName, typer.Option(help="Earlier layers use their new statistics, or those of each batch.")
    ] = ReadingName.sequential,
    layer: Annotated[
        list[str] | None, typer.Option(help="Only this layer, or the layers in this part; may be given several times.")
    ] = None,
    forward: Annotated[
        str | None, typer.Option(help="package.module:function(model, batch), for batches of another kind.")
    ] = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Use this many batches at most.")] = None,
    memory: Annotated[
        int | None,
        typer.Option(min=0, help="Bytes of activations that may wait for the one sequential pass; 0: a pass a layer."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Estimate the inference statistics of a model's batch normalization layers again, from data.

    The factories take no arguments and are found from the current folder, too. Everything in WEIGHTS but running_mean,
    running_var and num_batches_tracked goes to OUT as it is. Exit status: 0 done, 2 bad input.
    """
    check_out(out, force=force)

    from batchnorm.cli import weights as files
    from batchnorm.objects import from_module
    from batchnorm.recalibration import recalibrate as run

    saved = files.read(weights)
    trained = network(model)
    files.load_into(trained, saved, weights)
    report = run(
        trained,
        from_module(data, "--data")(),
        estimator=estimator.value,
        reading=reading.value,
        layers=layer or None,
        forward=None if forward is None else from_module(forward, "--forward"),
        max_batches=max_batches,
        group="local",
        memory=memory,
    )
    files.write(out, files.with_statistics(saved, trained, [change.name for change in report.layers]))
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "out": str(out)}, indent=2))
    else:
        typer.echo(str(report))
        typer.echo(f"Written: {out}")
