"""The CPU core where the contract's cases do not reach: large shapes, threads, fork, determinism, exactness, fuzz."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from cases import TOLERANCES, close
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm import BatchNorm2d, batch_norm
from batchnorm.errors import ArgumentError
from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import Affine

cpu = pytest.importorskip("batchnorm.kernels.cpu", reason="installed without the CPU core", exc_type=ImportError)
_cpu = pytest.importorskip("batchnorm.kernels._cpu")

INSTRUCTION_SETS = _cpu.instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = _cpu.instruction_set()
    _cpu.choose_instruction_set(request.param)
    yield request.param
    _cpu.choose_instruction_set(before)


def _channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _whole(x, dy, weight, bias, activation=None, residual=None, mask=None):
    affine = Affine(weight, bias, 1e-5, activation)
    y, moments = cpu.forward(x, affine, residual, mask)
    return y, moments, cpu.backward(dy, x, moments, affine, residual, is_estimated=True, mask=mask)


def _compare(x, dy, *, activation=None, residual=None, mask=None, threads=(1,)):
    """The fused passes against the reference in float64, with each number of threads."""
    channels = x.shape[1]
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    if x.dtype == torch.float64:
        weight, bias = weight.double(), bias.double()

    def wide(t):
        return None if t is None else t.double().reshape(x.shape[0], channels, -1)

    exact = Affine(weight.double(), bias.double(), 1e-5, activation)
    expected_y, expected_moments = reference.forward(wide(x), exact, wide(residual), mask)
    expected = reference.backward(
        wide(dy), wide(x), expected_moments, exact, wide(residual), is_estimated=True, mask=mask
    )
    values = x.numel() // max(channels, 1)
    for number in threads:
        torch.set_num_threads(number)
        found = _whole(x, dy, weight, bias, activation, residual, mask)
        _close(found, (expected_y, expected_moments, expected), x.dtype, values)


def _close(found, wanted, dtype, values):
    (y, moments, gradients), (expected_y, expected_moments, expected) = found, wanted
    close(y.reshape(expected_y.shape), expected_y, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    close(moments.mean, expected_moments.mean, statistics)
    close(moments.var, expected_moments.var, statistics)
    close(gradients.x.reshape(expected_y.shape), expected.x, dtype, 2)
    close(gradients.sums.dz, expected.sums.dz, dtype, max(1, values**0.5))
    close(gradients.sums.dz_xhat, expected.sums.dz_xhat, dtype, max(1, values**0.5))
    if expected.residual is not None:
        close(gradients.residual.reshape(expected_y.shape), expected.residual, dtype)


# One shape for each way in which work is cut: whole channels, pieces, tiles of short runs, ranges of rows, folded rows.
SHAPES = [
    pytest.param((4, 16, 40, 40), id="whole-channels"),
    pytest.param((2, 3, 300, 300), id="pieces"),
    pytest.param((1, 2, 70001), id="one-long-run"),
    pytest.param((16, 64, 7, 7), id="tiles"),
    pytest.param((300, 3, 5, 5), id="rows-of-short-runs"),
    pytest.param((350, 1100), id="wide-rows"),
    pytest.param((5001, 3), id="folded-rows-with-a-tail"),
    pytest.param((9, 24, 31, 33), id="odd-sizes"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize("form", ["plain", "relu", "residual-relu"])
def test_fused_passes(instruction_set, shape, layout, form):
    x, dy, residual = (torch.randn(shape) * 2 + 1 for _ in range(3))
    if layout == "channels-last":
        x, dy, residual = (_channels_last(t) for t in (x, dy, residual))
    # At the kink of ReLU one rounding decides over a gradient: keep z away from it.
    activation = "relu" if "relu" in form else None
    if activation:
        affine_free = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
        x = torch.where(affine_free.abs() < 1e-3, x + 0.01, x) if "residual" not in form else x
        activation = "silu" if "residual" in form else "relu"
    if activation != "relu":
        _compare(x, dy, activation=activation, residual=residual if "residual" in form else None, threads=(1, 2))
        return
    affine = Affine(torch.ones(shape[1]), torch.zeros(shape[1]), 1e-5, "relu")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, moments = cpu.forward(x, affine)
        gradients = cpu.backward(dy, x, moments, affine, is_estimated=True)
        z = cpu.apply(x, moments, affine._replace(activation=None))
        assert torch.equal(y, z.clamp(min=0))
        masked = torch.where(z > 0, dy, 0)
        expected = cpu.backward(masked, x, moments, affine._replace(activation=None), is_estimated=True)
        torch.testing.assert_close(gradients.x, expected.x)
        torch.testing.assert_close(gradients.sums.dz, expected.sums.dz)


@pytest.mark.parametrize("layout", ["planar", "channels-last", "matrix", "short-runs", "folded"])
def test_error_at_mean_1e4_is_below_1e_6_of_the_scale(instruction_set, layout):
    shape = {"matrix": (6000, 40), "short-runs": (400, 24, 7, 7), "folded": (20000, 3)}.get(layout, (16, 8, 48, 48))
    x = (torch.randn(shape, dtype=torch.float64) + 1e4).float()
    if layout == "channels-last":
        x = _channels_last(x)
    y, _ = cpu.forward(x, Affine(None, None, 1e-5, None))
    axes = [axis for axis in range(x.ndim) if axis != 1]
    wide = x.double()
    centred = wide - wide.mean(axes, keepdim=True)
    exact = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
    assert ((y.double() - exact).abs().max() / exact.abs().max()).item() < 1e-6


def test_a_border_of_zeros_in_front_of_a_large_mean(instruction_set):
    """The first values are no guide to the mean: the shift is found again."""
    x = torch.randn(4, 3, 64, 64) + 1e4
    x[:, :, :8] = 0
    for laid in (x, _channels_last(x)):
        moments = cpu.stats(laid)
        torch.testing.assert_close(moments.var, x.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
        torch.testing.assert_close(moments.mean, x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (3000, 64), (64, 128, 7, 7), (2, 3, 400, 400)])
def test_bit_identical_from_run_to_run(shape):
    torch.set_num_threads(2)
    x, dy = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.rand(shape[1]), torch.rand(shape[1])
    first = _whole(x, dy, weight, bias, "relu")
    for _ in range(5):
        again = _whole(x, dy, weight, bias, "relu")
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1].mean, again[1].mean)
        assert torch.equal(first[1].var, again[1].var)
        assert torch.equal(first[2].x, again[2].x)
        assert torch.equal(first[2].sums.dz_xhat, again[2].sums.dz_xhat)


@st.composite
def _strided(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(30, 600))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    offset = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)

    def tensor():
        sizes = [shape[axis] * steps[axis] + offset for axis in order]
        whole = torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
        inverse = [order.index(axis) for axis in range(len(shape))]
        ranges = (slice(offset, offset + size * step, step) for size, step in zip(shape, steps, strict=True))
        return whole.permute(inverse)[tuple(ranges)]

    return tensor


@settings(max_examples=200, deadline=None)
@given(_strided(), st.booleans(), st.sampled_from([None, "silu", "tanh"]))
def test_any_shape_stride_and_offset(tensor, same_layout, activation):
    x, dy, residual = tensor(), tensor(), tensor()
    if x.numel() // x.shape[1] < 8:
        return  # dx of so few values is a difference of equals
    if not same_layout:
        dy, residual = dy.contiguous(), residual.contiguous()
    _compare(x, dy, activation=activation, residual=residual)


def test_inference_in_place(instruction_set):
    for x in (torch.randn(4, 8, 30, 30), _channels_last(torch.randn(4, 8, 30, 30))):
        mean, var = torch.randn(8), torch.rand(8) + 0.5
        expected = torch.nn.functional.batch_norm(x, mean, var)
        _cpu.forward(x, x, None, None, None, None, mean, var, 1e-5, 0, False, True, 1)
        torch.testing.assert_close(x, expected)


def _forward_and_backward_in_child(queue):
    layer, x = BatchNorm2d(8), torch.randn(8, 8, 64, 64, requires_grad=True)
    layer(x).sum().backward()
    queue.put(float(layer.running_mean.sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_threads_that_it_has_not():
    code = (
        "import multiprocessing, torch\n"
        "from batchnorm import batch_norm\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(8, 8, 128, 128)\n"
        "batch_norm(x)\n"
        "process = multiprocessing.get_context('fork').Process(target=batch_norm, args=(x,))\n"
        "process.start(); process.join(60)\n"
        "assert process.exitcode == 0, process.exitcode\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_spawned_worker():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_forward_and_backward_in_child, args=(queue,))
    process.start()
    assert isinstance(queue.get(timeout=120), float)
    process.join(60)


def test_the_environment_forces_an_instruction_set():
    name = INSTRUCTION_SETS[-1]  # the widest is taken anyway
    found = subprocess.run(
        [sys.executable, "-c", "from batchnorm.kernels import cpu; print(cpu.instruction_set())"],
        env={**os.environ, "BATCHNORM_CPU_ISA": name},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == name


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"cannot run the instruction set 'sse9'.*choose one of .*plain"):
        _cpu.choose_instruction_set("sse9")


def test_without_the_exchange_api_tensors_are_read_by_their_attributes():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    expected = batch_norm(x)[0]
    _cpu.set_exchange_api(None)
    try:
        assert not _cpu.has_exchange_api()
        torch.testing.assert_close(batch_norm(x)[0], expected, rtol=0, atol=0)
        with pytest.raises(TypeError, match="not in the CPU's memory"):
            _cpu.forward(*[torch.empty(2, 2, device="meta")] * 8, 1e-5, 0, True, True, 1)
    finally:
        _cpu.set_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_written_at_once(momentum):
    ours, plain = BatchNorm2d(4, momentum=momentum), torch.nn.BatchNorm2d(4, momentum=momentum)
    version = ours.running_mean._version
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5)
        ours(x), plain(x)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    assert ours.running_mean._version > version


class TestDispatch:
    def test_auto_takes_the_core_for_plain_cpu_tensors_only(self):
        assert dispatch.backend_for(torch.randn(2, 3)) is cpu
        assert dispatch.backend_for(torch.empty(2, 3, device="meta")) is reference
        assert dispatch.backend_for(torch.empty(2, 3).to(torch.float8_e5m2)) is reference

    def test_by_name(self):
        dispatch.set_backend("reference")
        try:
            assert dispatch.backend_for(torch.randn(2, 3)) is reference
            dispatch.set_backend("cpu")
            with pytest.raises(ArgumentError, match=r"CPU backend was chosen by name, but the input is .*meta"):
                dispatch.backend_for(torch.empty(2, 3, device="meta"))
        finally:
            dispatch.set_backend("auto")
        assert dispatch.get_backend() == "auto"

    def test_unknown(self):
        with pytest.raises(ArgumentError, match="one of auto, cpu, triton, reference; got 'gpu'"):
            dispatch.set_backend("gpu")

    def test_fake_tensors_never_reach_the_core(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            y, _ = batch_norm(torch.randn(4, 3, 5))
        assert y.shape == (4, 3, 5)


GRADIENTS = {
    "sum": lambda x: torch.ones(()).expand(x.shape),
    "per-channel": lambda x: torch.randn(x.shape[1]).view(1, -1, *[1] * (x.ndim - 2)).expand(x.shape),
    "pooled": lambda x: torch.randn(*x.shape[:2], *[1] * (x.ndim - 2)).expand(x.shape),
    "contiguous": lambda x: torch.randn(x.shape),
    "channels-last": lambda x: _channels_last(torch.randn(x.shape)),
    "transposed": lambda x: torch.randn(x.shape[::-1]).permute(*range(x.ndim)[::-1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_wide_stats_are_one_float64_pass(instruction_set, shape, layout, dtype):
    x = (torch.randn(shape) * 2 + 100).to(dtype)
    if layout == "channels-last":
        x = _channels_last(x)
    values = x.double().movedim(1, 0).reshape(shape[1], -1)
    mean = values.mean(1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        moments = cpu.wide_stats(x)
        assert moments.count == values.shape[1]
        torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.var, (values - mean[:, None]).square().mean(1), rtol=1e-11, atol=0)
        results.append(moments)
    assert torch.equal(results[0].mean, results[1].mean)
    assert torch.equal(results[0].var, results[1].var)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=6), st.floats(-1e4, 1e4), st.sampled_from([1, 3, 49, 600]))
def test_wide_stats_do_not_depend_on_the_split(cuts, mean, length):
    x = torch.randn(200, 3, length, generator=torch.Generator().manual_seed(5)) + mean
    edges = [0, *sorted(cuts), 200]
    whole = cpu.wide_stats(x)
    parts = [cpu.wide_stats(x[a:b]) for a, b in itertools.pairwise(edges)]
    merged = parts[0].merge(*parts[1:])
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.var, whole.var, rtol=1e-10, atol=0)


def test_wide_stats_of_any_strides_nothing_and_nan():
    x = torch.randn(6, 5, 4, 3)
    for view in (x.transpose(2, 3), x[::2, 1:4], x.permute(3, 2, 1, 0), x[:, :, :1].expand(6, 5, 4, 3)):
        moments = cpu.wide_stats(view)
        values = view.double().movedim(1, 0).reshape(view.shape[1], -1)
        torch.testing.assert_close(moments.mean, values.mean(1))
        torch.testing.assert_close(moments.var, values.var(1, correction=0))
    empty = cpu.wide_stats(x[:0])
    assert empty.count == 0
    assert not empty.mean.any()
    assert not empty.var.any()
    x[1, 2, 3, 0] = float("nan")
    assert cpu.wide_stats(x).mean.isnan().tolist() == [False, False, True, False, False]
    assert cpu.wide_stats(torch.zeros(2, 3, device="meta")) is None


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("shape", [(6, 80, 9, 8), (3, 5, 40, 40), (200, 70), (4, 1, 30), (300, 3), (2, 96, 7, 7)])
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
def test_gradients_of_any_layout(gradient, shape, layout):
    x = torch.randn(shape)
    _compare(_channels_last(x) if layout == "channels-last" else x, gradient(x), activation="silu")


@pytest.mark.parametrize("shape", [(40, 16, 7, 7), (9, 40, 14, 14), (2, 3, 5, 5), (5, 6, 700), (3000, 20), (50, 2100)])
@pytest.mark.parametrize("threads", [1, 2])
def test_halves_agree_with_the_whole(instruction_set, shape, threads):
    """Statistics or the second pass alone are cut into work in ways of their own."""
    torch.set_num_threads(threads)
    x, dy = torch.randn(shape) + 3, torch.randn(shape)
    affine = Affine(torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), 1e-5, "silu")
    for laid, gradient in ((x, dy), (_channels_last(x), _channels_last(dy))):
        y, moments = cpu.forward(laid, affine)
        alone = cpu.stats(laid)
        torch.testing.assert_close((alone.mean, alone.var), (moments.mean, moments.var), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cpu.apply(laid, moments, affine), y)
        whole = cpu.backward(gradient, laid, moments, affine, is_estimated=True)
        sums = cpu.backward_reduce(gradient, laid, moments, affine)
        torch.testing.assert_close(sums.dz.float(), whole.sums.dz, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums.dz_xhat.float(), whole.sums.dz_xhat, rtol=1e-5, atol=1e-4)
        dx, _ = cpu.backward_apply(gradient, laid, moments, affine, sums=sums)
        torch.testing.assert_close(dx, whole.x, rtol=1e-5, atol=1e-5)
