"""`batchnorm convert` makes the batch normalization layers of a saved network layers of another kind, and saves it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from batchnorm.cli.surgery import (
    ExampleOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutOption,
    WeightsOption,
    check_out,
    end,
    example_for,
    is_refuted,
    network_with_weights,
)

# What needs torch is imported inside the command, so that --help answers at once.


class TargetName(str, Enum):
    """What the layers become."""

    batchnorm = "batchnorm"
    torch = "torch"
    sync = "sync"
    ghost = "ghost"
    renorm = "renorm"
    decorrelated = "decorrelated"
    frozen = "frozen"
    group = "group"
    layer = "layer"


def convert(
    model: ModelArgument,
    out: OutOption,
    to: Annotated[TargetName, typer.Option(help="What the layers become.")] = TargetName.batchnorm,
    weights: WeightsOption = None,
    example: ExampleOption = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Only this layer, or the layers in this part; may be given several times.")
    ] = None,
    ghost_size: Annotated[int | None, typer.Option(min=1, help="ghost: examples in a ghost batch.")] = None,
    group_size: Annotated[int | None, typer.Option(min=1, help="decorrelated: channels whitened together.")] = None,
    num_groups: Annotated[int | None, typer.Option(min=1, help="group: at most that many groups.")] = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Make the batch normalization layers of a network layers of another kind, and write its state_dict.

    To load it, convert the network that the factory makes in the same way. Outputs before and after are compared: on
    --example, else layer by layer. Exit status: 0 done, and equal where that can be; 1 not equal, nothing is written;
    2 bad input.
    """
    check_out(out, force=force)

    from batchnorm.cli import weights as files
    from batchnorm.surgery.conversion import convert as run

    network, saved = network_with_weights(model, weights)
    converted, report = run(
        network,
        to.value,
        layers=layer or None,
        example=example_for(example, network),
        ghost_size=ghost_size,
        group_size=group_size,
        num_groups=num_groups,
    )
    if not is_refuted(report):
        files.write(out, files.Saved(dict(converted.state_dict()), saved.metadata if saved else None))
    end(report, out, as_json=as_json)
