"""`batchnorm study` trains, judges and reports the claims about batch normalization; `study list` names them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from batchnorm.errors import ArgumentError

# What needs torch or matplotlib is imported inside the commands, so that --help answers at once.
if TYPE_CHECKING:
    from batchnorm.lab.claim import Claim

_OPTIONS = {"workers": "jobs"}
"""Options that are called otherwise than their parameters."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
FAILED = 1
"""Exit status where runs were given up."""


class _Group(TyperGroup):
    """`batchnorm study package.module:factory` is the command "network" with its first argument."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, ["network", *args] if args and ":" in args[0] else args)


app = typer.Typer(
    cls=_Group, help="Measure the claims about batch normalization on real data.", invoke_without_command=True
)


class TierName(str, Enum):
    """Sizes of the study."""

    quick = "quick"
    standard = "standard"
    full = "full"


class EngineOption(str, Enum):
    """Where runs are trained."""

    joblib = "joblib"
    dask = "dask"
    ray = "ray"


_Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Processes that train side by side.")]
_Engine = Annotated[
    EngineOption, typer.Option(help="Where runs are trained: joblib's processes here, or a Dask or a Ray cluster.")
]
_Address = Annotated[
    str,
    typer.Option(
        help="Of the cluster: Dask's scheduler (tcp://host:8786), Ray's head (auto, ray://host:10001). Without it a "
        "cluster of --jobs processes is started here."
    ),
]
_TensorBoard = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Log curves here while runs train, for `tensorboard --logdir DIR`.")
]


@app.callback()
def study(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for records, results and report; run again to resume.")] = Path(
        "study"
    ),
    tier: Annotated[
        TierName,
        typer.Option(help="quick: digits and wine, 2 minutes; standard: MNIST, 8 minutes; full: CIFAR-10, 19 minutes."),
    ] = TierName.quick,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Images for standard and full: .npz, IDX files, CIFAR-10's archives, or a folder or .zip of images by "
            "split and class. Without it MNIST or CIFAR-10 is downloaded once.",
        ),
    ] = None,
    workers: _Jobs = 2,
    engine: _Engine = EngineOption.joblib,
    address: _Address = "",
    tensorboard: _TensorBoard = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds for each arm.")] = 3,
    claim: Annotated[
        list[str] | None, typer.Option(help="Only this claim; may be given several times. See: batchnorm study list")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json, and nothing else, on stdout.")] = False,
    report_only: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Rebuild the report of this folder; trains nothing.")
    ] = None,
) -> None:
    """Train networks with and without batch normalization on real data, judge each claim, and write a report."""
    if context.invoked_subcommand is not None:
        return
    from batchnorm.cli.study_display import Display

    display = Display(results_on_stdout=as_json)
    if report_only is not None:
        _refuse_beside_report_only(context)
        _report(report_only, display, as_json)
        return
    claims = _chosen(claim or (), tier.value)
    options = {"seeds": tuple(range(seeds)), "tier": tier.value, "images": _images(tier, data)}
    _run(out, claims, options, _Where(engine, address, workers, tensorboard), display, as_json)


@app.command("network", hidden=True)
def network(
    factory: Annotated[str, typer.Argument(metavar="NETWORK", help="package.module:factory, which makes the network.")],
    data: Annotated[Path, typer.Option(metavar="PATH", help="Your images, as for the other tiers.")],
    out: Annotated[Path, typer.Option(help="Folder for records, results and report; run again to resume.")] = Path(
        "study-network"
    ),
    workers: _Jobs = 2,
    engine: _Engine = EngineOption.joblib,
    address: _Address = "",
    tensorboard: _TensorBoard = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds for each arm.")] = 3,
    claim: Annotated[list[str] | None, typer.Option(help="Only this claim; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json, and nothing else, on stdout.")] = False,
) -> None:
    """Run the claims that apply to any network on yours: `batchnorm study package.module:factory --data PATH`.

    Rate window, batch size, inference statistics, gradients over depth, landscape; with its batch normalization,
    without it, and with group normalization in its place.
    """
    from batchnorm.cli.study_display import Display
    from batchnorm.lab.datasets.providing import stored_images
    from batchnorm.lab.own import check_own

    images = stored_images(data)
    check_own(factory, images)
    claims = _chosen(claim or (), "network")
    options = {
        "seeds": tuple(range(seeds)),
        "tier": "network",
        "images": images,
        "network": factory,
    }
    where = _Where(engine, address, workers, tensorboard)
    _run(out, claims, options, where, Display(results_on_stdout=as_json), as_json)


@app.command("list")
def list_claims() -> None:
    """Name the claims, in the order in which they run."""
    from batchnorm.lab.claims import CLAIMS

    width = max((len(one.CARD.name) for one in CLAIMS), default=0)
    for one in CLAIMS:
        typer.echo(f"{one.CARD.tier:<8}  {one.CARD.name:<{width}}  {one.CARD.title}")


@app.command("compare")
def compare_studies(
    first: Annotated[Path, typer.Argument(metavar="A", help="Output folder of a study.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Output folder of another one.")],
    all_measures: Annotated[bool, typer.Option("--all", help="Every measure, not the headlines alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write a page with the figures of both.")
    ] = None,
) -> None:
    """Show two studies side by side: verdicts and measures with their intervals.

    Exit status: 0 all verdicts are the same, 1 one differs, 2 bad input.
    """
    import json
    from dataclasses import asdict

    from batchnorm.cli.study_display import show_comparison
    from batchnorm.lab.comparison import compare, comparison_page

    found = compare(first, second)
    if out is not None:
        from batchnorm.shift.storage import write_whole

        write_whole(out, comparison_page(first, second).encode("utf-8"))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, allow_nan=False))
    else:
        show_comparison(found, all_measures=all_measures)
    if any(row.first.verdict != row.second.verdict for row in found.headlines):
        raise typer.Exit(1)


def _images(tier: TierName, data: Path | None) -> Path | None:
    from batchnorm.lab.datasets.providing import DEFAULTS, images_for

    if data is not None and tier.value not in DEFAULTS:
        raise ArgumentError(f"--data goes with --tier {' or '.join(DEFAULTS)}; {tier.value} brings its own data")
    return images_for(tier.value, data, shows_progress=True)


@dataclass(frozen=True)
class _Where:
    """Where runs are trained, and where they tell of it."""

    engine: EngineOption
    address: str
    workers: int
    tensorboard: Path | None


def _run(
    out: Path, claims: Sequence[Claim], options: dict[str, Any], where: _Where, display: Any, as_json: bool
) -> None:
    """Trains what is missing and writes the report, of what is finished where Ctrl-C ends it."""
    from batchnorm.lab.config import Watch
    from batchnorm.lab.engines import engine_of
    from batchnorm.lab.study import run_study
    from batchnorm.lab.watching import check_tensorboard

    if where.tensorboard is not None:
        check_tensorboard()
    # joblib's processes are started by the study itself, if there is anything to train.
    is_cluster = where.engine is not EngineOption.joblib or bool(where.address)
    engine = engine_of(where.engine.value, where.address, where.workers) if is_cluster else None
    logs = "" if where.tensorboard is None else str(where.tensorboard.absolute())
    # Files for the display are read where they are written: on this machine.
    with display, display.watching(is_cluster) as folder, closing(engine) if engine else nullcontext():
        study = run_study(
            out,
            claims=claims,
            workers=where.workers,
            engine=engine,
            watch=Watch(folder, logs),
            on_progress=display.progress,
            **options,
        )
        with closing(study):
            for judged in study:
                display.verdict(judged)
    _report(out, display, as_json)
    if display.was_interrupted:
        display.say(f"Interrupted. The same command goes on from here; finished runs are in {out}.")
        raise typer.Exit(INTERRUPTED)
    if display.failed:
        display.say(f"{display.failed} runs failed: the same command tries them again.")
        raise typer.Exit(FAILED)


def _report(folder: Path, display: Any, as_json: bool) -> None:
    from batchnorm.lab.report import write_report

    results = write_report(folder)
    display.table(results, folder)
    if as_json:
        typer.echo((folder / "results.json").read_text(encoding="utf-8"), nl=False)


def _chosen(names: Sequence[str], tier: str) -> tuple[Claim, ...]:
    """The tier's claims of these names in the study's order; all of them where none is named."""
    from batchnorm.lab.claims import CLAIMS

    of_tier = [one for one in CLAIMS if one.CARD.tier == tier]
    known = [one.CARD.name for one in of_tier]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArgumentError(f"expected --claim to be one of {', '.join(known)}; got {', '.join(unknown)}")
    return tuple(one for one in of_tier if not names or one.CARD.name in names)


def _refuse_beside_report_only(context: typer.Context) -> None:
    """--report-only says which records to take; options that choose what to train would change nothing."""
    for name in ("out", "tier", "data", "workers", "engine", "address", "tensorboard", "seeds", "claim"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = _OPTIONS.get(name, name)
            raise ArgumentError(
                f"--report-only takes its records as they are and trains nothing: leave out --{option}, or leave out "
                "--report-only"
            )
