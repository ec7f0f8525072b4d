"""The runner: order, progress, resuming, breaking off, workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batchnorm.errors import ArgumentError
from batchnorm.lab.claim import Record
from batchnorm.lab.claims import placement
from batchnorm.lab.config import Job, Network, Run, Training
from batchnorm.lab.measures import measure_over_seeds
from batchnorm.lab.record import RECORDS, RecordFile, make_record
from batchnorm.lab.study import Progress, run_study


class Counting:
    """A claim of one job a seed that counts what is run, and may be told to break off."""

    def __init__(self, name: str, break_off_at: int | None = None) -> None:
        self.CARD = replace(placement.CARD, name=name)
        self.trained: list[int] = []
        self.break_off_at = break_off_at

    def jobs(self, seeds: Sequence[int], tier: str) -> list[Job]:
        runs = [
            [Run(self.CARD.name, arm, seed, 0.1, Network(), Training()) for arm in ("one", "other")] for seed in seeds
        ]
        return [Job(self.CARD.name, tuple(pair)) for pair in runs]

    def run(self, job: Job) -> list[dict[str, Any]]:
        seed = job.runs[0].seed
        if seed == self.break_off_at:
            raise KeyboardInterrupt
        self.trained.append(seed)
        curves = {"step": [0], "test_accuracy": [0.5]}
        return [make_record(run, curves=curves, values={}, seconds=1.0, data_sha256="") for run in job.runs]

    def measure(self, records: Sequence[Record]) -> list[Any]:
        return [measure_over_seeds("number", "number", "", [float(len(records))])]

    def judge(self, measures: Sequence[Any]) -> Any:
        return SimpleNamespace(verdict="shown", headline=measures[0], reading="")


def test_claims_come_in_order_with_all_of_their_records(tmp_path: Path) -> None:
    told: list[Progress] = []
    claims = [Counting("first"), Counting("second")]
    judged = list(run_study(tmp_path, claims=claims, seeds=(0, 1), workers=1, on_progress=told.append))
    assert [one.card.name for one in judged] == ["first", "second"]
    assert [one.measures[0].mean for one in judged] == [4, 4]
    assert [(one.claim.CARD.name, one.done, one.total) for one in told] == [
        ("first", 0, 4),
        ("second", 0, 4),
        ("first", 2, 4),
        ("first", 4, 4),
        ("second", 2, 4),
        ("second", 4, 4),
    ]
    assert judged[0].seconds == 4.0
    assert [one.seconds_left for one in told] == [None, None, 6.0, 4.0, 2.0, 0.0]  # a run takes a second


def test_what_is_recorded_is_not_trained_again(tmp_path: Path) -> None:
    list(run_study(tmp_path, claims=[Counting("first")], seeds=(0, 1), workers=1))
    again = Counting("first")
    (judged,) = run_study(tmp_path, claims=[again], seeds=(0, 1, 2), workers=1)
    assert again.trained == [2]
    assert judged.measures[0].mean == 6
    assert len(RecordFile(tmp_path).records()) == 6


def test_a_job_that_was_cut_off_is_trained_again_as_a_whole_and_recorded_once(tmp_path: Path) -> None:
    list(run_study(tmp_path, claims=[Counting("first")], seeds=(0, 1), workers=1))
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes()[:-20])
    again = Counting("first")
    list(run_study(tmp_path, claims=[again], seeds=(0, 1), workers=1))
    assert again.trained == [1]
    records = RecordFile(tmp_path).records()
    assert len(records) == len({record["key"] for record in records}) == 4


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    finished: list[str] = []
    claims = [Counting("first"), Counting("second", break_off_at=1)]
    study = run_study(tmp_path, claims=claims, seeds=(0, 1), workers=1)
    with pytest.raises(KeyboardInterrupt):
        finished.extend(judged.card.name for judged in study)
    assert finished == ["first"]
    assert len(RecordFile(tmp_path).records()) == 6
    resumed = [Counting("first"), Counting("second")]
    assert len(list(run_study(tmp_path, claims=resumed, seeds=(0, 1), workers=1))) == 2
    assert [claim.trained for claim in resumed] == [[], [1]]


def test_a_foreign_folder_is_refused_at_the_call(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ArgumentError, match="something else"):
        run_study(tmp_path, claims=[Counting("first")], workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def small_placement(steps: int) -> Any:
    def jobs(seeds: Sequence[int], tier: str) -> list[Job]:
        return [
            Job(
                job.claim,
                tuple(
                    replace(run, network=replace(run.network, width=8)).with_training(
                        steps=steps, evaluations=(0, steps)
                    )
                    for run in job.runs
                ),
            )
            for job in placement.jobs(seeds, "quick")
        ]

    return SimpleNamespace(
        CARD=placement.CARD, jobs=jobs, run=placement.run, measure=placement.measure, judge=placement.judge
    )
