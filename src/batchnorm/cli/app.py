"""The command `batchnorm`: what stands above its commands, and how it ends when something is wrong."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import batchnorm
from batchnorm.cli import convert, export, fold, fuse, info, port, recalibrate, shift, study
from batchnorm.errors import BatchNormError

USAGE_ERROR = 2
"""Exit status for what the user can put right: the one that wrong options have too."""

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization: exact statistics, drop-in layers, and the paper's claims measured on real data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(study.app, name="study")
app.command("recalibrate")(recalibrate.recalibrate)
app.command("port")(port.port)
app.command("convert")(convert.convert)
app.command("fuse")(fuse.fuse)
app.command("fold")(fold.fold)
app.command("export")(export.export)
app.add_typer(shift.app, name="shift")
app.command("info")(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what the user can put right ends it with a message and status 2, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a sign shows another, and nothing breaks
            stream.reconfigure(errors="replace")
    try:
        app()
    except (BatchNormError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(USAGE_ERROR)
