"""The sequential reading in one pass: the same statistics as a pass for each layer, or the passes themselves."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import batchnorm
from batchnorm import DecorrelatedBatchNorm, recalibrate
from batchnorm.recalibration import lockstep
from batchnorm.recalibration.memory import _of_container, _of_system, free_bytes

F64 = torch.float64


class _Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norms = nn.ModuleList([norm(4), norm(4), norm(4)])

    def forward(self, x):
        y = self.norms[0](self.first(x)).relu_()
        return self.norms[2](x + self.norms[1](self.second(y)))


class _Stateful(_Residual):
    """Keeps something in itself from one layer to the next: two forwards in turn would mix it up."""

    def forward(self, x):
        self.kept = self.norms[0](self.first(x)).relu()
        y = self.norms[1](self.second(x))
        return self.norms[2](y + self.kept)


class _Twice(_Residual):
    def forward(self, x):
        return self.norms[0](self.second(self.norms[0](self.first(x)).relu()))


def _made(kind, norm=nn.BatchNorm1d):
    torch.manual_seed(2)
    return kind(norm).double()


def _batches(sizes=(9, 1, 7, 0, 16)):
    return torch.randn(sum(sizes), 4, dtype=F64, generator=torch.Generator().manual_seed(8)).split(sizes)


def _threads():
    return [thread for thread in threading.enumerate() if thread.name == "recalibrate"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d, nn.SyncBatchNorm, DecorrelatedBatchNorm])
@pytest.mark.parametrize("estimator", ["population", "mean_of_batches", "moving_average"])
def test_one_pass_gives_what_a_pass_for_each_layer_gives(norm, estimator):
    one, many = _made(_Residual, norm), _made(_Residual, norm)
    batches = _batches((9, 2, 7, 16))
    reports = [
        recalibrate(model, batches, estimator=estimator, memory=memory) for model, memory in ((one, None), (many, 0))
    ]
    assert [report.passes for report in reports] == [1, 3]
    assert [report.why_passes for report in reports] == [None, "memory=0"]
    assert reports[0].layers == reports[1].layers
    torch.testing.assert_close(one.state_dict(), many.state_dict(), rtol=1e-12, atol=1e-12)
    assert not _threads()


def test_each_batch_is_computed_once():
    model, seen = _made(_Residual), []

    def forward(model, batch):
        seen.append(len(batch))
        model(batch)

    recalibrate(model, _batches(), forward=forward)
    assert seen == [9, 1, 7, 0, 16]


@pytest.mark.parametrize(
    ("kind", "why"), [(_Stateful, "keeps something in its modules"), (_Twice, "or through one of them twice")]
)
def test_models_whose_forwards_cannot_wait_get_a_pass_for_each_layer(kind, why):
    model, alone = _made(kind), _made(kind)
    report = recalibrate(model, _batches())
    recalibrate(alone, _batches(), memory=0)
    assert report.passes > 1
    assert why in report.why_passes
    assert f"a pass for each layer, as {report.why_passes}" in str(report)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_more_activations_than_fit_get_a_pass_for_each_layer(monkeypatch):
    batches = _batches()
    report = recalibrate(_made(_Residual), batches, memory=lockstep._LIVE * 33 * 4 * 8)
    assert report.passes == 1
    report = recalibrate(_made(_Residual), batches, memory=lockstep._LIVE * 33 * 4 * 8 - 1)
    assert report.passes == 3
    assert "the activations of all batches take more than" in report.why_passes
    monkeypatch.setattr(lockstep, "_MOST_THREADS", 4)
    assert "more than 4 threads" in recalibrate(_made(_Residual), batches).why_passes


def test_modes_that_other_threads_do_not_know_are_respected():
    with FlopCounterMode(display=False) as mode:
        report = recalibrate(_made(_Residual), _batches())
    assert report.passes == 3
    assert mode.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):  # goes with the forwards
        model = _made(_Residual).float()
        seen = []
        model.first.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        assert recalibrate(model, [batch.float() for batch in _batches()]).passes == 1
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_others_wait_ends_them(stop):
    model = _made(_Residual)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def fail(module, args):
        seen.append(module)
        if len(seen) == 7:  # the second batch, behind the first layer
            raise stop("in the middle")

    handle = model.second.register_forward_pre_hook(fail)
    with pytest.raises(stop, match="in the middle"):
        recalibrate(model, [*_batches(), *_batches()])
    handle.remove()
    assert not _threads()
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_free_memory(tmp_path):
    assert free_bytes(torch.device("cpu")) > 0
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    assert _of_system(tmp_path / "meminfo") == 5 * 1024
    assert _of_system(tmp_path / "absent") is None
    assert _of_container(tmp_path) is None
    (tmp_path / "memory.current").write_text("30\n")
    (tmp_path / "memory.max").write_text("100\n")
    assert _of_container(tmp_path) == 70
    (tmp_path / "memory.max").write_text("max\n")
    assert _of_container(tmp_path) is None
