"""`batchnorm recalibrate`: from weights and data to a new file, or to a message and status 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from typer.testing import CliRunner

from batchnorm.cli.app import app
from batchnorm.errors import ArgumentError

SOURCE = """
import torch


def model():
    torch.manual_seed(0)
    first = torch.nn.Linear(3, 3)
    return torch.nn.Sequential(first, torch.nn.BatchNorm1d(3), first, torch.nn.BatchNorm1d(3))


def data():
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(50, 3) * 3 + 1), batch_size=8)


def dicts():
    return [{"x": batch} for (batch,) in data()]


def on_dict(model, batch):
    return model(batch["x"])


def empty():
    return []


def broken():
    raise RuntimeError("inside the factory")


number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    sys.modules.pop("mine", None)
    model = _mine().model()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    safetensors.torch.save_model(model, str(tmp_path / "w.safetensors"), metadata={"epoch": "7"})
    yield tmp_path
    sys.modules.pop("mine", None)


def _mine():
    import importlib

    importlib.invalidate_caches()
    return importlib.import_module("mine")


def _invoke(*arguments, model="mine:model", weights="w.pt", data="mine:data", out="new.pt"):
    options = [model, "--weights", weights, "--data", data, "--out", out, *arguments]
    return CliRunner().invoke(app, ["recalibrate", *options])


def _expected():
    from batchnorm import recalibrate

    model = _mine().model()
    recalibrate(model, _mine().data())
    return model.state_dict()


def test_pt(folder):
    result = _invoke()
    assert result.exit_code == 0, result.output
    assert "2 layers recalibrated, 0 left alone: population, sequential reading, 7 batches, 1 pass" in result.output
    again = _invoke("--memory", "0", out="again.pt")
    assert "2 passes" in again.output
    torch.testing.assert_close(torch.load("again.pt", weights_only=True), torch.load("new.pt", weights_only=True))
    (folder / "again.pt").unlink()
    new = torch.load("new.pt", weights_only=True)
    torch.testing.assert_close(new, dict(_expected()))
    assert not torch.equal(new["1.running_mean"], torch.load("w.pt", weights_only=True)["1.running_mean"])
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"mine.py", "new.pt", "w.pt", "w.safetensors"}


def test_safetensors_keeps_names_other_tensors_and_metadata(folder):
    result = _invoke("--reading", "batch", weights="w.safetensors", out="new.safetensors")
    assert result.exit_code == 0, result.output
    old, new = (safetensors.torch.load_file(name) for name in ("w.safetensors", "new.safetensors"))
    assert list(old) == list(new)
    changed = sorted(name for name in old if not torch.equal(old[name], new[name]))
    assert changed == [f"{n}.{what}" for n in "13" for what in ("num_batches_tracked", "running_mean", "running_var")]
    with safetensors.safe_open("new.safetensors", "pt") as opened:
        assert opened.metadata()["epoch"] == "7"


def test_json_and_options(folder):
    arguments = ["--layer", "3", "--estimator", "mean_of_batches", "--max-batches", "4", "--forward", "mine:on_dict"]
    result = _invoke("--json", *arguments, data="mine:dicts", out="new.safetensors")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [one["name"] for one in report["layers"]] == ["3"]
    assert (report["estimator"], report["batches"], report["out"]) == ("mean_of_batches", 4, "new.safetensors")


def test_an_existing_file_is_overwritten_with_force_only(folder):
    (folder / "new.pt").write_text("mine")
    assert "new.pt exists: pass --force" in str(_invoke().exception)
    assert (folder / "new.pt").read_text() == "mine"
    assert _invoke("--force").exit_code == 0
    torch.load("new.pt", weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": "mine"}, "MODEL must be package.module:name, got 'mine'"),
        ({"model": "absent.one:model"}, "MODEL: no module named 'absent'"),
        ({"model": "mine:resnet"}, "MODEL: module mine has no 'resnet'"),
        ({"model": "mine:number"}, "MODEL: mine:number must be callable, got int"),
        ({"model": "mine:empty"}, "mine:empty must give a torch.nn.Module, got list"),
        ({"data": "mine:nothing"}, "--data: module mine has no 'nothing'"),
        ({"data": "mine:empty"}, "no batches came"),
        ({"data": "mine:number"}, "must be callable"),
        ({"weights": "absent.pt"}, "absent.pt is no file"),
        ({"weights": "mine.py"}, r"expected a file named \*.safetensors, \*.pt, \*.pth; got mine.py"),
        ({"weights": "text.pt"}, "text.pt cannot be read with weights_only=True"),
        ({"weights": "text.safetensors"}, "text.safetensors is no safetensors file"),
        ({"weights": "code.pt"}, "code.pt cannot be read with weights_only=True"),
        ({"weights": "list.pt"}, "list.pt holds no state_dict"),
        ({"weights": "other.pt"}, "other.pt does not go with the model. Missing: 0.weight"),
        ({"weights": "wide.pt"}, "wide.pt does not go with the model: .*size mismatch"),
        ({"out": "new.bin"}, "expected a file named"),
        ({"out": "nowhere/new.pt"}, "the folder of --out, nowhere, does not exist"),
    ],
)
def test_bad_input_is_status_2_and_writes_nothing(folder, arguments, match):
    (folder / "text.pt").write_text("text")
    (folder / "text.safetensors").write_text("text")
    torch.save(_mine().model(), "code.pt")
    torch.save([1], "list.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    torch.save({key: value.new_zeros(9) for key, value in _mine().model().state_dict().items()}, "wide.pt")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ArgumentError, match=f"(?s){match}"):
        raise _invoke(**arguments).exception
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_error_in_the_users_module_keeps_its_traceback(folder):
    with pytest.raises(RuntimeError, match="inside the factory"):
        raise _invoke(data="mine:broken").exception
    assert not (folder / "new.pt").exists()


def test_as_a_process_from_the_users_folder(folder):
    command = [sys.executable, "-m", "batchnorm", "recalibrate", "mine:model", "--weights", "w.pt"]
    done = subprocess.run(
        [*command, "--data", "mine:empty", "--out", "new.pt"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: no batches came")
    assert not (folder / "new.pt").exists()
