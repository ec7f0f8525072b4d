"""records.jsonl: round trip, torn last line, foreign folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import Network, Run, Training
from batchnorm.lab.record import RECORDS, RecordFile, Session, environment, make_record, significant

SESSION = Session("quick", (0, 1), ("placement",), {"python": "3"})


def record(seed: int = 0, **values: object) -> dict[str, object]:
    run = Run("placement", "arm", seed, 0.1, Network(), Training())
    curves = {"step": [0, 5], "test_accuracy": [0.1, float("nan")]}
    return make_record(run, curves=curves, values=values, seconds=0.5, data_sha256="abc")


def opened(folder: Path) -> RecordFile:
    file = RecordFile(folder)
    file.open(SESSION)
    return file


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    file = opened(tmp_path / "new" / "folder")
    file.append([record(0, diverged_at=None), record(1, inner={"x": [1.5, float("inf")]})])
    again = RecordFile(tmp_path / "new" / "folder")
    found = again.records()
    assert [one["seed"] for one in found] == [0, 1]
    assert found[0] == record(0, diverged_at=None)
    assert found[0]["curves"]["test_accuracy"] == [0.1, None]
    assert found[1]["values"]["inner"]["x"] == [1.5, None]
    assert again.sessions() == [SESSION]


def test_the_key_depends_on_everything_in_the_run_and_on_nothing_else() -> None:
    run = Run("placement", "arm", 0, 0.1, Network(), Training())
    assert run.key == Run("placement", "arm", 0, 0.1, Network(), Training()).key
    others = [
        Run("placement", "arm", 1, 0.1, Network(), Training()),
        Run("placement", "arm", 0, 0.2, Network(), Training()),
        Run("placement", "arm", 0, 0.1, Network(width=3), Training()),
        run.with_training(steps=7),
    ]
    assert len({run.key, *(other.key for other in others)}) == 5


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.append([record(0), record(1)])
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes()[:-30])
    assert [one["seed"] for one in RecordFile(tmp_path).records()] == [0]
    resumed = opened(tmp_path)
    resumed.append([record(1)])
    assert [one["seed"] for one in resumed.records()] == [0, 1]
    assert len(resumed.sessions()) == 2


def test_a_file_torn_inside_its_first_line_starts_again(tmp_path: Path) -> None:
    opened(tmp_path)
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes()[:12])
    assert opened(tmp_path).sessions() == [SESSION]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.append([record(0), record(1)])
    path = tmp_path / RECORDS
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ArgumentError, match="line 3: expected one JSON object"):
        file.records()


def test_the_first_record_of_a_key_counts(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.append([record(0, mark=1), record(0, mark=2)])
    assert [one["values"]["mark"] for one in file.records()] == [1]


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArgumentError, match=r"holds something else \(thesis.tex\); name another folder"):
        RecordFile(tmp_path)


def test_foreign_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text('{"some": "thing"}\n')
    with pytest.raises(ArgumentError, match="was not written by this study"):
        RecordFile(tmp_path)
    assert (tmp_path / RECORDS).read_text() == '{"some": "thing"}\n'


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("x")
    with pytest.raises(ArgumentError, match="expected a folder"):
        RecordFile(tmp_path / "study")


def test_a_study_with_a_report_beside_it_is_accepted(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "report.html").write_text("x")
    assert RecordFile(tmp_path).records() == []


def test_the_environment_is_plain_json() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert {"python", "torch", "numpy", "batchnorm", "platform", "processor", "cores"} <= set(found)


def test_significant_digits() -> None:
    assert significant(0.123456789) == 0.123457
    assert significant(123456789.0, 3) == 123000000.0
