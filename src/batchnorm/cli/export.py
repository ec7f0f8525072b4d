"""`batchnorm export`: a network as an ONNX file that onnxruntime was seen to compute alike."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.cli.fold import ONNX
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
    network_with_weights,
)
from batchnorm.errors import ArgumentError

# What needs torch is imported inside the function, so that --help answers at once.


def export(
    model: ModelArgument,
    out: OutOption,
    weights: WeightsOption = None,
    example: ExampleOption = None,
    opset: Annotated[int | None, typer.Option(min=18, help="Version of ONNX's operators; torch's default.")] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the first size of every input open.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference over the largest output that passes; by dtype, 1e-4 in float32."),
    ] = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Write a network, in evaluation mode, as an ONNX file, if onnxruntime gives its outputs.

    Exit status: 0 done and equal; 1 not equal, nothing is written; 2 bad input.
    """
    check_out(out, force=force, suffixes=(ONNX,))
    if example is None:
        raise ArgumentError("--example is missing: sizes as 1x3x224x224, or package.module:factory")

    from batchnorm.surgery.exporting import export_onnx

    network, _ = network_with_weights(model, weights)
    report = export_onnx(
        network.eval(),
        example_for(example, network),
        out,
        opset=opset,
        dynamic_batch=dynamic_batch,
        tolerance=tolerance,
        force=force,
    )
    end(report, out, as_json=as_json)
