"""export_onnx(): files that onnxruntime computes alike, and no other files."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_fold import settled
from torch import nn

import batchnorm
from batchnorm import export_onnx
from batchnorm.errors import ArgumentError

# Of the exporter's own making, in torch's and onnxscript's code.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def network(norm):
    # BN first: no exporter folds it into anything.
    return settled(nn.Sequential(norm, nn.Sigmoid(), nn.Conv2d(4, 5, 3)))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        batchnorm.BatchNorm2d(4),
        batchnorm.SyncBatchNorm(4),
        batchnorm.GhostBatchNorm(4),
        batchnorm.BatchRenorm(4),
        batchnorm.FrozenBatchNorm(4),
    ],
    ids=lambda norm: f"{type(norm).__module__.split('.')[0]}.{type(norm).__name__}",
)
def test_layers_become_the_standard_operator(tmp_path, norm):
    model, path = network(norm), tmp_path / "model.onnx"
    report = export_onnx(model, torch.randn(2, 4, 6, 6), path)
    assert report.agreement.holds
    assert "1 of them BatchNormalization" in report.changed[0].what
    assert [node.op_type for node in onnx.load(str(path)).graph.node] == ["BatchNormalization", "Sigmoid", "Conv"]
    x = torch.randn(2, 4, 6, 6)
    (output,) = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_open_batch_axis_and_other_opset(tmp_path):
    path = tmp_path / "model.onnx"
    report = export_onnx(network(nn.BatchNorm2d(4)), torch.randn(1, 4, 6, 6), path, dynamic_batch=True, opset=20)
    assert report.agreement.holds
    assert report.agreement.inputs == 5
    session = onnxruntime.InferenceSession(str(path))
    for size in (1, 2, 7):
        assert session.run(None, {"input": np.zeros((size, 4, 6, 6), np.float32)})[0].shape == (size, 5, 4, 4)
    assert onnx.load(str(path)).opset_import[0].version == 20


def test_training_mode_is_refused(tmp_path):
    model = network(nn.BatchNorm2d(4))
    model[0].train()
    with pytest.raises(ArgumentError, match=r"the model is in training mode \(0\), in which .* call model.eval\(\)"):
        export_onnx(model, torch.randn(2, 4, 6, 6), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_layers_without_statistics_are_refused(tmp_path):
    model = network(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ArgumentError, match="0 keeps no running statistics and uses those of each batch"):
        export_onnx(model, torch.randn(2, 4, 6, 6), tmp_path / "model.onnx")


def test_outputs_that_differ_leave_no_file(tmp_path, monkeypatch):
    from batchnorm.surgery import exporting

    program = exporting._program

    def wrong(model, *args, **kwargs):
        with torch.no_grad():
            model[2].bias += 1
        made = program(model, *args, **kwargs)
        return made

    monkeypatch.setattr(exporting, "_program", wrong)
    report = export_onnx(network(nn.BatchNorm2d(4)), torch.randn(2, 4, 6, 6), tmp_path / "model.onnx")
    assert not report.agreement.holds
    assert report.changed == ()
    assert "nothing was written" in str(report)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_leaves_no_file(tmp_path):
    class Choosing(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ArgumentError, match="torch cannot export the model"):
        export_onnx(Choosing().eval(), torch.randn(2, 4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stays(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ArgumentError, match=r"exists: pass force=True"):
        export_onnx(network(nn.BatchNorm2d(4)), torch.randn(2, 4, 6, 6), path)
    assert path.read_text() == "mine"


def test_no_model(tmp_path):
    with pytest.raises(ArgumentError, match=r"model must be a torch.nn.Module, got int"):
        export_onnx(3, torch.randn(2), tmp_path / "model.onnx")
