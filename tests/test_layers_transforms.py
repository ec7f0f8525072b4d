"""Layers under torch.func, torch.compile, checkpointing, autocast, and the tracers and exporters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d
from batchnorm.errors import ShapeError

# Forward-mode autograd, fx and torch.jit itself load parts of torch that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def _assert_same_buffers(a, b, **tolerance):
    torch.testing.assert_close(dict(a.named_buffers()), dict(b.named_buffers()), **tolerance)


# torch.func


@pytest.mark.parametrize("momentum", [0.1, None])
def test_stacked_networks_under_vmap(momentum):
    networks = [nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4, momentum=momentum, activation="relu")) for _ in range(5)]
    twins = copy.deepcopy(networks)
    parameters, buffers = stack_module_state(networks)
    base = copy.deepcopy(networks[0]).to("meta")

    def loss(parameters, buffers, x):
        y = functional_call(base, (parameters, buffers), (x,))
        return y.pow(2).sum(), y

    for step in range(3):
        x = torch.randn(5, 8, 3) + step
        grads, y = vmap(grad(loss, has_aux=True))(parameters, buffers, x)
        for k, twin in enumerate(twins):
            twin.zero_grad()
            expected = twin(x[k])
            expected.pow(2).sum().backward()
            torch.testing.assert_close(y[k], expected)
            torch.testing.assert_close(grads["1.weight"][k], twin[1].weight.grad, rtol=1e-4, atol=1e-4)
    for k, twin in enumerate(twins):
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(buffers[name][k], buffer)
    base.eval()
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(y[2], twins[2].eval()(x[2]))


def test_stacked_networks_one_of_which_meets_nan():
    parameters, buffers = stack_module_state([BatchNorm1d(3) for _ in range(4)])
    base = BatchNorm1d(3, device="meta")
    x = torch.randn(4, 8, 3)
    x[2, 1] = float("nan")
    vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    assert buffers["num_batches_tracked"].tolist() == [1, 1, 0, 1]
    assert buffers["running_var"].isfinite().all()


def test_stacked_networks_on_one_shared_batch():
    parameters, buffers = stack_module_state([BatchNorm1d(3) for _ in range(4)])
    base, x, twin = BatchNorm1d(3, device="meta"), torch.randn(8, 3), BatchNorm1d(3)
    vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    twin(x)
    torch.testing.assert_close(buffers["running_var"], twin.running_var.expand(4, 3))


def test_one_layer_under_vmap_takes_all_slices_as_one_batch():
    layer, twin, x = BatchNorm1d(3), BatchNorm1d(3), torch.randn(2, 4, 8, 3)
    y = vmap(vmap(layer))(x)
    twin(x.reshape(-1, 3))
    torch.testing.assert_close(y[1, 2], nn.BatchNorm1d(3)(x[1, 2]))
    _assert_same_buffers(layer, twin)


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_transforms_commit_once(transform):
    layer, twin, x = BatchNorm1d(3, activation="silu"), BatchNorm1d(3), torch.randn(6, 3)
    reduce = torch.sum if transform in (grad, hessian) else (lambda y: y)
    transform(lambda x: reduce(layer(x)))(x)
    twin(x)
    _assert_same_buffers(layer, twin)


def test_gradients_for_each_example_in_evaluation():
    layer, x = BatchNorm1d(3).eval(), torch.randn(6, 3)
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return functional_call(layer, weights, (x.unsqueeze(0),)).pow(2).sum()

    grads = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    assert grads["weight"].shape == (6, 3)
    for i in range(6):
        torch.testing.assert_close(grads["weight"][i], grad(loss)(weights, x[i])["weight"])


def test_vmap_with_a_mask_that_leaves_single_values():
    layer, x = BatchNorm1d(3), torch.randn(4, 8, 3)
    mask = torch.rand(4, 8) > 0.5
    mask[0], mask[1] = False, torch.arange(8) == 0
    vmap(lambda x, m: layer(x, mask=m))(x, mask)
    twin = BatchNorm1d(3)
    twin(x[mask])
    _assert_same_buffers(layer, twin)


# torch.compile


class Small(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), BatchNorm2d(3, activation="relu", **arguments)
        self.second = BatchNorm2d(3)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.second(y, y)


def _compare_compiled(network, shapes, dynamic=None):
    torch._dynamo.reset()
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for training in (True, False):
        network.train(training), twin.train(training)
        for shape in shapes:
            x = torch.randn(shape)
            grads = []
            for model, module in ((compiled, network), (twin, twin)):
                leaf = x.clone().requires_grad_()
                module.zero_grad()
                y = model(leaf)
                y.pow(2).sum().backward()
                grads.append((y.detach(), leaf.grad, [p.grad for p in module.parameters()]))
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
            _assert_same_buffers(network, twin)


@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
def test_compile_fullgraph(arguments):
    _compare_compiled(Small(**arguments), [(4, 2, 5, 5)] * 2)


def test_compile_fullgraph_with_inductor():
    """The one test with torch's code generator, which is slow; the others stop before it."""
    torch._dynamo.reset()
    layer, twin = BatchNorm2d(3, activation="relu"), BatchNorm2d(3, activation="relu")
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    grads = []
    for call in (compiled, twin):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.pow(2).sum().backward()
        grads.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    _assert_same_buffers(layer, twin)


def test_compile_with_dynamic_shapes_from_the_start():
    _compare_compiled(Small(momentum=None), [(4, 2, 5, 5), (7, 2, 6, 6)], dynamic=True)


def test_compile_when_shapes_change():
    _compare_compiled(Small(), [(4, 2, 5, 5), (6, 2, 5, 5), (3, 2, 7, 4)])


def test_compile_keeps_a_bad_batch_out():
    torch._dynamo.reset()
    layer = BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(8, 3))
    before = copy.deepcopy(layer)
    compiled(torch.full((8, 3), float("inf")))
    _assert_same_buffers(layer, before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_with_a_mask_of_few_values_leaves_the_statistics(momentum):
    """Nobody can refuse the mask there, and its unbiased variance is NaN."""
    torch._dynamo.reset()
    layer = BatchNorm1d(3, momentum=momentum)
    compiled = torch.compile(lambda x, mask: layer(x, mask=mask), fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3)
    for kept, counted in ((0, 1), (1, 1), (4, 2)):
        compiled(x, torch.arange(6) < kept)
        assert int(layer.num_batches_tracked) == counted
        if kept < 2:
            assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0.0] * 3, [1.0] * 3)
    twin = BatchNorm1d(3, momentum=momentum)
    twin(x, mask=torch.arange(6) < 0), twin(x[:4])
    _assert_same_buffers(layer, twin)


def test_compiled_errors_are_ours():
    torch._dynamo.reset()
    with pytest.raises(
        (ShapeError, torch._dynamo.exc.TorchDynamoException), match=r"expected 3 channels|Expected more"
    ):
        torch.compile(BatchNorm1d(3), backend="eager")(torch.randn(4, 5))


# Checkpointing


def _checkpointed(segment, x, kind):
    if kind == "nested":
        return checkpoint(lambda x: checkpoint(segment, x, use_reentrant=False), x, use_reentrant=False)
    if kind == "nested reentrant":
        return checkpoint(lambda x: checkpoint(segment, x, use_reentrant=True), x, use_reentrant=True)
    if kind == "sequential":
        return checkpoint_sequential(segment, 2, x, use_reentrant=False)
    return checkpoint(segment, x, use_reentrant=kind == "reentrant")


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "nested", "nested reentrant", "sequential"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_checkpointed_segment_commits_once(kind, momentum):
    """torch.nn's layers take the batch twice: forward, and again when backward recomputes it."""
    first, second = (BatchNorm1d(3, momentum=momentum) for _ in range(2))
    segment = nn.Sequential(nn.Linear(3, 3), first, nn.ReLU(), second)
    plain = copy.deepcopy(segment)
    for step in range(3):
        x = torch.randn(8, 3) + step
        grads = []
        for network, call in ((segment, lambda x: _checkpointed(segment, x, kind)), (plain, plain)):
            leaf = x.clone().requires_grad_()
            network.zero_grad()
            call(leaf).pow(3).sum().backward()
            grads.append((leaf.grad, [p.grad for p in network.parameters()]))
        torch.testing.assert_close(*grads)
    assert int(segment[1].num_batches_tracked) == 3
    _assert_same_buffers(segment, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_layer_checkpointed_from_outside_commits_once(use_reentrant, momentum):
    torch._dynamo.reset()
    layer, twin = BatchNorm1d(3, momentum=momentum), BatchNorm1d(3, momentum=momentum)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(8, 3, requires_grad=True)
        checkpoint(compiled, x, use_reentrant=use_reentrant).square().sum().backward()
        twin(x)
    _assert_same_buffers(layer, twin)


def test_the_operator_of_compiled_commits_is_sound():
    torch.library.opcheck(torch.ops.batchnorm.is_first_pass, (torch.randn(3),))


def test_a_segment_checkpointed_inside_of_a_compiled_function_commits_once():
    torch._dynamo.reset()
    segment = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3))
    plain = copy.deepcopy(segment)
    step = torch.compile(lambda x: checkpoint(segment, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 3, requires_grad=True)
    step(x).pow(3).sum().backward()
    plain(x)
    _assert_same_buffers(segment, plain)


def test_double_backward_through_a_checkpoint_commits_once():
    layer = BatchNorm1d(3, activation="silu")
    x = torch.randn(8, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).pow(2).sum(), x, create_graph=True)
    dx.pow(2).sum().backward()
    assert int(layer.num_batches_tracked) == 1


def test_a_forward_after_backward_commits_again():
    layer = BatchNorm1d(3)
    for count in (1, 2, 3):
        layer(torch.randn(4, 3)).sum().backward()
        assert int(layer.num_batches_tracked) == count


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    results = []
    for norm in (BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), norm(4))
        x = torch.randn(4, 3, 12, 12)
        with torch.autocast("cpu", dtype):
            y = network(x)
            loss = nn.functional.mse_loss(y.float(), torch.ones_like(y, dtype=torch.float32))
        loss.backward()
        assert y.dtype == dtype
        assert network[1].weight.grad.dtype == network[1].running_mean.dtype == torch.float32
        results.append((y.detach().float(), [p.grad for p in network.parameters()], dict(network.named_buffers())))
    torch.testing.assert_close(*results, rtol=5e-2, atol=2e-2)


def test_the_functions_float64_survives_autocast():
    x = torch.randn(8, 3, dtype=torch.float64)
    layer, twin = BatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), twin(x))


# Tracers and exporters


def test_fx_keeps_the_layer_whole_and_running():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm2d(3), nn.ReLU(inplace=True))
    traced = torch.fx.symbolic_trace(network)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 3
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(traced(x), network(x))
    assert int(network[1].num_batches_tracked) == 2
    torch.testing.assert_close(traced.eval()(x), network.eval()(x))


def test_fx_with_residual_and_mask():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3, activation="relu")

        def forward(self, x, mask):
            return self.norm(x, x, mask=mask)

    block, x, mask = Block(), torch.randn(6, 3), torch.arange(6) < 4
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x, mask), block(x, mask))


def test_fx_fuses_it_into_the_convolution():
    from torch.fx.experimental.optimization import fuse

    network = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm2d(3))
    network(torch.randn(4, 2, 6, 6) * 3 + 1)
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(fuse(network.eval())(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["2d", "last axis", "stack", "half"])
def test_export_of_an_evaluated_network(form):
    network, example, other = {
        "2d": (BatchNorm2d(3, activation="gelu"), (4, 3, 5, 5), (7, 3, 5, 5)),
        "last axis": (BatchNorm(3, channel_axis=-1), (4, 5, 3), (7, 5, 3)),
        "stack": (BatchNorm((2, 3), channel_axis=(1, 2)), (4, 2, 3), (7, 2, 3)),
        "half": (BatchNorm2d(3).bfloat16(), (4, 3, 5, 5), (7, 3, 5, 5)),
    }[form]
    dtype = network.weight.dtype
    network(torch.randn(example).to(dtype) * 2 + 1)
    network.eval()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(network, (torch.randn(example).to(dtype),), dynamic_shapes=({0: batch},))
    x = torch.randn(other).to(dtype)
    torch.testing.assert_close(exported.module()(x), network(x))
    if form in ("2d", "half"):
        assert any("batch_norm" in str(node.target) for node in exported.graph.nodes)


def test_export_of_a_training_network_keeps_its_statistics_moving():
    network, twin = BatchNorm1d(3), BatchNorm1d(3)
    module = torch.export.export(network, (torch.randn(4, 3),)).module()
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), twin(x))
    _assert_same_buffers(module, twin)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_jit_trace(training):
    network, twin = BatchNorm2d(3, activation="relu").train(training), BatchNorm2d(3, activation="relu").train(training)
    with warnings.catch_warnings():
        # In training torch's own layer warns here as well: its look at the batch size is a Python one.
        warnings.simplefilter("ignore" if training else "error", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, torch.randn(2, 3, 4, 4), check_trace=False)
    traced.load_state_dict(twin.state_dict())
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(traced(x), twin(x))
    _assert_same_buffers(traced, twin)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, twin = BatchNorm1d(3), BatchNorm1d(3)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def step(state, x):
        return functional_call(layer, state, (x,))

    graph = make_fx(step, tracing_mode=mode)({n: t.detach().clone() for n, t in state.items()}, torch.randn(5, 3))
    x = torch.randn(5, 3)
    torch.testing.assert_close(graph(state, x), twin(x))


@pytest.mark.parametrize("masked", [False, True])
def test_fake_tensors(masked):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer, x = BatchNorm2d(3), torch.randn(2, 3, 4, 4)
        mask = torch.ones(2, 4, 4, dtype=torch.bool) if masked else None
        assert layer(x, mask=mask).shape == layer.eval()(x).shape == x.shape


def test_counting_flops_changes_nothing():
    from torch.utils.flop_counter import FlopCounterMode

    layer, twin, x = BatchNorm1d(3), BatchNorm1d(3), torch.randn(5, 3)
    with FlopCounterMode(display=False):
        layer(x)
    twin(x)
    _assert_same_buffers(layer, twin)
