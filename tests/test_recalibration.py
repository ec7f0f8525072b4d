"""recalibrate(): against float64 NumPy over the concatenated activations, whatever the batches; and what it leaves."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import moments
from torch import nn

import batchnorm
from batchnorm import Moments, recalibrate
from batchnorm.errors import ArgumentError, BatchNormError, ShapeError
from batchnorm.layers.observe import input_moments

F64 = torch.float64
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def _deep(norm=nn.BatchNorm1d, seed=0):
    """Three layers deep, with dropout between."""
    torch.manual_seed(seed)
    layers = nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5), norm(5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers, norm(3)).double()


def _inputs_of_layers(model, x):
    """What enters each layer when the model runs in evaluation mode on all of `x` at once."""
    found = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].numpy().copy()))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    model.eval()
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def _unbiased(values, channels=(1,), mask=None):
    mean, var, count = moments(values, channels, mask)
    return mean, var * count / (count - 1)


def _assert_statistics(layer, mean, var, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=rtol, atol=atol)


def _state(model):
    """Everything that recalibrate must put back, apart from the statistics."""
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()],
        [
            (getattr(module, "momentum", None), getattr(module, "track_running_stats", None))
            for module in model.modules()
        ],
        [(name, value.requires_grad) for name, value in model.named_parameters()],
    )


@st.composite
def _splits(draw, rows=60):
    cuts = draw(st.lists(st.integers(0, rows), max_size=12))
    order = draw(st.permutations(range(len(cuts) + 1)))
    return np.diff([0, *sorted(cuts), rows]).tolist(), order


@settings(max_examples=100, deadline=None)
@given(_splits(), st.sampled_from([nn.BatchNorm1d, batchnorm.BatchNorm1d]), st.sampled_from([None, 0]))
def test_population_does_not_depend_on_split_or_order(split, norm, memory):
    """Each layer's statistics are those of one float64 pass over what enters it at inference."""
    sizes, order = split
    x = torch.randn(60, 4, dtype=F64, generator=torch.Generator().manual_seed(3)) * 5 + 2
    parts = x.split(sizes)
    model = _deep(norm)
    report = recalibrate(model, [parts[i] for i in order], memory=memory)
    assert [change.count for change in report.layers] == [60] * 3
    assert report.passes == (1 if memory is None else 3)
    for name, values in _inputs_of_layers(model, x).items():
        _assert_statistics(model.get_submodule(name), *_unbiased(values))


@settings(max_examples=100, deadline=None)
@given(_splits(), st.floats(-1e4, 1e4), st.floats(1e-2, 1e2), st.sampled_from([torch.float32, torch.bfloat16, F64]))
def test_the_moments_of_any_dtype_are_those_of_one_float64_pass(split, mean, std, dtype):
    sizes, order = split
    x = (torch.randn(60, 3, 5, dtype=F64, generator=torch.Generator().manual_seed(4)) * std + mean).to(dtype)
    parts = x.split(sizes)
    layer = nn.BatchNorm1d(3)
    whole = Moments.merge(*(input_moments(layer, (parts[i],), {}) for i in order))
    expected_mean, expected_var, _ = moments(x.double().numpy())
    scale = np.sqrt(expected_var).max() + np.abs(expected_mean).max()
    np.testing.assert_allclose(whole.mean.numpy(), expected_mean, rtol=0, atol=1e-14 * scale)
    # The parts' means are rounded to eps * scale, and the variance has squares of their differences.
    rounding = np.finfo(np.float64).eps * scale
    atol = rounding * (np.sqrt(expected_var).max() + rounding)
    np.testing.assert_allclose(whole.var.numpy(), expected_var, rtol=1e-11, atol=atol)


@pytest.mark.parametrize("shape", [(70, 3, 50, 60), (3, 3, 300, 300), (0, 3, 2, 2), (5, 3, 0, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_of_large_inputs_are_taken_in_parts(shape, layout):
    x = (torch.randn(shape) + 100).contiguous(memory_format=layout)
    mean, var, count = moments(x.double().numpy())
    found = input_moments(nn.BatchNorm2d(3), (x,), {})
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-13)
    np.testing.assert_allclose(found.var.numpy(), var, rtol=1e-11)
    assert found.count == count[0]


def test_the_batch_reading_is_what_training_sees():
    """Deeper layers see activations normalised with their batch; as torch's own layers in training, without dropout."""
    x = torch.randn(24, 4, dtype=F64)
    model, twin = _deep(), _deep()
    twin[3].p = 0.0
    inputs = {name: [] for name in ("1", "5", "8")}
    for name, values in inputs.items():
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, to=values: to.append(args[0].detach()))
    for batch in x.split(7):
        twin(batch)
    report = recalibrate(model, x.split(7), reading="batch")
    assert report.passes == 1
    for name, values in inputs.items():
        _assert_statistics(model.get_submodule(name), *_unbiased(torch.cat(values).numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
@pytest.mark.parametrize(
    ("estimator", "momentum"), [("mean_of_batches", 0.3), ("moving_average", 0.3), ("moving_average", None)]
)
def test_other_estimators_are_those_of_training_loops(norm, estimator, momentum):
    x = torch.randn(30, 3, dtype=F64) + torch.arange(30, dtype=F64)[:, None]
    layer, trained = norm(3, momentum=momentum).double(), nn.BatchNorm1d(3, momentum=momentum).double()
    report = recalibrate(layer, x.split(8), estimator=estimator)
    if estimator == "mean_of_batches":
        trained.momentum = None
    for batch in x.split(8):
        trained(batch)
    _assert_statistics(layer, trained.running_mean, trained.running_var)
    assert (report.layers[0].batches, layer.num_batches_tracked.item(), layer.momentum) == (4, 4, momentum)


def test_update_bn_gives_1_12_where_the_truth_is_9_49():
    """torch.optim.swa_utils.update_bn drops the variance between batch means; sorted data have much of it."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50, 1) + mean for mean in (-4.0, 0.0, 4.0, 2.0, -2.0)])
    model = nn.Sequential(nn.BatchNorm1d(1))
    torch.optim.swa_utils.update_bn(x.split(50), model)
    wrong = model[0].running_var.item()
    recalibrate(model, x.split(50))
    truth = x.double().var().item()
    assert wrong < 1.2 < 8 < truth
    assert model[0].running_var.item() == pytest.approx(truth, rel=1e-6)


def test_update_bn_puts_evaluating_layers_back_into_training_and_overwrites_them():
    model = _deep().train()
    model[5].eval()
    before = copy.deepcopy(model[5].state_dict())
    report = recalibrate(model, torch.randn(40, 4, dtype=F64).split(10))
    assert not model[5].training
    assert model[1].training
    torch.testing.assert_close(model[5].state_dict(), before, rtol=0, atol=0)
    assert [(one.name, one.why) for one in report.skipped] == [
        ("5", "frozen: in evaluation mode while the model trains")
    ]
    assert [one.name for one in report.layers] == ["1", "8"]


def test_a_model_in_evaluation_is_recalibrated_whole():
    model = _deep().eval()
    assert len(recalibrate(model, torch.randn(40, 4, dtype=F64).split(10)).layers) == 3
    assert not any(module.training for module in model.modules())


def test_layers_whose_parameters_are_frozen_are_left_alone_unless_named():
    model = _deep()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    batches = torch.randn(40, 4, dtype=F64).split(10)
    report = recalibrate(model, batches)
    assert [one.why for one in report.skipped] == ["frozen: its parameters have requires_grad=False"]
    assert [one.name for one in recalibrate(model, batches, layers=["1"]).layers] == ["1"]
    for parameter in model.parameters():  # nothing trains: another domain's statistics are wanted for all
        parameter.requires_grad_(False)
    assert not recalibrate(model, batches).skipped


def test_layers_that_freeze_holds_are_left_alone_and_refused_by_name():
    model = _deep()
    batchnorm.freeze(model, layers="5")
    batches = torch.randn(40, 4, dtype=F64).split(10)
    assert [(one.name, one.why) for one in recalibrate(model, batches).skipped] == [("5", "frozen")]
    with pytest.raises(ArgumentError, match="5 is frozen; unfreeze"):
        recalibrate(model, batches, layers="5")
    batchnorm.freeze(model)
    report = recalibrate(model, batches)
    assert (len(report.layers), len(report.skipped), report.passes) == (0, 3, 0)


def test_fvcore_leaves_momentum_1_and_a_hook_behind_when_the_loader_is_short():
    """Shorter than max_batches is fine; too short for a variance is an error, and nothing has changed."""
    model = _deep()
    assert recalibrate(model, [torch.randn(8, 4, dtype=F64)], max_batches=50).batches == 1
    before, state = copy.deepcopy(model.state_dict()), _state(model)
    for batches, error, match in (
        ([], ArgumentError, "no batches came"),
        (iter([]), ArgumentError, "no batches came"),
        ([torch.randn(1, 4, dtype=F64)], ShapeError, "1: .*at least 2 values"),
        ([torch.randn(0, 4, dtype=F64)], ShapeError, "only empty batches"),
    ):
        with pytest.raises(error, match=match):
            recalibrate(model, batches)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert _state(model) == state


@pytest.mark.parametrize(
    ("reading", "memory", "failing"), [("sequential", None, 4), ("sequential", 0, 9), ("batch", None, 4)]
)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_an_error_in_the_middle_puts_everything_back(reading, memory, failing, norm):
    model = _deep(norm).train()
    model[3].eval()
    before, state = copy.deepcopy(model.state_dict()), _state(model)

    def forward(model, batch, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == failing:
            raise RuntimeError("the disk is gone")
        model(batch)

    with pytest.raises(RuntimeError, match="the disk is gone"):
        recalibrate(model, torch.randn(70, 4, dtype=F64).split(10), reading=reading, forward=forward, memory=memory)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert _state(model) == state


def test_interrupted_by_hand_everything_is_put_back():
    model = _deep()
    before, state = copy.deepcopy(model.state_dict()), _state(model)

    def batches():
        yield torch.randn(10, 4, dtype=F64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert _state(model) == state


def test_not_finite_activations_are_refused_by_the_layers_name():
    model = _deep()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(40, 4, dtype=F64)
    x[13, 2] = float("nan")
    with pytest.raises(BatchNormError, match="1: a channel's input has NaN, infinity or an overflow"):
        recalibrate(model, x.split(10))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_random_states_are_kept_and_each_pass_sees_the_same_shuffle():
    x = torch.randn(64, 4, dtype=F64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8, shuffle=True)
    seen = []

    def forward(model, batch):
        seen.append(batch[0])
        np.random.rand(), random.random(), torch.rand(1)  # noqa: NPY002
        model(batch[0])

    model = _deep()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    report = recalibrate(model, loader, forward=forward, max_batches=3, memory=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert (report.batches, report.passes, len(seen)) == (3, 3, 9)
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:6]))


def test_other_modules_keep_their_state():
    """Dropout is off, and an InstanceNorm with running statistics does not move."""
    model = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.Dropout(0.9), nn.BatchNorm1d(4))
    x = torch.randn(20, 4, 6)
    before = copy.deepcopy(model[0].state_dict())
    recalibrate(model, x.split(5))
    torch.testing.assert_close(model[0].state_dict(), before, rtol=0, atol=0)
    expected = x / np.sqrt(1 + 1e-5)  # InstanceNorm's initial statistics, and no dropout
    _assert_statistics(model[2], *_unbiased(expected.numpy()), rtol=1e-5, atol=1e-6)


class _Reused(nn.Module):
    """fvcore refuses it: one layer in two places."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm = norm(3)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.second(self.norm(self.first(x)).relu()))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_reused_layers_get_the_statistics_of_all_their_calls(norm):
    x = torch.randn(50, 3, dtype=F64)
    results = []
    for sizes in (50, 7):
        torch.manual_seed(1)
        model = _Reused(norm).double()
        report = recalibrate(model, x.split(sizes))
        assert [(one.name, one.count, one.batches) for one in report.layers] == [("norm", 100, 2 * -(-50 // sizes))]
        results.append((model.norm.running_mean, model.norm.running_var))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        first = model.first(x)
        mean, var = first.mean(0), first.var(0)
        second = model.second(((first - mean) / (var + 1e-5).sqrt() * model.norm.weight + model.norm.bias).relu())
    _assert_statistics(model.norm, *_unbiased(torch.cat([first, second]).numpy()))


class _Paths(nn.Module):
    """Which layers run depends on the batch."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.never = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.left(x) if x[0, 0] > 0 else self.right(x)


def test_layers_on_different_paths_and_on_none():
    model = _Paths().double()
    left, right = torch.rand(20, 2, dtype=F64), -torch.rand(30, 2, dtype=F64)
    report = recalibrate(model, [left[:10], right[:10], right[10:], left[10:]])
    _assert_statistics(model.left, *_unbiased(left.numpy()))
    _assert_statistics(model.right, *_unbiased(right.numpy()))
    assert [(one.name, one.why) for one in report.skipped] == [("never", "no batch went through it")]
    assert report.passes == 1  # each call is the first of its forward


def test_masks_leave_padding_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(3).double()

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    model = Model()
    x, mask = torch.randn(12, 3, 7, dtype=F64), torch.rand(12, 7) > 0.4
    x.masked_fill_(~mask[:, None], float("nan"))
    batches = [{"x": a, "mask": b} for a, b in zip(x.split(5), mask.split(5), strict=True)]
    report = recalibrate(model, batches, forward=lambda model, batch: model(**batch))
    _assert_statistics(model.norm, *_unbiased(x.numpy(), (1,), mask.numpy()))
    assert report.layers[0].count == mask.sum()


def test_any_channel_axis():
    layer = batchnorm.BatchNorm((2, 4), channel_axis=(0, 2)).double()
    x = torch.randn(2, 30, 4, dtype=F64)
    recalibrate(layer, x.split(7, dim=1))
    _assert_statistics(layer, *_unbiased(x.numpy(), (0, 2)))


def test_one_value_a_batch_is_enough_for_the_population():
    x = torch.randn(20, 4, dtype=F64)
    model = _deep()
    recalibrate(model, x.split(1))
    for name, values in _inputs_of_layers(model, x).items():
        _assert_statistics(model.get_submodule(name), *_unbiased(values))
    with pytest.raises(ShapeError, match="mean_of_batches estimator cannot give it a variance"):
        recalibrate(model, x.split(1), estimator="mean_of_batches")


def test_many_batches_are_merged_on_the_way():
    x = torch.randn(400, 4, dtype=F64)
    model = _deep()
    report = recalibrate(model, x.split(2))
    assert [(one.batches, one.count) for one in report.layers] == [(200, 400)] * 3
    assert model[1].num_batches_tracked == 200
    for name, values in _inputs_of_layers(model, x).items():
        _assert_statistics(model.get_submodule(name), *_unbiased(values))


def test_swa_and_ema_weights_get_their_statistics():
    model = _deep()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    average.update_parameters(model)
    x = torch.randn(40, 4, dtype=F64)
    recalibrate(average, [(batch, None) for batch in x.split(9)])
    assert average.n_averaged == 1
    for name, values in _inputs_of_layers(average.module, x).items():
        _assert_statistics(average.module.get_submodule(name), *_unbiased(values))


def test_what_a_batch_may_be():
    x = torch.randn(12, 4, dtype=F64)
    states = []
    for batches in ([x], [(x, "label")], [[x]], iter([x]), (batch for batch in (x,))):
        model = _deep()
        recalibrate(model, batches)
        states.append(model.state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    with pytest.raises(ArgumentError, match=r"got a dict\. For other batches pass forward"):
        recalibrate(_deep(), [{"x": x}])
    with pytest.raises(ArgumentError, match="got a tuple of str"):
        recalibrate(_deep(), [("a", x)])


def test_compiled_models_run_uncompiled():
    model = _deep()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(40, 4, dtype=F64)
    compiled.eval()(x)
    recalibrate(compiled, x.split(9))
    for name, values in _inputs_of_layers(model, x).items():
        _assert_statistics(model.get_submodule(name), *_unbiased(values))
    torch.testing.assert_close(compiled(x), model(x))


def test_a_second_pass_that_lacks_batches_is_an_error():
    class Once:
        def __init__(self):
            self.left = [torch.randn(10, 4, dtype=F64)]

        def __iter__(self):
            left, self.left = self.left, []
            return iter(left)

    model = _deep()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="5 was reached in the first pass over the batches and not in pass 2"):
        recalibrate(model, Once(), memory=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"estimator": "median"}, "estimator must be one of population, mean_of_batches, moving_average"),
        ({"reading": "both"}, "reading must be one of sequential, batch"),
        ({"max_batches": 0}, "max_batches must be an int of at least 1"),
        ({"memory": -1}, "memory must be an int of bytes"),
        ({"layers": ["bn1"]}, "layers: 'bn1' is or contains no batch normalization layer"),
        ({"layers": nn.Linear(2, 2)}, "layers: the given Linear is or contains no"),
        ({"layers": 3}, "layers must be names or modules, or None for all; got 3"),
        ({"forward": 3}, "forward must be forward.model, batch. or None, got int"),
        ({"group": "world"}, "group must be a process group"),
        ({"batches": torch.zeros(4, 4)}, "batches must be a DataLoader or another iterable"),
        ({"batches": 3}, "batches must be a DataLoader or another iterable"),
        ({"model": nn.Linear(2, 2)}, "Linear has no batch normalization layer"),
        ({"model": "resnet"}, "model must be a torch.nn.Module, got str"),
        ({"model": nn.Sequential(nn.LazyBatchNorm1d())}, "0 is not initialised yet"),
    ],
)
def test_bad_arguments(arguments, match):
    given = {"model": _deep(), "batches": [torch.zeros(4, 4, dtype=F64)], **arguments}
    with pytest.raises(ArgumentError, match=match):
        recalibrate(given.pop("model"), given.pop("batches"), **given)


def test_layers_without_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    report = recalibrate(model, [torch.randn(9, 4)])
    assert [(one.name, one.why) for one in report.skipped] == [("1", "it keeps no running statistics")]


def test_the_report_says_how_far_off_the_statistics_were():
    layer = nn.BatchNorm1d(2, eps=0.0).double()
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([0.0, 3.0]))
        layer.running_var.copy_(torch.tensor([2.0, 8.0]))
    report = recalibrate(layer, [torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=F64)])  # mean 1, variance 2
    (change,) = report.layers
    assert (change.name, change.count, change.batches) == ("", 2, 1)
    assert change.mean_shift == pytest.approx(2 / 2**0.5)
    assert change.var_ratio == pytest.approx(4.0)
    assert "1 layers recalibrated, 0 left alone: population" in str(report)
    assert report.as_dict()["layers"][0]["count"] == 2


def test_half_precision_models():
    model = nn.Sequential(batchnorm.BatchNorm1d(2)).bfloat16()
    x = (torch.randn(300, 2) + 100).bfloat16()
    recalibrate(model, x.split(30))
    _assert_statistics(model[0], *_unbiased(x.double().numpy()), rtol=1e-6)
