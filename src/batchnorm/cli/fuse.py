"""`batchnorm fuse`: activations behind batch normalization layers go into the layers."""

from __future__ import annotations

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
from batchnorm.errors import ArgumentError

# What needs torch is imported inside the function, so that --help answers at once.


def fuse(
    model: ModelArgument,
    out: OutOption,
    weights: WeightsOption = None,
    example: ExampleOption = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Put activations, and additions before them, into the batch normalization layers, and write the state_dict.

    To load it, fuse what the factory makes in the same way. Outputs, and gradients and statistics in training, are
    compared before and after. Exit status: 0 done and equal; 1 not equal, nothing is written; 2 bad input.
    """
    check_out(out, force=force)
    if example is None:
        raise ArgumentError("--example is missing: sizes as 2x3x224x224, or package.module:factory")

    from batchnorm.cli import weights as files
    from batchnorm.surgery.fusing import fuse_activations

    network, saved = network_with_weights(model, weights)
    fused, report = fuse_activations(network, example_for(example, network))
    if not is_refuted(report):
        files.write(out, files.Saved(dict(fused.state_dict()), saved.metadata if saved else None))
    end(report, out, as_json=as_json)
