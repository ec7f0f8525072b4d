"""`batchnorm port` carries batch normalization from the file of one framework into that of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.surgery import NOT_EQUAL, ForceOption, JsonOption, OutOption, check_out
from batchnorm.errors import ArgumentError, VerificationError

# What needs torch is imported inside the functions, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from batchnorm.cli.weights import Saved
    from batchnorm.surgery.porting.report import PortReport

_KERAS = ".keras"


def port(
    source: Annotated[Path, typer.Argument(help="What is read: .keras, or a state_dict (.safetensors, .pt, .pth).")],
    out: OutOption,
    into: Annotated[
        Path | None,
        typer.Option(
            help="The model that gets it, with all its other weights: .keras, or a state_dict (with --model)."
        ),
    ] = None,
    source_model: Annotated[
        str | None, typer.Option(help="package.module:factory of the network whose state_dict SOURCE is.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:factory of the network whose state_dict --into and --out are.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE_LAYER=TARGET_LAYER, may be given several times. Without it all, by equal names or in order."
        ),
    ] = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Carry batch normalization over: running statistics, gamma, beta, and in .keras files epsilon and momentum.

    OUT is the model of --into (or the one that --model makes) with the layers of SOURCE. Without both, SOURCE is a
    .keras file, and OUT a state_dict of its batch normalization layers alone, in PyTorch's words; the report has their
    eps, momentum and axis. The layers are compared first: outputs in inference and training, statistics after a step.
    Exit status: 0 done and equal; 1 not equal, nothing is written; 2 bad input.
    """
    to_keras = into is not None and into.suffix == _KERAS
    check_out(out, force=force, suffixes=(_KERAS,) if to_keras else (".safetensors", ".pt", ".pth"))
    names = _names(layer)

    from batchnorm.cli import keras_files
    from batchnorm.cli import weights as files

    read = _read(source, source_model, "--source-model")
    try:
        if to_keras:
            assert into is not None
            target = keras_files.read(into, compiled=True)
            report = _ported(read, target, names)
            keras_files.write(out, target)
        elif into is not None or model is not None:
            report, saved = _into_network(read, _spec(model, "--model", into), into, names)
            files.write(out, saved)
        else:
            if source.suffix != _KERAS:
                raise ArgumentError("--into or --model must say which model gets the layers of a state_dict")
            if names:
                raise ArgumentError("--layer pairs two models: it needs --into or --model")
            report, saved = _alone(read)
            files.write(out, saved)
    except VerificationError as error:
        _print(error.report, None, as_json=as_json)
        raise typer.Exit(NOT_EQUAL) from error
    _print(report, out, as_json=as_json)


def _ported(source: Any, target: Any, names: dict[str, str] | None) -> PortReport:
    from batchnorm.surgery.porting.operation import port as run

    return run(source, target, layers=names)[1]


def _read(path: Path, spec: str | None, option: str) -> Any:
    """The model of a file."""
    from batchnorm.cli import keras_files
    from batchnorm.cli.surgery import network_with_weights

    if path.suffix == _KERAS:
        if spec is not None:
            raise ArgumentError(f"{option} goes with a state_dict; {path} has its model in it")
        return keras_files.read(path, compiled=False)
    return network_with_weights(_spec(spec, option, path), path)[0]


def _into_network(
    source: Any, spec: str, weights: Path | None, names: dict[str, str] | None
) -> tuple[PortReport, Saved]:
    """The report, and the whole state_dict of the network with the layers of `source` in it.

    Raises:
        ArgumentError: the network's eps is another one, which no state_dict can put right.
    """
    from batchnorm.cli.surgery import network_with_weights
    from batchnorm.cli.weights import Saved

    network, saved = network_with_weights(spec, weights)
    before = {name: (module.eps, module.momentum) for name, module in _layers(network).items()}
    report = _ported(source, network, names)
    after = {name: (module.eps, module.momentum) for name, module in _layers(network).items()}
    wrong = {name: after[name][0] for name in before if not _same(after[name][0], before[name][0])}
    if wrong:
        eps = ", ".join(f"{name or '(itself)'}: eps={value:g}" for name, value in list(wrong.items())[:8])
        raise ArgumentError(
            f"{spec} makes its batch normalization with another eps than the source's, and a state_dict holds none: "
            f"make the layers with {eps}"
        )
    changed = {after[name][1] for name in before if not _same(after[name][1], before[name][1])}
    if changed:
        values = ", ".join(str(value) for value in sorted(changed, key=str))
        note = f"a state_dict holds no momentum: to train on, make the layers of {spec} with momentum={values}"
        report = _with_note(report, note)
    return report, Saved(dict(network.state_dict()), saved.metadata if saved else None)


def _alone(source: Any) -> tuple[PortReport, Saved]:
    """The report, and a state_dict of the Keras model's batch normalization layers alone."""
    import torch

    from batchnorm.cli.weights import Saved
    from batchnorm.layers.batch_norm import BatchNorm
    from batchnorm.surgery.porting import keras_layers

    holder = torch.nn.Module()
    settings = {}
    for one in keras_layers.layers(source):
        if one.obstacle():
            raise ArgumentError(f"cannot port {one.name!r}: {one.obstacle()}")
        numbers, several = one.numbers(), len(one.axis) > 1
        shape = numbers.mean.shape
        if "." in one.name or one.name in settings:
            raise ArgumentError(
                f"a layer's name must be its own and without dots to be one in a state_dict: {one.name!r}"
            )
        axis = one.axis if several else one.axis[0]
        holder.add_module(one.name, BatchNorm(shape if several else shape[0], channel_axis=axis))
        settings[one.name] = {"eps": numbers.eps, "momentum": numbers.momentum, "axis": one.axis, "variance": one.rule}
    report = _ported(source, holder, None)
    tensors = {key.replace("/", "."): value for key, value in holder.state_dict().items() if not _is_counter(key)}
    words = {name.replace("/", "."): value for name, value in settings.items()}
    return report, Saved(tensors, {"format": "pt", "batch_normalization": json.dumps(words)})


def _layers(network: torch.nn.Module) -> dict[str, Any]:
    from batchnorm.layers.inventory import batch_norm_layers

    return dict(batch_norm_layers(network))


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _same(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and abs(one - other) <= 1e-6 * abs(one))


def _with_note(report: PortReport, note: str) -> PortReport:
    import dataclasses

    return dataclasses.replace(report, notes=(*report.notes, note))


def _spec(spec: str | None, option: str, path: Path | None) -> str:
    if spec is None:
        raise ArgumentError(f"{option} must name the factory of the network, package.module:factory, for {path}")
    return spec


def _names(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    names: dict[str, str] = {}
    for one in given:
        source, separator, target = one.partition("=")
        if not separator:
            raise ArgumentError(f"--layer must be SOURCE_LAYER=TARGET_LAYER, got {one!r}")
        if source in names:
            raise ArgumentError(f"--layer names {source!r} twice")
        names[source] = target
    return names


def _print(report: Any, out: Path | None, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "out": None if out is None else str(out)}, indent=2))
    else:
        typer.echo(str(report))
        typer.echo("Not written, as the layers do not compute the same" if out is None else f"Written: {out}")
