"""`batchnorm study`: what it prints, what it writes, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from toy_claims import make_claim
from typer.testing import CliRunner

import batchnorm
from batchnorm.cli.app import app, main
from batchnorm.errors import ArgumentError
from batchnorm.lab import claims as lab_claims
from batchnorm.lab import report

CLAIM = ["study", "--claim", "feature_scaling", "--seeds", "1"]


@pytest.fixture
def claims(monkeypatch):
    found = (make_claim("first"), make_claim("second", verdict="partly"))
    _use(monkeypatch, found)
    return found


def _use(monkeypatch, found):
    monkeypatch.setattr(lab_claims, "CLAIMS", found)
    monkeypatch.setattr(report, "CLAIMS", found)


def _invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _train_one_by_one(out):
    """One job at a time trains in this process: no workers to start."""
    for name in ("first", "second"):
        assert _invoke("study", "--out", out, "--claim", name).exit_code == 0


def _command(*arguments):
    return [sys.executable, "-m", "batchnorm", *map(str, arguments)]


def test_version_and_help():
    assert _invoke("--version").output == f"batchnorm {batchnorm.__version__}\n"
    assert _invoke("--help").exit_code == 0
    assert "--report-only" in _invoke("study", "--help").output


def test_help_imports_no_framework():
    code = (
        "import sys, batchnorm.cli.app as cli\n"
        "try: cli.app(['study', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'matplotlib', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_list_names_every_claim(claims):
    assert _invoke("study", "list").output == "quick     first   first title\nquick     second  second title\n"


def test_study_prints_a_line_for_each_verdict_then_the_table_and_the_paths(tmp_path, claims):
    _train_one_by_one(tmp_path / "out")
    result = _invoke("study", "--out", tmp_path / "out")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("● shown      first")
    assert lines[1].startswith("◐ partly     second")
    assert "first title" in result.output
    assert str(tmp_path / "out" / "report.html") in result.output
    assert (tmp_path / "out" / "report.html").exists()


def test_json_is_all_there_is_on_stdout(tmp_path, claims):
    _train_one_by_one(tmp_path / "out")
    result = _invoke("study", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert "first" in result.stderr


def test_claims_and_seeds_are_chosen(tmp_path, claims):
    result = _invoke("study", "--out", tmp_path / "out", "--claim", "second", "--seeds", 2, "--json")
    assert [(one["name"], one["seeds"]) for one in json.loads(result.stdout)["claims"]] == [("second", [0, 1])]


def test_running_again_trains_nothing_anew(tmp_path, monkeypatch):
    runs = []
    _use(monkeypatch, (make_claim(before_run=lambda: runs.append(1)),))
    for _ in range(2):
        assert _invoke("study", "--out", tmp_path / "out").exit_code == 0
    assert len(runs) == 1


def test_report_only_rebuilds_the_same_report(tmp_path, claims):
    _train_one_by_one(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert _invoke("study", "--report-only", tmp_path).exit_code == 0
    assert (tmp_path / "report.html").read_bytes() == first


def test_unknown_claim_names_those_there_are(claims):
    result = _invoke("study", "--claim", "nonsense")
    assert isinstance(result.exception, ArgumentError)
    assert "first, second; got nonsense" in str(result.exception)


def test_report_only_refuses_options_that_would_change_nothing(tmp_path, claims):
    result = _invoke("study", "--report-only", tmp_path, "--seeds", 2)
    assert isinstance(result.exception, ArgumentError)


def test_break_off_keeps_the_finished_claims_and_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    _use(monkeypatch, (make_claim("first"), make_claim("second", before_run=interrupt)))
    assert _invoke("study", "--out", tmp_path, "--claim", "first").exit_code == 0
    result = _invoke("study", "--out", tmp_path, "--json")
    assert result.exit_code == 130
    assert "The same command goes on" in result.stderr
    results = json.loads(result.stdout)
    assert [one["name"] for one in results["claims"]] == ["first"]
    assert results["study"]["unfinished"] == ["second title"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("study", "--claim", "nonsense"), "expected --claim to be one of"),
        (("study", "--out", "."), "holds something else"),
        (("study", "--report-only", "missing"), "train first"),
        (("study", "--seeds", "0"), "--seeds"),
    ],
    ids=["claim", "out", "report-only", "seeds"],
)
def test_user_errors_end_with_a_message_and_status_2(tmp_path, monkeypatch, capsys, claims, arguments, message):
    (tmp_path / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_ctrl_c_then_resume(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        _command(*CLAIM, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (out / "records.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "The same command goes on" in output
    assert "Traceback" not in errors
    assert (out / "report.html").exists()
    again = subprocess.run(
        _command(*CLAIM, "--jobs", "1", "--out", out, "--json"), capture_output=True, text=True, check=True
    )
    assert [one["name"] for one in json.loads(again.stdout)["claims"]] == ["feature_scaling"]
