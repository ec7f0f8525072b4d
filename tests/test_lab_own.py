"""Your own network in the study: what stands in for its normalization, what is refused, the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from batchnorm import BatchNorm2d
from batchnorm.cli.app import app, main
from batchnorm.errors import ArgumentError
from batchnorm.lab.claims import CLAIMS, own_batches, own_landscape, own_rates, own_statistics
from batchnorm.lab.config import OwnNetwork
from batchnorm.lab.own import build_own

OURS = [claim for claim in CLAIMS if claim.CARD.tier == "network"]
SHAPE = (1, 8, 8)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        BatchNorm2d(8, activation="relu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def without_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def of_other_size() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.BatchNorm1d(4))


def of_two_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.BatchNorm1d(2))


def no_network() -> int:
    return 3


def spec(name: str) -> str:
    return f"{__name__}:{name}"


def test_the_arms_differ_in_normalization_alone() -> None:
    own, without, group = (
        build_own(OwnNetwork(spec("small"), norm), SHAPE, 3, seed=5) for norm in ("own", "none", "group")
    )  # type: ignore[arg-type]
    for other in (without, group):
        assert torch.equal(own[0].weight, other[0].weight)
        assert torch.equal(own[3].weight, other[3].weight)
    x = torch.randn(4, *SHAPE)
    before = torch.relu(without[0](x))
    assert torch.equal(without[:3](x), before)  # a shift of 0 at first
    assert torch.equal(without[3:5](before), torch.relu(without[3](before)))  # the fused activation stays
    expected = torch.relu(nn.functional.group_norm(group[3](before), 8))
    assert torch.allclose(group[3:5](before), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without_batch_norm", "without batch normalization layers"),
        ("of_other_size", r"does not take images of shape \(1, 8, 8\)"),
        ("of_two_classes", r"must give logits \(images, 3 classes or more\), got \(2, 2\)"),
        ("no_network", "must make a torch.nn.Module, got int"),
        ("absent", "has no 'absent'"),
    ],
)
def test_networks_that_do_not_fit_are_refused(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_own(OwnNetwork(spec(name)), SHAPE, 3, seed=0)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of images that differ in a stripe; the command's cache and output go beside them."""
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    y = np.arange(120) % 3
    x = np.random.default_rng(0).integers(0, 120, (120, 8, 8)).astype(np.uint8)
    x[np.arange(120), y] += 120
    np.savez(tmp_path / "mine.npz", train_x=x[:90], train_y=y[:90], test_x=x[90:], test_y=y[90:])
    return tmp_path / "mine.npz"


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    for claim in (own_rates, own_statistics, own_landscape):
        monkeypatch.setattr(claim, "STEPS", 4)
        monkeypatch.setattr(claim, "BATCH", 16)
        monkeypatch.setattr(claim, "RATES", (0.03, 0.1))
    monkeypatch.setattr(own_statistics, "LOOKS", (2, 4))
    monkeypatch.setattr(own_batches, "SIZES", (2, 8, 16))
    monkeypatch.setattr(own_batches, "LARGE", 16)
    monkeypatch.setattr(own_batches, "SEEN", 32)


def test_the_command_measures_your_network(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    arguments = ["study", spec("small"), "--data", str(data), "--out", "found", "--seeds", "2", "--jobs", "1", "--json"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    results = json.loads(ended.stdout)
    assert [claim["name"] for claim in results["claims"]] == [claim.CARD.name for claim in OURS]
    assert results["data"][0]["name"] == "mine"
    assert str(data.parent) not in json.dumps(results)
    again = CliRunner().invoke(app, ["study", "--report-only", "found", "--json"])
    assert json.loads(again.stdout)["claims"] == results["claims"]


def test_the_command_refuses_before_it_trains(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["batchnorm", "study", spec("without_batch_norm"), "--data", str(data)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "without batch normalization layers" in capsys.readouterr().err
    assert not Path("study-network").exists()
