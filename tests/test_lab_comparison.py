"""Two studies side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_claims import make_claim
from typer.testing import CliRunner

from batchnorm.cli.app import app
from batchnorm.errors import ArgumentError
from batchnorm.lab import report
from batchnorm.lab.comparison import compare
from batchnorm.lab.study import run_study


def study(monkeypatch: pytest.MonkeyPatch, out: Path, *claims: object) -> Path:
    monkeypatch.setattr(report, "CLAIMS", claims)
    list(run_study(out, claims=claims, seeds=(0, 1, 2), workers=1))  # type: ignore[arg-type]
    report.write_report(out)
    return out


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    same, moved = make_claim("same"), make_claim("moved", value=lambda seed: 10.0 + seed)
    first = study(monkeypatch, tmp_path / "a", same, moved, make_claim("gone"))
    other = make_claim("moved", verdict="partly", value=lambda seed: 50.0 + seed)
    return first, study(monkeypatch, tmp_path / "b", same, other, make_claim("new"))


def test_verdicts_and_intervals_are_set_side_by_side(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    same, moved = found.headlines
    assert (same.claim, same.first, same.agrees) == ("same", same.second, True)
    assert (moved.first.verdict, moved.second.verdict) == ("shown", "partly")
    assert (moved.first.mean, moved.second.mean) == (11.0, 51.0)
    assert not moved.agrees
    assert found.only == (("gone",), ("new",))


def test_the_command_says_whether_verdicts_differ(folders: tuple[Path, Path]) -> None:
    first, second = map(str, folders)
    shown = CliRunner().invoke(app, ["study", "compare", first, second])
    assert shown.exit_code == 1
    for part in ("moved title", "partly", "differ", "overlap", "gone", "new"):
        assert part in shown.output
    again = CliRunner().invoke(app, ["study", "compare", first, first, "--json", "--all"])
    assert again.exit_code == 0
    assert {row["claim"] for row in json.loads(again.output)["rows"]} == {"same", "moved", "gone"}
    every = CliRunner().invoke(app, ["study", "compare", first, first, "--all"])
    assert "the value" in every.output


def test_folders_without_results_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--report-only"):
        compare(folders[0], tmp_path)
    results = folders[1] / "results.json"
    results.write_text("[1]")
    with pytest.raises(ArgumentError, match="holds no results of a study"):
        compare(*folders)
    results.write_text('{"schema": 99, "claims": []}')
    with pytest.raises(ArgumentError, match="has schema 99, expected 1"):
        compare(*folders)


def test_the_page_shows_the_figures_of_both(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(str, folders)
    page = tmp_path / "both.html"
    CliRunner().invoke(app, ["study", "compare", first, second, "-o", str(page)])
    html = page.read_text(encoding="utf-8")
    assert html.count('aria-label="Every seed, mean and interval.') == 2
    assert html.count("<figcaption>a</figcaption>") == html.count("<figcaption>b</figcaption>") == 2
    for part in ("same title", "moved title", "Only in a: gone", "Only in b: new", "1 with the same verdict"):
        assert part in html
    assert "a 11%" in html.replace("\u2009", "")
