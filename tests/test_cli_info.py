from __future__ import annotations

from typer.testing import CliRunner

from batchnorm.cli.app import app
from batchnorm.kernels import dispatch


def test_info_names_backend_and_core():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert "torch" in result.output
    assert dispatch.get_backend() in result.output
    assert "cpu core" in result.output


def test_info_without_the_core(monkeypatch):
    monkeypatch.setattr(dispatch, "_cpu", None)
    monkeypatch.setattr(dispatch, "_why_no_cpu", "No module named '_cpu'")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert "not there: No module named '_cpu'. Install a C++17 compiler" in result.output
