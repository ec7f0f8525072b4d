"""`batchnorm fold`, `fuse` and `export`: files in, files out, or a message and status 2."""

from __future__ import annotations

import json
import sys

import onnx
import pytest
import torch
from typer.testing import CliRunner

from batchnorm.cli.app import app
from batchnorm.errors import ArgumentError

SOURCE = """
import torch


def model():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    torch.nn.init.normal_(norm.bias)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norm, torch.nn.ReLU())


class Nosy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x))) + (type(self.norm) is torch.nn.BatchNorm2d)


def example():
    return torch.ones(2, 3, 6, 6)
"""
EXAMPLE = ("--example", "2x3x6x6")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "mine_deploy.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("mine_deploy", None)


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("mine_deploy.py", "__pycache__"))


def test_fold_a_network(folder):
    result = invoke("fold", "mine_deploy:model", *EXAMPLE, "-o", "new.safetensors", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["changed"][0]["what"] == "torch.nn.BatchNorm2d -> Conv2d"
    assert report["agreement"]["holds"] is True
    assert report["out"] == "new.safetensors"
    assert files(folder) == ["new.safetensors"]


def test_fuse_a_network(folder):
    result = invoke("fuse", "mine_deploy:model", "--example", "mine_deploy:example", "-o", "new.pt")
    assert result.exit_code == 0, result.output
    assert "1: torch.nn.BatchNorm2d -> BatchNorm2d + relu (Sequential as it is)" in result.output
    assert set(torch.load("new.pt", weights_only=True)) >= {"0.weight", "1.running_mean"}


@pytest.mark.filterwarnings("ignore")  # of the exporter's own making, in torch's and onnxscript's code
def test_export_and_fold_the_file(folder):
    result = invoke("export", "mine_deploy:model", *EXAMPLE, "-o", "model.onnx")
    assert result.exit_code == 0, result.output
    node = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    weights = {"w": torch.randn(2, 3, 1, 1), **{name: torch.rand(2) + 0.5 for name in "gbmv"}}
    graph = onnx.helper.make_graph(
        [node("Conv", ["x", "w"], ["a"]), node("BatchNormalization", ["a", *"gbmv"], ["y"], "bn")],
        "g",
        [value("x", 1, ["n", 3, "h", "w"])],
        [value("y", 1, [None] * 4)],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, "in.onnx")
    result = invoke("fold", "in.onnx", "-o", "out.onnx", "--input", "x=2x3x5x5")
    assert result.exit_code == 0, result.output
    assert "bn: BatchNormalization -> Conv" in result.output
    assert [one.op_type for one in onnx.load("out.onnx").graph.node] == ["Conv"]
    assert files(folder) == ["in.onnx", "model.onnx", "out.onnx"]


@pytest.mark.parametrize("command", ["fold", "fuse"])
def test_not_equal_is_status_1_and_writes_nothing(folder, command):
    result = invoke(command, "mine_deploy:Nosy", *EXAMPLE, "-o", "new.pt")
    assert result.exit_code == 1, result.output
    assert "Not written: new.pt, as the outputs differ" in result.output
    assert files(folder) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("fold", "mine_deploy:model", "-o", "new.pt"), "--example is missing"),
        (("fuse", "mine_deploy:model", "-o", "new.pt"), "--example is missing"),
        (("export", "mine_deploy:model", "-o", "new.onnx"), "--example is missing"),
        (("export", "mine_deploy:model", *EXAMPLE, "-o", "new.pt"), r"expected a file named \*.onnx"),
        (("fold", "mine_deploy:model", *EXAMPLE, "-o", "new.onnx"), "expected a file named"),
        (("fold", "mine_deploy:model", "--input", "x=1", "-o", "new.pt"), "--input is for ONNX files"),
        (("fold", "in.onnx", "-o", "new.onnx"), "in.onnx is no file"),
        (("fold", "text.onnx", "-o", "new.onnx"), "text.onnx is no (valid )?ONNX"),
        (("fold", "in.onnx", *EXAMPLE, "-o", "new.onnx"), "an ONNX file has both"),
        (("fold", "in.onnx", "--input", "x", "-o", "new.onnx"), "--input must be NAME=SIZES"),
        (("fold", "text.onnx", "-o", "there.onnx"), "there.onnx exists: pass --force"),
        (("fold", "mine_deploy:model", "--example", "2xx", "-o", "new.pt"), "--example must be sizes"),
    ],
)
def test_bad_input(folder, arguments, match):
    (folder / "text.onnx").write_text("this is text and no model\n")
    (folder / "there.onnx").write_text("mine")
    with pytest.raises(ArgumentError, match=match):
        raise invoke(*arguments).exception
    assert files(folder) == ["text.onnx", "there.onnx"]
