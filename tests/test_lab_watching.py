"""What is seen of runs while they train: the display's lines, TensorBoard's events."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchnorm.cli.study_display import Display
from batchnorm.errors import MissingPackageError
from batchnorm.lab import watching
from batchnorm.lab.config import Job, Network, Run, Training, Watch
from batchnorm.lab.train import train
from batchnorm.lab.watching import Told, announced, check_tensorboard, told

TRAINING = Training(data="wine", inputs="standardised", batch_size=20, steps=6, evaluations=(0, 3, 6))
JOB = Job("toy", tuple(Run("toy", "an arm", seed, 0.5, Network(depth=1, width=4), TRAINING) for seed in (3, 4)))


class Reading:
    """Reads at each evaluation what is told at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[list[Told]] = []

    def __call__(self, stack: Any, step: int) -> None:
        self.seen.append(told(self.folder))

    def values(self) -> list[dict[str, Any]]:
        return [{}, {}]


def watched(tmp_path: Path, *, tensorboard: bool) -> Job:
    return replace(JOB, watch=Watch(str(tmp_path), str(tmp_path / "logs") if tensorboard else ""))


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**record, "seconds": 0, "curves": {**record["curves"], "seconds": 0}} for record in records]


def test_a_run_tells_its_step_and_loss_and_trains_as_if_unwatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_EVERY", -1.0)
    probe = Reading(tmp_path)
    job = watched(tmp_path, tensorboard=False)
    with announced(job):
        records = train(job, probe)
    (first,), (second,), (third,) = probe.seen
    assert first == Told("toy", "an arm", 2, 3, 0.5, None, 6, None)
    assert [second.step, third.step] == [3, 6]
    assert second.loss is not None
    assert 0 < second.loss < 5
    assert told(tmp_path) == []
    assert without_clock(records) == without_clock(train(JOB))


def test_nothing_is_written_where_nobody_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with announced(JOB):
        train(JOB)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    first, second = train(watched(tmp_path, tensorboard=True))
    files = sorted((tmp_path / "logs" / "toy" / "an_arm").glob("*/events*"))
    assert [path.parent.name[:15] for path in files] == ["seed_3-rate_0.5", "seed_4-rate_0.5"]
    for record, path in zip((first, second), files, strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
        steps, heights = zip(*points["validation_accuracy"], strict=True)
        assert list(steps) == record["curves"]["step"]
        assert heights == pytest.approx(record["curves"]["validation_accuracy"])
        assert [step for step, _ in points["train_loss"]] == [3, 6]  # none before the first step
        assert [step for step, _ in points["batch_loss"]] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_that_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'batchnorm\[tensorboard\]'"):
        check_tensorboard()


def test_the_terminal_shows_a_line_for_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = Display(results_on_stdout=False)
    with display.watching(is_elsewhere=False) as folder:
        with announced(replace(JOB, watch=Watch(folder))):
            lines = [str(one) for one in display._bar.get_renderables()]
            assert lines[-1] == "  toy, an arm, 2 runs"
            watching._say(Watch(folder), JOB.runs[:1], 5, 1.25)
            assert str(list(display._bar.get_renderables())[-1]) == (
                "  toy, an arm, seed 3, rate 0.5: step 5/6, loss 1.25"
            )
        assert len(list(display._bar.get_renderables())) == 1
    assert not Path(folder).exists()


def test_elsewhere_than_a_terminal_nobody_is_asked_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with Display(results_on_stdout=False).watching(is_elsewhere=False) as folder:
        assert folder == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(results_on_stdout=False).watching(is_elsewhere=True) as folder:
        assert folder == ""
