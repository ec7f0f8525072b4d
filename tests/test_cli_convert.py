"""`batchnorm convert`: from a factory and weights to a new file, or to a message and a status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from typer.testing import CliRunner

from batchnorm import convert
from batchnorm.cli.app import app
from batchnorm.errors import ArgumentError
from batchnorm.surgery import building

SOURCE = """
import torch


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))


def half():
    return model().bfloat16()


def two():
    return Two()


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x, y):
        return self.norm(x) + y


def example():
    return {"x": torch.randn(4, 3), "y": torch.randn(4, 3)}


def no_model():
    return []


def linear():
    return torch.nn.Linear(2, 2)


def broken():
    raise RuntimeError("inside the factory")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "nets.py").write_text(SOURCE)
    sys.modules.pop("nets", None)
    model = _nets().model()
    with torch.no_grad():
        model[1].running_mean.normal_()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    safetensors.torch.save_model(model, str(tmp_path / "w.safetensors"), metadata={"epoch": "7"})
    yield tmp_path
    sys.modules.pop("nets", None)


def _nets():
    import importlib

    importlib.invalidate_caches()
    return importlib.import_module("nets")


def _invoke(*arguments, model="nets:model"):
    return CliRunner().invoke(app, ["convert", model, *arguments])


def _names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def test_weights_go_through_and_the_metadata_too(folder):
    result = _invoke("--weights", "w.safetensors", "-o", "new.safetensors", "--example", "2x3x8x8")
    assert result.exit_code == 0, result.output
    assert "convert: 2 changed, 0 left alone" in result.output
    assert "verified: largest difference" in result.output
    assert "Written: new.safetensors" in result.output
    old, new = (safetensors.torch.load_file(name) for name in ("w.safetensors", "new.safetensors"))
    torch.testing.assert_close(new, old, rtol=0, atol=0)
    with safetensors.safe_open("new.safetensors", "pt") as opened:
        assert opened.metadata()["epoch"] == "7"
    assert _names(folder) == ["nets.py", "new.safetensors", "w.pt", "w.safetensors"]


def test_another_kind_of_layer_has_another_state(folder):
    result = _invoke("--weights", "w.pt", "-o", "new.pt", "--to", "group", "--num-groups", "2", "--layer", "1")
    assert result.exit_code == 0, result.output
    assert "torch.nn.GroupNorm, 2 groups of 2 channels" in result.output
    model, _ = convert(_nets().model(), "group", num_groups=2, layers="1")
    model.load_state_dict(torch.load("new.pt", weights_only=True))


def test_json(folder):
    result = _invoke("-o", "new.pt", "--json", "--to", "ghost", "--ghost-size", "8")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["agreement"]["holds"] is True
    assert [one["what"] for one in report["changed"]] == ["torch.nn.BatchNorm2d -> GhostBatchNorm"] * 2
    assert report["out"] == "new.pt"


def test_examples_of_several_inputs_from_sizes_and_from_a_factory(folder):
    for example in ("4x3,4x3", "nets:example"):
        result = _invoke("-o", "new.pt", "--force", "--example", example, model="nets:two")
        assert result.exit_code == 0, result.output
        assert "2 inputs" in result.output


def test_an_example_has_the_dtype_of_the_model(folder):
    result = _invoke("-o", "new.pt", "--example", "2x3x8x8", model="nets:half")
    assert result.exit_code == 0, result.output
    assert "its running statistics are float32 now" in result.output


def test_not_equal_is_status_1_and_nothing_is_written(folder, monkeypatch):
    settings_of = building.settings_of
    monkeypatch.setattr(building, "settings_of", lambda fresh: {**settings_of(fresh), "eps": 0.1})
    before = _names(folder)
    result = _invoke("-o", "new.pt", "--example", "2x3x8x8")
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.output
    assert "Not written: new.pt, as the outputs differ" in result.output
    result = _invoke("-o", "new.pt", "--json")
    assert (result.exit_code, json.loads(result.stdout)["out"]) == (1, None)
    assert _names(folder) == before


def test_an_existing_file_is_overwritten_with_force_only(folder):
    (folder / "new.pt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"new.pt exists: pass --force"):
        raise _invoke("-o", "new.pt").exception
    assert (folder / "new.pt").read_text() == "mine"
    assert _invoke("-o", "new.pt", "--force").exit_code == 0
    torch.load("new.pt", weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": "nets"}, "MODEL must be package.module:name"),
        ({"model": "nets:no_model"}, "nets:no_model must give a torch.nn.Module, got list"),
        ({"model": "nets:linear"}, "Linear has no batch normalization layer"),
        ({"weights": "absent.pt"}, "absent.pt is no file"),
        ({"weights": "text.pt"}, "text.pt cannot be read with weights_only=True"),
        ({"weights": "half.safetensors"}, "half.safetensors is no safetensors file"),
        ({"weights": "other.pt"}, "other.pt does not go with the model"),
        ({"out": "new.bin"}, "--out: expected a file named"),
        ({"out": "nowhere/new.pt"}, "the folder of --out, nowhere, does not exist"),
        ({"example": "2x3xq"}, "--example must be sizes as 1x3x224x224 or package.module:factory, got '2x3xq'"),
        ({"example": "2x5x8x8"}, "the model cannot be run on the example"),
        ({"example": "nets:absent"}, "--example: module nets has no 'absent'"),
        ({"layer": "9"}, "'9' is or contains no batch normalization layer"),
        ({"ghost-size": "4"}, "ghost_size goes with to='ghost' only"),
    ],
)
def test_bad_input_writes_nothing(folder, arguments, match):
    (folder / "text.pt").write_text("text")
    (folder / "half.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:-40])
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    before = _names(folder)
    options = {"out": "new.pt", **arguments}
    model = options.pop("model", "nets:model")
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    with pytest.raises(ArgumentError, match=f"(?s){match}"):
        raise _invoke(*given, model=model).exception
    assert _names(folder) == before


def test_an_error_in_the_users_module_keeps_its_traceback(folder):
    with pytest.raises(RuntimeError, match="inside the factory"):
        raise _invoke("-o", "new.pt", model="nets:broken").exception


def test_as_a_process_bad_input_is_status_2(folder):
    command = [sys.executable, "-m", "batchnorm", "convert", "nets:linear", "-o", "new.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: Linear has no batch normalization layer")
    assert not (folder / "new.pt").exists()
