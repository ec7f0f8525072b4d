"""Records become results, tables, figures and a page: whole, the same each time, and only from what is finished."""

import csv
import json

import pytest
from toy_claims import HOSTILE, make_claim

from batchnorm.errors import ArgumentError
from batchnorm.lab import report
from batchnorm.lab.record import RecordFile, Session, environment
from batchnorm.lab.report import write_report


@pytest.fixture
def claims(monkeypatch):
    found = (make_claim("first"), make_claim("second", verdict="not shown"))
    monkeypatch.setattr(report, "CLAIMS", found)
    return found


def _record(folder, asked, trained, seeds=(0, 1, 2)):
    file = RecordFile(folder)
    file.open(Session("quick", seeds, tuple(claim.CARD.name for claim in asked), environment()))
    for claim in trained:
        for job in claim.jobs(seeds, "quick"):
            file.append(claim.run(job))
    return file


def _bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_report_holds_verdicts_numbers_and_files(tmp_path, claims):
    _record(tmp_path, claims, claims)
    results = write_report(tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["schema"] == 1
    assert results["study"] == {"tier": "quick", "seeds": [0, 1, 2], "version": "0.1.0", "unfinished": []}
    assert [(one["name"], one["verdict"], one["runs"]) for one in results["claims"]] == [
        ("first", "shown", 3),
        ("second", "not shown", 3),
    ]
    assert results["claims"][0]["headline"]["mean"] == 1.0
    assert results["claims"][0]["seconds"] == 1.5
    assert results["data"][0]["name"] == "wine"
    names = set(_bytes(tmp_path))
    figures = [f"figures/first-{part}.{kind}" for part in ("one", "measures_percent") for kind in ("svg", "png", "pdf")]
    assert {"report.html", "tables/verdicts.csv", *figures} <= names
    assert not [name for name in names if name.startswith(".report")]
    assert HOSTILE not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_rebuilding_gives_the_same_bytes(tmp_path, claims):
    _record(tmp_path, claims, claims)
    write_report(tmp_path)
    first = _bytes(tmp_path)
    write_report(tmp_path)
    assert _bytes(tmp_path) == first


def test_order_of_finishing_does_not_matter(tmp_path, claims):
    for name, order in (("a", claims), ("b", claims[::-1])):
        _record(tmp_path / name, claims, order)
        write_report(tmp_path / name)
    one, other = _bytes(tmp_path / "a"), _bytes(tmp_path / "b")
    for files in (one, other):
        del files["records.jsonl"]
    assert one == other


@pytest.mark.parametrize("finished", [0, 1])
def test_unfinished_claims_are_left_out_and_named(tmp_path, claims, finished):
    _record(tmp_path, claims, claims[:finished])
    results = write_report(tmp_path)
    assert len(results["claims"]) == finished
    assert results["study"]["unfinished"] == [claim.CARD.title for claim in claims[finished:]]
    assert claims[1].CARD.title in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_claims_that_no_one_asked_for_are_not_unfinished(tmp_path, claims):
    _record(tmp_path, claims[:1], claims[:1])
    results = write_report(tmp_path)
    assert results["study"]["unfinished"] == []
    assert [one["name"] for one in results["claims"]] == ["first"]


def test_claims_of_earlier_sessions_stay_in_the_report(tmp_path, claims):
    _record(tmp_path, claims[:1], claims[:1])
    _record(tmp_path, claims[1:], claims[1:], seeds=(0, 1))
    assert [(one["name"], one["seeds"]) for one in write_report(tmp_path)["claims"]] == [
        ("first", [0, 1, 2]),
        ("second", [0, 1]),
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path, monkeypatch):
    claim = make_claim(value=lambda seed: float("inf"))
    claim.measure = lambda records: [make_measure(float("inf"))]
    monkeypatch.setattr(report, "CLAIMS", (claim,))
    _record(tmp_path, (claim,), (claim,))
    assert write_report(tmp_path)["claims"][0]["headline"]["mean"] is None
    with (tmp_path / "tables" / "values.csv").open(encoding="utf-8", newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["", "", ""]


def make_measure(value):
    from batchnorm.lab.measures import measure_over_seeds

    return measure_over_seeds("value", "the value", "%", [value] * 3)


def test_tables_agree_with_results(tmp_path, claims):
    _record(tmp_path, claims, claims)
    results = write_report(tmp_path)
    with (tmp_path / "tables" / "measures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["claim"], float(row["mean"])) for row in rows] == [
        (claim["name"], measure["mean"]) for claim in results["claims"] for measure in claim["measures"]
    ]


def test_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="holds none; train first"):
        write_report(tmp_path)


def test_other_data_than_those_of_the_records_are_refused(tmp_path, claims, monkeypatch):
    _record(tmp_path, claims, claims)
    path = tmp_path / "records.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace(
            '"data":{"name":"wine","sha256":"', '"data":{"name":"wine","sha256":"00'
        )
    )
    with pytest.raises(ArgumentError, match="sha256 of the records"):
        write_report(tmp_path)


def test_a_failure_leaves_the_report_that_was_there(tmp_path, claims, monkeypatch):
    _record(tmp_path, claims, claims)
    write_report(tmp_path)
    first = _bytes(tmp_path)

    def broken(records, measures):
        raise RuntimeError("no figure")

    monkeypatch.setattr(claims[1], "figure", broken)
    with pytest.raises(RuntimeError, match="no figure"):
        write_report(tmp_path)
    assert _bytes(tmp_path) == first
