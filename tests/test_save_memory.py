"""save_memory(): the same gradients to the last bit, from fewer bytes; and everything that could go wrong between."""

from __future__ import annotations

import copy
import doctest
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm,
    GhostBatchNorm,
    SyncBatchNorm,
    batch_norm,
    convert,
    freeze,
    fuse_activations,
    save_memory,
    saved_bytes,
)
from batchnorm.errors import ArgumentError, ChangedInPlaceError
from batchnorm.kernels import dispatch, recomputation

ACTIVATIONS = [None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh"]


class Residual(nn.Module):
    """Two convolutions with dropout between, added to the input before the last activation."""

    def __init__(self, width, activation="relu", norm=BatchNorm2d):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.inner, self.last = (norm(width, activation=activation) for _ in range(2))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.last(self.second(self.dropout(self.first(self.inner(self.first(x))))), x)


def _chain(activation="relu", norm=BatchNorm2d, depth=3):
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False), norm(8, activation=activation)]
    return nn.Sequential(*layers, nn.Conv2d(8, 2, 1))


def _residual(activation="relu", norm=BatchNorm2d, blocks=3):
    # The first block is called twice: its layers see two inputs in one graph.
    first, *others = [Residual(8, activation, norm) for _ in range(blocks)]
    start = nn.Conv2d(3, 8, 3, padding=1), norm(8, activation=activation)
    return nn.Sequential(*start, first, first, *others, nn.Flatten(), nn.Linear(8 * 36, 3))


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def _squared(model, x):
    return model(x).square().sum()


def _learned(model, saves, run=_squared, x=X):
    """Loss, gradients and buffers of one step on a copy of the model."""
    torch.manual_seed(1)
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    if saves:
        with save_memory():
            loss = run(model, x)
    else:
        loss = run(model, x)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def _assert_same(model, run=_squared, x=X):
    plain, saving = _learned(model, False, run, x), _learned(model, True, run, x)
    assert len(plain) == len(saving)
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)


@pytest.fixture
def computed(monkeypatch):
    """The recipes that were computed, in order."""
    found, compute = [], recomputation.Recipe._computed
    monkeypatch.setattr(recomputation.Recipe, "_computed", lambda self: found.append(self) or compute(self))
    return found


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    before = dispatch.get_backend()
    dispatch.set_backend(request.param)
    yield request.param
    dispatch.set_backend(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", [_chain, _residual])
def test_gradients_are_the_same_to_the_last_bit(make, activation, backend):
    _assert_same(make(activation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_in_other_precisions_and_channels_last(dtype):
    model = _residual().to(dtype).to(memory_format=torch.channels_last)
    _assert_same(model, x=X.to(dtype).contiguous(memory_format=torch.channels_last))


def test_two_backward_passes_with_dropout_and_residuals(computed):
    def twice(model, x):
        loss = _squared(model, x)
        loss.backward(retain_graph=True)
        return loss

    _assert_same(_residual(), twice)
    assert len(computed) == 2 * len(set(computed))  # each output once in each pass


def test_two_losses_over_one_trunk(computed):
    def two(model, x):
        y = model(x)
        y[:2].square().sum().backward(retain_graph=True)
        return y[2:].exp().sum()

    _assert_same(_residual(), two)


def test_each_output_is_computed_once_and_gone_then(computed):
    model, outputs = _residual(), []
    for layer in model.modules():
        if isinstance(layer, BatchNorm2d):
            layer.register_forward_hook(lambda _, __, y: outputs.append(StorageWeakRef(y.untyped_storage())))
    with save_memory():
        loss = _squared(model, X)
    assert all(output.expired() for output in outputs[:-1])  # of the last one Flatten has kept a view
    assert len(outputs) == 9
    loss.backward(retain_graph=True)
    assert len(computed) == len(set(computed)) == 9
    assert all(recipe.held is None for recipe in computed)


def test_half_of_a_chain_counted():
    model, x = _chain(depth=4), torch.randn(4, 3, 6, 6)
    report = saved_bytes(model, x)
    one = 4 * 8 * 36 * 4
    # Each convolution keeps its input, each layer its own.
    assert report.plain == x.nbytes + 8 * one
    assert report.saving == x.nbytes + 4 * one
    assert report.recomputed == {"1": one, "3": one, "5": one, "7": one}
    assert report.as_dict()["kept"] == {}
    assert "(-48%)" in str(report)


def test_the_count_is_that_of_plain_hooks():
    torch.manual_seed(1)
    model, kept = _residual(), {}
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    report = saved_bytes(model, X)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _squared(model, X)
    kept.pop(next(pointer for pointer, tensor in kept.items() if tensor.shape == (4, 3)))  # of square()
    assert report.plain == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert report.saving < 0.7 * report.plain  # dropout's masks and outputs stay
    assert loss.requires_grad


def test_counting_leaves_no_trace():
    model = _residual()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    saved_bytes(model, {"input": X})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_torch_network_in_the_documented_way():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    )
    report = saved_bytes(model, X)
    assert report.saving == report.plain
    assert report.recomputed == {}
    assert "torch.nn.BatchNorm2d is another library's: convert() first" in str(report)
    model = convert(model)[0]
    report = saved_bytes(model, X)
    assert list(report.recomputed) == ["4"]
    assert "fuse_activations() puts it into the layer" in report.kept["1"]
    model = fuse_activations(model, X)[0]
    report = saved_bytes(model, X)
    assert list(report.recomputed) == ["1", "4"]
    # The last layer has no activation: where its output is kept, autograd keeps its statistics as tensors, too.
    statistics = 8 * (2 * 8 + 2 * 4)
    assert report.saving + sum(report.recomputed.values()) in (report.plain, report.plain - statistics)
    _assert_same(model)


def test_what_cannot_be_recomputed_for_nothing_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.ghost, self.plain, self.unused = GhostBatchNorm(3, ghost_size=2), BatchNorm2d(3), BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.plain(self.conv(self.ghost(x)), x))

    report = saved_bytes(Odd(), X)
    assert report.recomputed == {}
    assert "not all that its output is made of is kept" in report.kept["ghost"]
    assert "an addition without activation" in report.kept["plain"]
    assert report.kept["unused"] == "the example does not reach it"
    frozen = nn.Sequential(BatchNorm2d(3).requires_grad_(False), nn.Conv2d(3, 3, 1))
    assert saved_bytes(frozen, X).kept == {"0": "no gradient goes through it"}
    _assert_same(Odd())


def test_bad_arguments_of_the_count():
    with pytest.raises(ArgumentError, match="example must be what the network is called with"):
        saved_bytes(_chain(), None)
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, got int"):
        saved_bytes(3, X)
    model = _chain()
    model.generator = (i for i in range(3))
    with pytest.raises(ArgumentError, match="Sequential cannot be copied"):
        saved_bytes(model, X)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.flatten(1),
        lambda y: y.permute(0, 2, 3, 1),
        lambda y: y[1:, ::2],
        lambda y: y[:, 2],
        lambda y: y.unsqueeze(2).expand(4, 8, 5, 6, 6),
        lambda y: y.contiguous(memory_format=torch.channels_last),
    ],
    ids=["flatten", "permute", "slice", "select", "expand", "copy"],
)
def test_views_of_an_output(view, computed):
    def run(model, x):
        y = view(model[:2](x))
        return (y * y.exp().detach()).sum() + y.pow(3).sum()

    _assert_same(_chain(), run)
    assert len(computed) == (0 if view(torch.empty(4, 8, 6, 6)).is_contiguous(memory_format=torch.channels_last) else 1)


def test_a_view_with_another_dtype_or_sign_is_kept():
    with save_memory():
        y = batch_norm(torch.randn(6, 4, requires_grad=True), activation="relu")[0]
        saving = recomputation.current()
        assert saving.recipe_of(y.detach()) is not None
        assert saving.recipe_of(y.detach().view(torch.int32)) is None
        assert saving.recipe_of(torch._neg_view(y.detach())) is None
        assert saving.recipe_of(y.detach().clone()) is None


@pytest.mark.parametrize("axis", [-1, (1, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_general_way(axis, masked, computed, backend):
    features = 6 if axis == -1 else (3, 6)

    def run(model, x):
        mask = torch.ones(4, 6, dtype=torch.bool) if axis != -1 else torch.ones(4, 3, 6, dtype=torch.bool)
        mask[0, 1] = False
        y = model[0](x, 2 * x, mask=mask if masked else None)
        return y.pow(3).sum() + y.exp().square().sum()

    _assert_same(nn.ModuleList([BatchNorm(features, channel_axis=axis, activation="silu")]), run)
    assert len(computed) == 1


def test_inputs_of_rare_layouts(computed):
    weight = torch.randn(5)

    def run(model, x):
        for one in (x.transpose(2, 3), x[:, :, ::2], x[:, :, :1].expand(4, 3, 6, 6), x.permute(0, 2, 3, 1)):
            y = batch_norm(one, activation="gelu")[0]
            loss = y.pow(3).sum() + weight.sum()
        return loss

    _assert_same(nn.Identity(), run)
    assert computed


@pytest.mark.parametrize("norm", [BatchRenorm, SyncBatchNorm, BatchNorm])
def test_other_layers_of_the_family(norm, computed):
    _assert_same(_chain(norm=norm))
    assert len(computed) == 3


def test_evaluation_and_frozen_layers(computed):
    model = _residual()
    model(X)
    _assert_same(model.eval())
    assert len(computed) == 9
    freeze(model.train())
    _assert_same(model)
    assert len(computed) == 18


def test_running_statistics_that_move_on_before_backward():
    def run(model, x):
        model.eval()
        loss = _squared(model, x)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)
        return loss

    _assert_same(_chain(), run)


def test_autocast(computed):
    def run(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().sum()

    _assert_same(_residual(), run)
    assert len(computed) == 9
    assert {recipe.dtype for recipe in computed} == {torch.bfloat16}


def test_a_copy_that_autocast_makes_is_kept(computed):
    def run(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().sum()

    _assert_same(nn.Sequential(BatchNorm2d(3), nn.Conv2d(3, 4, 1)), run)  # float32 out, bfloat16 into the convolution
    assert not computed


def test_double_backward(computed):
    def run(model, x):
        loss = model(x).exp().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + grad.square().sum()

    _assert_same(_chain("silu").double(), run, X.double())
    assert computed


def test_gradgradcheck_through_the_hooks():
    weight, bias = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x):
        with save_memory():
            y = batch_norm(x, weight, bias, activation="tanh")[0]
            return y * y.sin()

    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_batched_gradients_and_then_a_plain_pass():
    def run(model, x):
        y = model(x)
        basis = torch.eye(y.numel()).view(-1, *y.shape)
        (grads,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
        return y.square().sum() + grads.detach().square().sum()

    _assert_same(_residual(), run)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside(reentrant, computed):
    def run(model, x):
        y = checkpoint(model[:4], x, use_reentrant=reentrant)
        saving = recomputation.current()
        assert saving is None or not saving.outputs  # neither way keeps what would be needed
        return model[4:](y).square().sum()

    _assert_same(_residual(), run)
    assert len(computed) == 4  # of the last two blocks; the segment is the checkpoint's


def test_activation_checkpointing_around():
    def run(model, x):
        return model[4:](checkpoint(save_memory()(model[:4]), x, use_reentrant=False)).square().sum()

    _assert_same(_residual(), run)


def test_hooks_of_others_take_precedence():
    with save_memory(), torch.autograd.graph.save_on_cpu():
        loss = _squared(_chain(), X)
        assert not recomputation.current().outputs
    loss.backward()


def test_an_output_that_is_changed_before_it_is_kept(computed):
    def run(model, x):
        y = model[:2](x)
        y += 1
        return model[2](y).square().sum()

    _assert_same(_chain(), run)
    assert not computed


def test_an_output_that_is_changed_after_it_was_kept_is_still_known():
    model = _chain()
    (expected,) = torch.autograd.grad(model[2](model[:2](X)).square().sum(), model[2].weight)
    with save_memory():
        y = model[:2](X)
        loss = model[2](y).square().sum()
        with torch.no_grad():
            y.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, model[2].weight)[0], expected, rtol=0, atol=0)


def test_what_it_is_made_of_must_not_change():
    def changed(what):
        model, x = _chain(), X.clone()
        with save_memory():
            before = model[0](x)
            loss = model[2](model[1](before)).square().sum()
            with torch.no_grad():
                {"input": before, "weight": model[1].weight, "other": model[2].weight, "data": x}[what].mul_(2)
        with pytest.raises(
            ChangedInPlaceError, match=r"modified by an inplace operation: .* is at version .; expected"
        ):
            loss.backward()

    for what in ("input", "weight", "other", "data"):
        changed(what)
    assert issubclass(ChangedInPlaceError, RuntimeError)  # as autograd's own


def test_outputs_in_a_row_that_need_one_another(computed):
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(BatchNorm1d(4, activation="relu") for _ in range(20))
            self.maps = nn.ModuleList(nn.Linear(4, 4) for _ in range(20))

        def forward(self, x):
            for norm, linear in zip(self.norms, self.maps, strict=True):
                x = norm(linear(x), x)
            return x.square()

    _assert_same(Row(), x=torch.randn(16, 4))
    assert max(recipe.depth for recipe in computed) == 8
    assert len(computed) == len(set(computed)) == 18  # the ninth and the eighteenth are kept


def test_a_block_around_many_steps_holds_no_step_that_is_over():
    model, inputs = _chain(), []
    model[0].register_forward_hook(lambda _, __, y: inputs.append(StorageWeakRef(y.untyped_storage())))
    with save_memory():
        for _ in range(3):
            _squared(model, X).backward()
            _squared(model, X)  # and one without a backward pass
        assert all(one.expired() for one in inputs[:-1])
        saving = recomputation.current()
        assert len(saving.outputs) <= 1
    assert not saving.outputs


def test_a_feature_that_is_held_does_not_hold_its_input_after_the_block():
    model = _chain()
    with save_memory():
        before = model[0](X)
        storage, feature = StorageWeakRef(before.untyped_storage()), model[1](before).detach()
        del before
    assert storage.expired()
    assert feature.isfinite().all()


def test_one_inside_of_another_and_errors_inside():
    def nested(model, x):
        with save_memory():
            y = model[:3](x)
            with save_memory():
                y = model[3:](y)
        return y.square().sum()

    _assert_same(_chain(), nested)
    with save_memory():
        y = _chain()[:2](X)
        with save_memory():
            assert recomputation.current().recipe_of(y.detach()) is not None
        assert recomputation.current().recipe_of(y.detach()) is not None
    with pytest.raises(ZeroDivisionError), save_memory():
        raise ZeroDivisionError
    assert recomputation.current() is None
    assert recomputation.in_use == 0


def test_other_threads_are_not_concerned():
    model, seen = _chain(), []

    def other():
        seen.append(recomputation.current())
        _squared(model, X).backward()

    with save_memory():
        loss = _squared(model, X)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(recomputation.current().outputs) <= 3
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert seen == [None]
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


def test_in_another_stream_it_is_computed_anew(computed, monkeypatch):
    streams = iter(range(100))
    monkeypatch.setattr(recomputation, "_stream", lambda device: next(streams))

    def run(model, x):
        y = model[:2](x)
        return model[2](y).square().sum() + y.exp().sum() + y.sin().sum()

    _assert_same(_chain(), run)
    assert len(computed) == 2  # by the convolution and by sin(); exp() keeps its own result


def test_as_a_decorator_and_without_gradients(computed):
    model = _chain()
    loss = save_memory()(_squared)(model, X)
    loss.backward()
    assert len(computed) == 3
    with save_memory(), torch.no_grad():
        model(X)
        assert not recomputation.current().outputs
    with save_memory(), torch.inference_mode():
        model.eval()(X)


def test_compiled_code_is_passed_over():
    model = _chain(depth=1)

    def run(model, x):
        return torch.compile(lambda x: model(x).square().sum(), backend="aot_eager", fullgraph=True)(x)

    def inside(model, x):
        return torch.compile(lambda x: save_memory()(_squared)(model, x), backend="eager", fullgraph=True)(x)

    _assert_same(model, run)
    _assert_same(model, inside)


def test_torch_func():
    with save_memory(), pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        torch.func.grad(lambda x: batch_norm(x)[0].sum())(torch.randn(4, 2))
    with save_memory():
        x = torch.randn(3, 4, 2, requires_grad=True)
        y = torch.vmap(lambda x: batch_norm(x, activation="relu")[0].square())(x)
    (found,) = torch.autograd.grad(y.pow(2).sum(), x)
    expected = sum(batch_norm(one, activation="relu")[0].pow(4).sum() for one in x)
    torch.testing.assert_close(found, torch.autograd.grad(expected, x)[0])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_distributed_data_parallel(computed):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _assert_same(_chain(), lambda model, x: _squared(nn.parallel.DistributedDataParallel(model), x))
    finally:
        dist.destroy_process_group()
    assert len(computed) == 3


def test_the_core_leaves_it_to_the_general_way_where_it_is_switched_off_meanwhile():
    model = _chain()
    with save_memory():
        loss = _squared(model, X)
    dispatch.set_backend("reference")
    try:
        found = torch.autograd.grad(loss, list(model.parameters()))
    finally:
        dispatch.set_backend("auto")
    expected = torch.autograd.grad(_squared(model, X), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_examples_of_the_page_run():
    path = Path(__file__).parent.parent / "docs" / "memory.md"
    found = doctest.testfile(str(path), module_relative=False)
    assert found.attempted >= 7
    assert found.failed == 0
