"""Runs claims: their jobs on an engine, their records into the output folder, finished claims in order."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.errors import ArgumentError
from batchnorm.lab.claim import Claim
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.config import Job, Run, Tier, Watch
from batchnorm.lab.datasets.stored import opened
from batchnorm.lab.engines import Engine, Here, Processes, Records
from batchnorm.lab.pictures import image_card
from batchnorm.lab.record import RecordFile, Session, environment
from batchnorm.lab.report import Judged, judge
from batchnorm.lab.watching import announced

_ALONE = threading.Lock()


@dataclass(frozen=True)
class Progress:
    """How far a claim is.

    Attributes:
        claim: The claim.
        done: Runs that are recorded, those of earlier sessions included.
        total: All runs of the claim.
        failed: Runs that were given up, as their workers died again and again.
        seconds_left: For all claims together, estimated from the runs that are recorded; None before the first.
    """

    claim: Claim
    done: int
    total: int
    failed: int = 0
    seconds_left: float | None = None


def run_study(
    out: Path,
    *,
    claims: Sequence[Claim] = CLAIMS,
    seeds: Sequence[int] = (0, 1, 2),
    tier: Tier = "quick",
    workers: int = 2,
    engine: Engine | None = None,
    images: Path | None = None,
    network: str = "",
    watch: Watch | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Generator[Judged, None, None]:
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
        engine: Where the jobs are trained, instead of `workers` processes; it is left open.
        images: Folder of stored images, for claims that train on images; see `batchnorm.lab.datasets.stored`.
        network: package.module:factory of the user's network, for the claims of the tier "network".
        watch: Where the runs tell how far they are while they train.
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
    asked = [_asked(claim, [job.given(folder, network, watch) for job in claim.jobs(seeds, tier)]) for claim in claims]
    return _finished(file, asked, engine, workers, on_progress)


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
    jobs: dict[tuple[str, ...], Job]
    """By the keys of their runs."""
    runs: dict[str, Run]


def _asked(claim: Claim, jobs: Sequence[Job]) -> _Asked:
    keyed = {tuple(run.key for run in job.runs): job for job in jobs}
    return _Asked(
        claim, keyed, {key: run for keys, job in keyed.items() for key, run in zip(keys, job.runs, strict=True)}
    )


def _finished(
    file: RecordFile,
    asked: list[_Asked],
    engine: Engine | None,
    workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> Generator[Judged, None, None]:
    found = {record["key"]: record for record in file.records()}
    missing = [{key for key in one.runs if key not in found} for one in asked]
    failed: list[set[str]] = [set() for _ in asked]
    tasks = [
        (number, keys)
        for number, one in enumerate(asked)
        for keys in one.jobs
        if any(key in missing[number] for key in keys)
    ]
    used = engine
    if used is None:
        used = Processes(workers) if workers > 1 and len(tasks) > 1 else Here()
    width = used.width

    def tell(number: int) -> None:
        if on_progress is not None:
            total, lost = len(asked[number].runs), len(failed[number])
            waiting = [one.runs[key] for one, keys in zip(asked, missing, strict=True) for key in keys]
            left = _seconds_left(waiting, found, width)
            claim = asked[number].claim
            on_progress(Progress(claim, total - len(missing[number]) - lost, total, lost, left))

    for number in range(len(asked)):
        tell(number)
    following = 0
    with closing(used if engine is None else Here()), closing(_trained(asked, tasks, used)) as trained:
        while following < len(asked):
            if not missing[following]:
                if not failed[following]:
                    yield judge(asked[following].claim, [found[key] for key in asked[following].runs])
                following += 1
                continue
            number, records = next(trained)
            if isinstance(records, _Lost):
                keys = [key for key in records.keys if key in missing[number]]
                file.note_failure(asked[number].claim.CARD.name, keys, records.reason)
                failed[number] |= set(keys)
            else:
                new = [record for record in records if record["key"] in missing[number]]
                file.append(new)
                found |= {record["key"]: record for record in new}
                keys = [record["key"] for record in new]
            missing[number] -= set(keys)
            tell(number)


@dataclass(frozen=True)
class _Lost:
    keys: tuple[str, ...]
    reason: str


def _trained(
    asked: list[_Asked], tasks: list[tuple[int, tuple[str, ...]]], engine: Engine
) -> Generator[tuple[int, Records | _Lost], None, None]:
    """(number of the claim, records) of each task, in the order in which they end; a task that was lost comes so."""
    waiting = deque((number, keys, 1) for number, keys in tasks)
    running: dict[Future[Records], tuple[int, tuple[str, ...], int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(engine.width, 1):
                number, keys, tries = waiting.popleft()
                running[engine.submit(_work, asked[number].claim.run, asked[number].jobs[keys])] = number, keys, tries
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, keys, tries = running.pop(future)
                error = future.exception()
                if error is None or not engine.is_lost(error):
                    yield number, future.result()
                elif tries < engine.tries:
                    waiting.appendleft((number, keys, tries + 1))
                else:
                    reason = f"its worker died, {tries} times: {error}" if tries > 1 else f"its workers died: {error}"
                    yield number, _Lost(keys, " ".join(reason.split()))
    finally:
        for future in running:
            future.cancel()


def _work(run: Callable[[Job], Records], job: Job) -> Records:
    # Threads and torch's generator are of the process, and a worker of a cluster may have several threads.
    with _ALONE, announced(job):
        return run(job)


def _seconds_left(waiting: Sequence[Run], found: Mapping[str, Mapping[str, Any]], width: int) -> float | None:
    """From the mean time of a run of the same claim; for claims without one, from that of a step of any."""
    if not found:
        return None
    times: dict[str, list[float]] = {}
    steps = 0
    for record in found.values():
        times.setdefault(record["claim"], []).append(record["seconds"])
        steps += record["config"]["training"]["steps"] + 1
    of_claim = {claim: math.fsum(of) / len(of) for claim, of in times.items()}
    of_step = math.fsum(math.fsum(of) for of in times.values()) / steps
    left = math.fsum(of_claim.get(run.claim, of_step * (run.training.steps + 1)) for run in waiting)
    return left / max(width, 1)
