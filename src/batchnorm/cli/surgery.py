"""What the commands that operate on a network share: options, the network, its weights, an example, and the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from batchnorm.errors import ArgumentError

# What needs torch is imported inside the functions, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from batchnorm.cli.weights import Saved
    from batchnorm.surgery.report import SurgeryReport

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="package.module:factory, which makes the model without arguments.")
]
WeightsOption = Annotated[
    Path | None, typer.Option(help="Its state_dict: .safetensors, or .pt/.pth, read with weights_only.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
ExampleOption = Annotated[
    str | None,
    typer.Option(
        help="Input to compare outputs on: sizes as 1x3x224x224 (random numbers; several inputs: 1x3x32x32,1x10), or "
        "package.module:factory, which makes a tensor, a tuple of arguments or a dict of keyword arguments."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the file at --out.")]

NOT_EQUAL = 1
"""Exit status where outputs before and after were compared and differ; nothing is written then."""


def check_out(out: Path, *, force: bool, suffixes: tuple[str, ...] = (".safetensors", ".pt", ".pth")) -> None:
    """Looks at --out before any work is done.

    Raises:
        ArgumentError: there is such a file already and no --force, no such folder, or the name has no known suffix.
    """
    if out.suffix not in suffixes:
        expected = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise ArgumentError(f"--out: expected a file named {expected}; got {out}")
    if out.exists() and not force:
        raise ArgumentError(f"{out} exists: pass --force to overwrite it, or choose another --out")
    if not out.resolve().parent.is_dir():
        raise ArgumentError(f"the folder of --out, {out.parent}, does not exist")


def network(spec: str) -> torch.nn.Module:
    """The model that `spec` makes.

    Raises:
        ArgumentError: spec is no package.module:factory of a torch.nn.Module.
    """
    import torch

    from batchnorm.objects import from_module

    made = from_module(spec, "MODEL")()
    if not isinstance(made, torch.nn.Module):
        raise ArgumentError(f"{spec} must give a torch.nn.Module, got {type(made).__name__}")
    return made


def network_with_weights(spec: str, weights: Path | None) -> tuple[torch.nn.Module, Saved | None]:
    """The model that `spec` makes with the weights loaded into it, and what the file holds; None without a file.

    Raises:
        ArgumentError: as `network`, the file cannot be read, or it does not go with the model.
    """
    from batchnorm.cli import weights as files

    if weights is None:
        return network(spec), None
    saved = files.read(weights)  # first: it is the quicker one to be wrong
    model = network(spec)
    files.load_into(model, saved, weights)
    return model, saved


def example_for(spec: str | None, model: torch.nn.Module) -> Any:
    """What --example says: normal numbers from a fixed seed in the model's dtype, or what the factory makes; or None.

    Raises:
        ArgumentError: spec is neither sizes nor package.module:factory.
    """
    if spec is None:
        return None
    if ":" in spec:
        from batchnorm.objects import from_module

        return from_module(spec, "--example")()
    if not re.fullmatch(r"\d+(x\d+)*(,\d+(x\d+)*)*", spec):
        raise ArgumentError(f"--example must be sizes as 1x3x224x224 or package.module:factory, got {spec!r}")
    import torch

    floats = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    dtype = floats[0].dtype if floats else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = [[int(size) for size in one.split("x")] for one in spec.split(",")]
    inputs = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return inputs if len(inputs) > 1 else inputs[0]


def is_refuted(report: SurgeryReport) -> bool:
    """Whether outputs were compared and differ: then nothing must be written."""
    return report.agreement is not None and not report.agreement.holds


def end(report: SurgeryReport, out: Path, *, as_json: bool) -> NoReturn:
    """Prints the report and ends the command: status 0, or NOT_EQUAL where the report says so and nothing was written.

    Raises:
        typer.Exit: always.
    """
    refuted = is_refuted(report)
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "out": None if refuted else str(out)}, indent=2))
    else:
        typer.echo(str(report))
        typer.echo(f"Not written: {out}, as the outputs differ" if refuted else f"Written: {out}")
    raise typer.Exit(NOT_EQUAL if refuted else 0)
