"""Runs claims: their jobs on several processes, their records into the output folder, finished claims in order."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from batchnorm.errors import ArgumentError
from batchnorm.lab.claim import Claim
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.config import Job, Tier
from batchnorm.lab.datasets.stored import opened
from batchnorm.lab.pictures import image_card
from batchnorm.lab.record import RecordFile, Session, environment
from batchnorm.lab.report import Judged, judge


@dataclass(frozen=True)
class Progress:
    """How far a claim is.

    Attributes:
        claim: The claim.
        done: Runs that are recorded, those of earlier sessions included.
        total: All runs of the claim.
    """

    claim: Claim
    done: int
    total: int


def run_study(
    out: Path,
    *,
    claims: Sequence[Claim] = CLAIMS,
    seeds: Sequence[int] = (0, 1, 2),
    tier: Tier = "quick",
    workers: int = 2,
    images: Path | None = None,
    network: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Judged]:
    """Train what is not yet recorded, and give each claim with its verdict as soon as it and those before it are done.

    Records are written as each job ends: whoever breaks off (Ctrl-C raises KeyboardInterrupt here, closing the
    generator does the same quietly) keeps what is finished, `batchnorm.lab.report.write_report` makes a report of it,
    and the next call goes on from there. A job that was broken off is trained again as a whole.

    Args:
        out: Output folder; missing, empty, or with a study in it.
        claims: Which claims, in the order in which they are to come.
        seeds: Seeds of the paired runs.
        tier: Size of the study.
        workers: Processes; 1 trains in this one. The numbers do not depend on it.
        images: Folder of stored images, for claims that train on images; see `batchnorm.lab.datasets.stored`.
        network: package.module:factory of the user's network, for the claims of the tier "network".
        on_progress: Called at the start for every claim, and after each job for the job's claim.

    Yields:
        Each claim with its records, measures and verdict.

    Raises:
        ArgumentError: The folder holds something else than a study, or one of other images. Raised at the call,
            before anything is yielded.
    """
    file = RecordFile(out)
    card = None if images is None else image_card(opened(images))
    if card is not None:
        _refuse_other_images(file, card)
    names = tuple(claim.CARD.name for claim in claims)
    file.open(Session(tier, tuple(seeds), names, environment(), card, network))
    folder = "" if images is None else str(images)
    asked = [_Asked(claim, [job.given(folder, network) for job in claim.jobs(seeds, tier)]) for claim in claims]
    return _finished(file, asked, workers, on_progress)


def _refuse_other_images(file: RecordFile, card: Mapping[str, Any]) -> None:
    for session in file.sessions():
        before = session.images
        if before is not None and before["sha256"] != card["sha256"]:
            raise ArgumentError(
                f"the study in {file.path.parent} was trained on {before['name']} ({before['rows']} images), these are "
                f"{card['name']} ({card['rows']}): choose another --out, or give the same images"
            )


@dataclass(frozen=True)
class _Asked:
    claim: Claim
    jobs: list[Job]

    @property
    def keys(self) -> list[str]:
        return [run.key for job in self.jobs for run in job.runs]


def _finished(
    file: RecordFile, asked: list[_Asked], workers: int, on_progress: Callable[[Progress], None] | None
) -> Iterator[Judged]:
    found = {record["key"]: record for record in file.records()}
    missing = [{key for key in one.keys if key not in found} for one in asked]

    def tell(number: int) -> None:
        if on_progress is not None:
            total = len(asked[number].keys)
            on_progress(Progress(asked[number].claim, total - len(missing[number]), total))

    for number in range(len(asked)):
        tell(number)
    tasks = [
        (number, job)
        for number, one in enumerate(asked)
        for job in one.jobs
        if any(run.key in missing[number] for run in job.runs)
    ]
    following = 0
    with closing(_trained(asked, tasks, workers)) as trained:
        while following < len(asked):
            if not missing[following]:
                yield judge(asked[following].claim, [found[key] for key in asked[following].keys])
                following += 1
                continue
            number, records = next(trained)
            new = [record for record in records if record["key"] in missing[number]]
            file.append(new)
            found |= {record["key"]: record for record in new}
            missing[number] -= {record["key"] for record in new}
            tell(number)


def _trained(
    asked: list[_Asked], tasks: list[tuple[int, Job]], workers: int
) -> Generator[tuple[int, list[dict[str, Any]]], None, None]:
    """(number of the claim, records) of each task, in the order in which they end."""
    if workers == 1 or len(tasks) <= 1:
        for number, job in tasks:
            yield number, asked[number].claim.run(job)
        return
    parallel = Parallel(
        n_jobs=workers,
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch="2*n_jobs",  # so that early claims are finished first
        # Ctrl-C reaches every process of a terminal; the workers leave it to this one, and print no tracebacks.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    results = parallel(delayed(_work)(asked[number].claim.run, number, job) for number, job in tasks)
    try:
        # Not "yield from", which would close `results` before the filter below stands.
        for result in results:  # noqa: UP028
            yield result
    finally:
        with warnings.catch_warnings():
            # Whoever breaks off knows that jobs were cancelled.
            warnings.simplefilter("ignore", UserWarning)
            results.close()


def _work(run: Callable[[Job], list[dict[str, Any]]], number: int, job: Job) -> tuple[int, list[dict[str, Any]]]:
    # Ctrl-C reaches the workers too; the study ends them, and they have nothing to say about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return number, run(job)
