"""The sequential reading in one pass: the same statistics as a pass for each layer, or the passes themselves."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import batchnorm
from batchnorm import DecorrelatedBatchNorm, recalibrate
from batchnorm.recalibration import lockstep
from batchnorm.recalibration.chain import Steps
from batchnorm.recalibration.memory import _of_container, _of_system, free_bytes
from batchnorm.stats.moments import Moments

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


class _Inside(_Residual):
    """Goes from the first layer to the last in what `mode` switches on."""

    def __init__(self, norm):
        super().__init__(norm)
        self.seen = []

    def forward(self, x):
        x = self.first(x)
        with self.mode():
            y = self.second(self.norms[0](x).relu())
            self.norms[1](y)
        return self.norms[2](self.second(x))

    @contextlib.contextmanager
    def mode(self):
        yield


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
    for now, then in zip(reports[0].layers, reports[1].layers, strict=True):
        assert (now.name, now.count, now.batches) == (then.name, then.count, then.batches)
        assert (now.mean_shift, now.var_ratio) == pytest.approx((then.mean_shift, then.var_ratio), rel=1e-9)
    torch.testing.assert_close(one.state_dict(), many.state_dict(), rtol=1e-12, atol=1e-12)


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
    monkeypatch.setattr(lockstep, "free_bytes", lambda device: 0)
    assert recalibrate(_made(_Residual), batches).passes == 1  # so little is always there
    monkeypatch.setattr(lockstep, "_LITTLE", 0)
    assert "more than the 0.0 GB" in recalibrate(_made(_Residual), batches).why_passes


def test_modes_of_the_caller_are_those_of_the_forwards():
    with FlopCounterMode(display=False) as plain:
        for batch in _batches():
            _made(_Residual).eval()(batch)
    with FlopCounterMode(display=False) as mode:
        report = recalibrate(_made(_Residual), _batches())
    assert report.passes == 1
    assert mode.get_total_flops() == plain.get_total_flops() > 0
    model = _made(_Residual)
    with torch.inference_mode():
        assert recalibrate(model, _batches()).passes == 1
        made_inside = _made(_Residual)
        assert recalibrate(made_inside, _batches()).passes == 1
    torch.testing.assert_close(model.state_dict(), dict(made_inside.state_dict()), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        model = _made(_Residual).float()
        seen = []
        model.first.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        assert recalibrate(model, [batch.float() for batch in _batches()]).passes == 1
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("mode", "ask", "inside"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.is_autocast_enabled("cpu"), True),
        (torch.enable_grad, torch.is_grad_enabled, True),
    ],
)
def test_a_mode_within_a_forward_is_that_forwards_alone(mode, ask, inside):
    model, alone = _made(_Inside).float(), _made(_Inside).float()
    seen = {"first": [], "second": []}
    for one in (model, alone):
        one.mode = mode
        for name, answers in seen.items():
            getattr(one, name).register_forward_hook(lambda *_, answers=answers: answers.append(ask()))
    batches = [batch.float() for batch in _batches((9, 2, 7, 16))]
    report = recalibrate(model, batches)
    assert report.passes == 1
    assert seen["first"] == [not inside] * 4
    assert seen["second"] == [inside] * 4 + [not inside] * 4
    recalibrate(alone, batches, memory=0)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-6, atol=1e-6)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("mode", [torch.inference_mode, BaseTorchFunctionMode])
def test_modes_that_cannot_be_left_in_the_middle_get_a_pass_for_each_layer(mode):
    model, alone = _made(_Inside), _made(_Inside)
    model.mode = alone.mode = mode
    report = recalibrate(model, _batches())
    assert report.why_passes == "a mode of torch is switched on during a forward"
    recalibrate(alone, _batches(), memory=0)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert not torch.is_inference_mode_enabled()
    assert torch._C._len_torch_function_stack() == 0


def test_layers_that_run_in_a_thread_get_a_pass_for_each_layer():
    model = _made(_Residual)

    def forward(model, batch):
        with ThreadPoolExecutor() as pool:
            return pool.submit(torch.no_grad()(model), batch).result()

    report = recalibrate(model, _batches((9, 2)), forward=forward)
    assert report.why_passes == "a forward goes through a layer in a thread of its own"
    alone = _made(_Residual)
    recalibrate(alone, _batches((9, 2)))
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-12, atol=1e-12)


def test_functional_call_as_the_forward_leaves_its_weights_in_the_model():
    model, averaged = _made(_Residual), _made(_Residual)
    before = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(1.5)
    weights = dict(averaged.named_parameters())
    recalibrate(model, _batches(), forward=lambda model, x: torch.func.functional_call(model, weights, x))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    recalibrate(averaged, _batches())
    torch.testing.assert_close(dict(model.named_buffers()), dict(averaged.named_buffers()), rtol=1e-12, atol=1e-12)


def test_small_batches_are_gone_through_together_and_others_one_by_one(monkeypatch):
    batches = [torch.randn(5, 4, 3, dtype=F64), torch.randn(2, 4, 7, dtype=F64), torch.randn(3, 4, 7, dtype=F64)]
    whole = Moments.merge(*(Moments.of(batch, (0, 2)) for batch in batches))
    for small, chosen in ((lockstep._SMALL, batches), (batches[1].nbytes, batches), (0, batches), (0, batches[1:])):
        monkeypatch.setattr(lockstep, "_SMALL", small)
        expected = whole if chosen is batches else Moments.merge(*(Moments.of(batch, (0, 2)) for batch in chosen))
        layer = nn.BatchNorm1d(4).double()
        report = recalibrate(layer, chosen)
        torch.testing.assert_close(layer.running_mean, expected.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, expected.unbiased_var, rtol=1e-12, atol=1e-12)
        assert (report.layers[0].count, report.layers[0].batches) == (expected.count, len(chosen))


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
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class _Scaled(nn.Module):
    """A class that nobody knows."""

    def forward(self, x):
        return x * 1.5 + 0.25


def _chain(norm=nn.BatchNorm1d, kind=nn.Hardtanh):
    torch.manual_seed(2)
    shared = nn.Linear(4, 4)
    inner = nn.Sequential(norm(4), nn.Sequential(kind(), shared, norm(4)), nn.ReLU(inplace=True))
    return nn.Sequential(shared, inner, nn.Dropout(), shared, norm(4), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d, DecorrelatedBatchNorm])
@pytest.mark.parametrize("estimator", ["population", "moving_average"])
def test_a_chain_waits_between_its_modules_and_gives_the_same(norm, estimator, monkeypatch):
    taken = []
    monkeypatch.setattr(lockstep, "Steps", lambda *parts: taken.append(1) or Steps(*parts))
    models = [_chain(norm) for _ in range(3)]
    batches = _batches((9, 2, 7, 16))
    forwards = {"forward": lambda model, batch: model(batch)}  # one that recalibrate does not know: it waits inside
    reports = [
        recalibrate(model, batches, estimator=estimator, **arguments)
        for model, arguments in zip(models, ({}, forwards, {"memory": 0}), strict=True)
    ]
    assert len(taken) == len(batches)
    assert [report.passes for report in reports] == [1, 1, 3]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(models[0].state_dict(), models[2].state_dict(), rtol=1e-12, atol=1e-12)


def test_what_lies_behind_the_last_layer_of_a_chain_is_not_computed(monkeypatch):
    model, batches = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), _batches()
    model, called = model.double(), []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or x @ self.weight.T + self.bias)
    recalibrate(model, batches)
    assert called == [model[0]] * len(batches)
    called.clear()
    model[1].reset_running_stats()
    assert recalibrate(model, batches, reading="batch").batches == len(batches)
    assert called == [model[0], model[3]] * len(batches)


def test_a_chain_with_classes_that_nobody_knows_waits_inside(monkeypatch):
    monkeypatch.setattr(lockstep, "Steps", None)
    models = [_chain(kind=_Scaled), _chain(kind=_Scaled)]
    reports = [recalibrate(model, _batches(), memory=memory) for model, memory in zip(models, (None, 0), strict=True)]
    assert [report.passes for report in reports] == [1, 3]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["1", "1.0"])
def test_what_the_hooks_of_a_chain_change_is_what_the_layer_gets(place):
    models = [_chain(), _chain()]
    for model in models:
        model.get_submodule(place).register_forward_pre_hook(lambda module, args: (args[0] + 3,))
    reports = [recalibrate(model, _batches(), memory=memory) for model, memory in zip(models, (None, 0), strict=True)]
    assert [report.passes for report in reports] == [1, 3]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-12)
    plain = _chain()
    recalibrate(plain, _batches())
    assert (models[0][1][0].running_mean - plain[1][0].running_mean - 3).abs().max() < 1e-12


def test_a_chain_that_uses_a_layer_twice_gets_a_pass_for_each_call():
    layer = nn.BatchNorm1d(4).double()
    report = recalibrate(nn.Sequential(layer, nn.Linear(4, 4).double(), layer), _batches())
    assert "or through one of them twice" in report.why_passes


def test_an_error_within_a_chain_changes_nothing():
    model = _chain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        recalibrate(model, [*_batches(), torch.randn(3, 5, dtype=F64)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("reading", ["sequential", "batch"])
def test_a_layers_own_forward_is_called_and_put_back(reading):
    model, calls = _made(_Residual), []
    layer = model.norms[1]

    def own(x):
        calls.append(len(x))
        return type(layer).forward(layer, x)

    layer.forward = own
    model.first.forward = lambda x: nn.Linear.forward(model.first, model.norms[0].forward(x))  # no __call__
    report = recalibrate(model, _batches((9, 2)), reading=reading)
    assert calls == [9, 2] * (len(calls) // 2)
    assert layer.forward is own
    assert "forward" not in vars(model.norms[2])
    assert next(change for change in report.layers if change.name == "norms.0").batches == 4


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
