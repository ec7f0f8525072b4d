"""`batchnorm fold`: batch normalization layers of a network, or of an ONNX file, go into what stands beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.surgery import (
    ExampleOption,
    ForceOption,
    JsonOption,
    OutOption,
    WeightsOption,
    check_out,
    end,
    example_for,
    is_refuted,
    network_with_weights,
)
from batchnorm.errors import ArgumentError

# What needs torch is imported inside the functions, so that --help answers at once.

ONNX = ".onnx"

ToleranceOption = Annotated[
    float | None,
    typer.Option(min=0, help="Largest difference over the largest output that passes; by dtype, 1e-5 in float32."),
]


def fold(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file *.onnx, or package.module:factory, which makes the model.")
    ],
    out: OutOption,
    weights: WeightsOption = None,
    example: ExampleOption = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZES", help="ONNX: sizes of an input, as x=1x3x224x224; may be given several times."
        ),
    ] = None,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Fold batch normalization layers into the convolutions and linear maps beside them.

    An ONNX file becomes another one, without the network's code: onnxruntime compares the two on random inputs. Of a
    network in Python the state_dict of the folded one is written; to load it, fold what the factory makes in the same
    way. Exit status: 0 done and equal; 1 not equal, nothing is written; 2 bad input.
    """
    if model.endswith(ONNX):
        _fold_file(Path(model), out, weights, example, input, tolerance, as_json=as_json, force=force)
    if input:
        raise ArgumentError("--input is for ONNX files: pass --example for a network in Python")
    check_out(out, force=force)
    if example is None:
        raise ArgumentError("--example is missing: sizes as 1x3x224x224, or package.module:factory")

    from batchnorm.cli import weights as files
    from batchnorm.surgery.folding import fold as run

    network, saved = network_with_weights(model, weights)
    folded, report = run(network, example_for(example, network), tolerance=tolerance)
    if not is_refuted(report):
        files.write(out, files.Saved(dict(folded.state_dict()), saved.metadata if saved else None))
    end(report, out, as_json=as_json)


def _fold_file(
    model: Path,
    out: Path,
    weights: Path | None,
    example: str | None,
    sizes: list[str] | None,
    tolerance: float | None,
    *,
    as_json: bool,
    force: bool,
) -> None:
    if weights is not None or example is not None:
        raise ArgumentError("--weights and --example are for networks in Python: an ONNX file has both (see --input)")
    check_out(out, force=force, suffixes=(ONNX,))
    from batchnorm.surgery.onnx_folding import fold_onnx

    shapes = dict(_shape(one) for one in sizes or ())
    end(fold_onnx(model, out, tolerance=tolerance, shapes=shapes, force=force), out, as_json=as_json)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    if not name or not all(one.isdigit() for one in sizes.split("x")):
        raise ArgumentError(f"--input must be NAME=SIZES as x=1x3x224x224, got {text!r}")
    return name, tuple(int(one) for one in sizes.split("x"))
