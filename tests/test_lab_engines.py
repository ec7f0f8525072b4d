"""Engines: the same numbers wherever runs are trained, workers that die, packages that are not there."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_lab_study import Counting, small_placement

from batchnorm.errors import ArgumentError, MissingPackageError
from batchnorm.lab import study as lab_study
from batchnorm.lab.config import Job
from batchnorm.lab.engines import Dask, Here, Processes, Ray, engine_of
from batchnorm.lab.record import RecordFile
from batchnorm.lab.study import Progress, run_study


class Dying(Counting):
    """Kills its worker at one seed, as often as `deaths` says; leaves a file for each time that a seed is begun."""

    def __init__(self, name: str, folder: Path, deaths: int) -> None:
        super().__init__(name)
        self.folder, self.deaths = folder, deaths

    def run(self, job: Job) -> list[dict[str, Any]]:
        seed = job.runs[0].seed
        begun = len(list(self.folder.glob(f"{seed}-*")))
        (self.folder / f"{seed}-{begun}").touch()
        if seed == 1 and begun < self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(job)


def measured(folder: Path) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    records = sorted(RecordFile(folder).records(), key=lambda record: str(record["key"]))
    for record in records:
        del record["seconds"], record["curves"]["seconds"]
    return records


def test_processes_give_what_one_gives_survive_a_killed_one_and_end_quietly(tmp_path: Path) -> None:
    claim = small_placement(10)
    engine = Processes(2)
    try:
        (one,) = run_study(tmp_path / "one", claims=[claim], seeds=(0, 1), workers=1)
        (two,) = run_study(tmp_path / "two", claims=[claim], seeds=(0, 1), engine=engine)
        assert one.measures == two.measures
        assert measured(tmp_path / "one") == measured(tmp_path / "two")
        begun = tmp_path / "begun"
        begun.mkdir()
        (judged,) = run_study(tmp_path / "three", claims=[Dying("dies", begun, 1)], seeds=(0, 1, 2), engine=engine)
        assert judged.measures[0].mean == 6
        # One more time for the run that died, and no other began twice.
        assert sorted(path.name for path in begun.iterdir()) == ["0-0", "1-0", "1-1", "2-0"]
        # The workers are warm: break off in the middle, and warnings would be errors.
        claims = [small_placement(10), small_placement(200)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            study = run_study(tmp_path / "four", claims=claims, seeds=(0, 1), engine=engine)
            next(study)
            study.close()
    finally:
        engine.close()
    records = RecordFile(tmp_path / "four").records()
    assert sum(record["config"]["training"]["steps"] == 10 for record in records) == 32


class Losing(Here):
    """An engine whose workers die over the runs of one seed."""

    tries = 2

    def __init__(self) -> None:
        self.submitted: list[int] = []

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        seed = arguments[1].runs[0].seed
        self.submitted.append(seed)
        if seed != 1:
            return super().submit(call, *arguments)
        future: Future[Any] = Future()
        future.set_exception(ConnectionError("worker\ngone"))
        return future

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, ConnectionError)


def test_a_run_whose_workers_go_on_dying_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[Progress] = []
    engine = Losing()
    claims = [Counting("first"), Counting("second")]
    seeds = {"first": (0, 1, 2), "second": (0, 2)}
    for claim in claims:
        jobs = claim.jobs
        claim.jobs = lambda _, tier, jobs=jobs, name=claim.CARD.name: jobs(seeds[name], tier)  # type: ignore[method-assign]
    judged = list(run_study(tmp_path, claims=claims, engine=engine, on_progress=told.append))
    assert [one.card.name for one in judged] == ["second"]
    assert engine.submitted == [0, 1, 1, 2, 0, 2]
    file = RecordFile(tmp_path)
    assert list(file.failures().values()) == ["its worker died, 2 times: worker gone"] * 2
    assert [(one.done, one.failed) for one in told if one.claim.CARD.name == "first"][-1] == (4, 2)
    assert told[-1].seconds_left == 0
    assert len(list(run_study(tmp_path, claims=claims, workers=1))) == 2
    assert file.failures() == {}


def test_an_error_of_the_run_itself_is_not_tried_again(tmp_path: Path) -> None:
    class Failing(Counting):
        def run(self, job: Job) -> list[dict[str, Any]]:
            self.trained.append(job.runs[0].seed)
            raise ZeroDivisionError

    claim = Failing("fails")
    with pytest.raises(ZeroDivisionError):
        list(run_study(tmp_path, claims=[claim], workers=1))
    assert claim.trained == [0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dask_gives_what_one_process_gives_and_says_when_its_workers_die(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    claim = small_placement(10)
    list(run_study(tmp_path / "one", claims=[claim], seeds=(0, 1), workers=1))
    # Two workers in this process, so that nothing has to be started.
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        engine = Dask(cluster.scheduler_address, 1)
        try:
            assert engine.width == 2
            list(run_study(tmp_path / "dask", claims=[claim], seeds=(0, 1), engine=engine))
        finally:
            engine.close()
    assert measured(tmp_path / "one") == measured(tmp_path / "dask")
    assert engine.is_lost(distributed.KilledWorker("task", "worker", 3))
    assert not engine.is_lost(ValueError())


class FakeRay(ModuleType):
    """What we use of Ray, in this process."""

    class exceptions:  # noqa: N801
        class WorkerCrashedError(Exception):
            pass

        class NodeDiedError(Exception):
            pass

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> None:
        if options["address"] == "nowhere:1":
            raise ConnectionError("refused")
        self.calls.append(("init", options["address"]))

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0, "memory": 1e9}

    def remote(self, **options: Any) -> Any:
        self.calls.append(("remote", options))

        def start(call: Any, *arguments: Any) -> Any:
            future: Future[Any] = Future()
            future.set_result(call(*arguments))
            return SimpleNamespace(future=lambda: future)

        return lambda call: SimpleNamespace(remote=lambda *arguments: start(call, *arguments))

    def shutdown(self) -> None:
        self.calls.append(("shutdown", None))


def test_ray_is_asked_to_try_again_and_gives_what_the_runs_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    engine = engine_of("ray", "", 2)
    assert engine.width == 3
    (judged,) = run_study(tmp_path, claims=[Counting("first")], seeds=(0, 1), engine=engine)
    engine.close()
    assert judged.measures[0].mean == 4
    assert ray.calls == [
        ("init", "local"),
        *[("remote", {"num_cpus": 1, "max_retries": 2})] * 2,
        ("shutdown", None),
    ]
    assert engine.is_lost(FakeRay.exceptions.WorkerCrashedError())
    with pytest.raises(ArgumentError, match="no Ray cluster answers at --address 'nowhere:1'"):
        Ray("nowhere:1", 2)


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_named_with_the_command(
    engine: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'batchnorm\[{engine}\]'"):
        engine_of(engine, "", 1)


def test_joblib_takes_no_address() -> None:
    with pytest.raises(ArgumentError, match="--address goes with --engine dask or ray"):
        engine_of("joblib", "tcp://somewhere:1", 2)


def test_joblib_trains_here_or_in_processes() -> None:
    assert isinstance(engine_of("joblib", "", 1), Here)
    assert isinstance(engine_of("joblib", "", 2), Processes)


def test_one_run_at_a_time_in_a_process() -> None:
    """Threads of a cluster's worker must not share torch's generator and settings."""
    job = Counting("first").jobs((0,), "quick")[0]
    seen: list[bool] = []

    def run(job: Job) -> list[dict[str, Any]]:
        seen.append(lab_study._ALONE.locked())
        return []

    lab_study._work(run, job)
    assert seen == [True]
    assert not lab_study._ALONE.locked()
