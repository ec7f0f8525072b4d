"""Every backend runs every case of the contract against the float64 oracle: values and all gradients."""

from __future__ import annotations

import importlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from cases import ACTIVATIONS, DTYPES, VIEW_PARAMS, close, make_like, make_parameters

from batchnorm.kernels import reference
from batchnorm.kernels.contract import Affine
from batchnorm.stats.running import Running

try:
    from batchnorm.kernels import _cpu, cpu
except ImportError:  # installed without a compiler
    INSTRUCTION_SETS = []
else:
    INSTRUCTION_SETS = _cpu.instruction_sets()


QUICK = ["reference", *INSTRUCTION_SETS]
"""Interpreted kernels take a tenth of a second a program: they meet each view in each form, and the dtypes in turn; but
for many channels, which are as many programs."""


def _cases(views, dtypes, forms):
    """Marks a test with each view, dtype and form for each backend."""
    cases = [
        (name, view, dtype, form)
        for name, view, dtype, form in itertools.product(QUICK, views, dtypes, forms)
        if name != "avx512bf16" or dtype.id == "bfloat16"  # has nothing of its own for others
    ]
    few = [view for view in views if view.id != "many-channels"]
    for (i, view), (j, form) in itertools.product(enumerate(few), enumerate(forms)):
        cases.append(("triton", view, dtypes[(i + j) % len(dtypes)], form))
    params = [
        pytest.param(name, view.values[0], dtype.values[0], form, id=f"{name}-{view.id}-{dtype.id}-{form}")
        for name, view, dtype, form in cases
    ]
    return pytest.mark.parametrize(("backend", "view", "dtype", "form"), params, indirect=["backend"])


@pytest.fixture(params=[*QUICK, "triton"])
def backend(request):
    """Each backend; the CPU core with every instruction set that the machine has, Triton's kernels interpreted."""
    if request.param == "reference":
        yield reference
        return
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        with np.errstate(all="ignore"):  # the interpreter computes with NumPy, whose warnings a GPU does not know
            yield importlib.import_module("batchnorm.kernels.triton.backend")
        return
    before = _cpu.instruction_set()
    _cpu.choose_instruction_set(request.param)
    yield cpu
    _cpu.choose_instruction_set(before)


def _case(view, dtype, *, with_affine=True, masked=False):
    x = view.make(dtype)
    weight, bias = make_parameters((x.shape[1],), dtype) if with_affine else (None, None)
    mask = None
    if masked:
        mask = torch.rand(x.shape[0], 1, x.shape[2], generator=torch.Generator().manual_seed(3)) < 0.7
        mask[:1, :, :1] = True
    return SimpleNamespace(x=x, dy=make_like(x, 1), residual=make_like(x, 2), weight=weight, bias=bias, mask=mask)


def _numpy(tensor):
    return None if tensor is None else tensor.double().numpy()


def _expected(case, activation, *, with_residual, given=None, eps=1e-5):
    return oracle.train(
        _numpy(case.x),
        _numpy(case.dy),
        _numpy(case.weight),
        _numpy(case.bias),
        eps=eps,
        mask=None if case.mask is None else case.mask[:, 0].numpy(),
        activation=activation,
        residual=_numpy(case.residual) if with_residual else None,
        given=given,
    )


def _gradient_scale(case, expected, eps=1e-5):
    """Gradients grow with 1 / sqrt(var + eps) where a channel hardly varies, and their errors with them."""
    return max(1.0, float(1 / np.sqrt(expected.var.min() + eps)))


@_cases(VIEW_PARAMS, DTYPES, ["whole", "masked"])
def test_stats(backend, view, dtype, form):
    case = _case(view, dtype, masked=form == "masked")
    moments = backend.stats(case.x, case.mask)
    mean, var, count = oracle.moments(_numpy(case.x), mask=None if case.mask is None else case.mask[:, 0].numpy())
    assert moments.mean.shape == moments.var.shape == (case.x.shape[1],)
    # Statistics are float32 at least, whatever the dtype of the values.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(moments.mean, mean, exact)
    close(moments.var, var, exact)
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(moments.count), count.shape), count)


@_cases(VIEW_PARAMS, DTYPES, ["plain", "affine", "affine-relu", "affine-residual-relu", "masked-residual-gelu"])
def test_forward_and_backward(backend, view, dtype, form):
    case = _case(view, dtype, with_affine=form != "plain", masked="masked" in form)
    activation = {"relu": "relu", "gelu": "gelu"}.get(form.split("-")[-1])
    residual = case.residual if "residual" in form else None
    affine = Affine(case.weight, case.bias, 1e-5, activation)
    expected = _expected(case, activation, with_residual=residual is not None)
    moments = backend.stats(case.x, case.mask)
    y = backend.apply(case.x, moments, affine, residual)
    sums = backend.backward_reduce(case.dy, case.x, moments, affine, residual)
    dx, dresidual = backend.backward_apply(case.dy, case.x, moments, affine, residual, sums=sums, mask=case.mask)
    scale = _gradient_scale(case, expected)
    values = math.prod(case.x.shape) / case.x.shape[1]
    assert y.dtype == dx.dtype == dtype
    assert y.shape == dx.shape == case.x.shape
    close(y, expected.y, dtype, scale)
    close(dx, expected.dx, dtype, scale)
    close(sums.dz, expected.dbias, dtype, values**0.5)
    close(sums.dz_xhat, expected.dweight, dtype, scale * values**0.5)
    assert (dresidual is None) == (residual is None)
    if residual is not None:
        assert dresidual.dtype == dtype
        close(dresidual, expected.dresidual, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_estimated", [True, False], ids=["batch", "given"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_activations(backend, activation, is_estimated, with_residual):
    case = _case(VIEW_PARAMS[2].values[0], torch.float32)
    residual = case.residual if with_residual else None
    given = None if is_estimated else (np.linspace(-1, 1, 3), np.linspace(0.1, 4, 3))
    statistics = backend.stats(case.x) if is_estimated else Running(*(torch.tensor(g).float() for g in given))
    affine = Affine(case.weight, case.bias, 1e-5, activation)
    expected = _expected(case, activation, with_residual=with_residual, given=given)
    y = backend.apply(case.x, statistics, affine, residual)
    sums = backend.backward_reduce(case.dy, case.x, statistics, affine, residual)
    dx, _ = backend.backward_apply(
        case.dy, case.x, statistics, affine, residual, sums=sums if is_estimated else None, mask=None
    )
    close(y, expected.y, torch.float32, 2)
    close(dx, expected.dx, torch.float32, 5)
    close(sums.dz, expected.dbias, torch.float32, 5)
    close(sums.dz_xhat, expected.dweight, torch.float32, 10)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_takes_either_parameter_dtype(backend, parameter_dtype):
    case = _case(VIEW_PARAMS[2].values[0], torch.bfloat16)
    case.weight, case.bias = (p.to(parameter_dtype) for p in (case.weight, case.bias))
    y = backend.apply(case.x, backend.stats(case.x), Affine(case.weight, case.bias, 1e-5, None))
    expected = _expected(case, None, with_residual=False)
    assert y.dtype == torch.bfloat16
    close(y, expected.y, torch.bfloat16)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_eps(backend, eps):
    case = _case(VIEW_PARAMS[2].values[0], torch.float32)
    moments, affine = backend.stats(case.x), Affine(case.weight, case.bias, eps, None)
    expected = _expected(case, None, with_residual=False, eps=eps)
    sums = backend.backward_reduce(case.dy, case.x, moments, affine)
    dx, _ = backend.backward_apply(case.dy, case.x, moments, affine, sums=sums)
    close(backend.apply(case.x, moments, affine), expected.y, torch.float32)
    close(dx, expected.dx, torch.float32)


@pytest.mark.parametrize("strides", ["contiguous", "channels-last"])
def test_output_keeps_the_strides_of_x(backend, strides):
    x = torch.randn(4, 3, 7) if strides == "contiguous" else torch.randn(4, 7, 3).transpose(1, 2)
    moments, affine = backend.stats(x), Affine(None, None, 1e-5, None)
    assert backend.apply(x, moments, affine).stride() == x.stride()
    dy = torch.randn_like(x)
    sums = backend.backward_reduce(dy, x, moments, affine)
    assert backend.backward_apply(dy, x, moments, affine, sums=sums)[0].stride() == x.stride()


@pytest.mark.parametrize("large", [1e4, 1e6, -1e4])
def test_a_large_mean_costs_no_accuracy(backend, large):
    x = (torch.randn(64, 3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + large).float()
    mean, var, _ = oracle.moments(x.numpy())
    moments = backend.stats(x)
    np.testing.assert_allclose(np.asarray(moments.var), var, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(moments.mean), mean, rtol=1e-9)
    y = backend.apply(x, moments, Affine(None, None, 1e-5, None))
    np.testing.assert_allclose(y.numpy(), oracle.normalise(x.numpy(), mean, var), atol=2e-5)
    dy = make_like(x, 1)
    affine = Affine(None, None, 1e-5, None)
    dx, _ = backend.backward_apply(dy, x, moments, affine, sums=backend.backward_reduce(dy, x, moments, affine))
    close(dx, oracle.train(x.numpy(), dy.numpy()).dx, torch.float32)


def test_a_constant_channel_gives_the_bias_alone(backend):
    x = torch.full((8, 2, 3), 1000.1)
    moments = backend.stats(x)
    y = backend.apply(x, moments, Affine(torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 5.0]), 1e-5, None))
    assert moments.var.tolist() == [0.0, 0.0]
    torch.testing.assert_close(y, torch.tensor([-1.0, 5.0]).view(1, 2, 1).expand(8, 2, 3), rtol=0, atol=1e-5)


def test_no_values_at_all(backend):
    for shape in ((0, 3, 4), (4, 3, 0)):
        x = torch.zeros(shape)
        moments, affine = backend.stats(x), Affine(torch.ones(3), torch.zeros(3), 1e-5, "relu")
        assert (moments.mean.tolist(), moments.var.tolist(), int(moments.count)) == ([0.0] * 3, [0.0] * 3, 0)
        assert backend.apply(x, moments, affine).shape == shape
        sums = backend.backward_reduce(x, x, moments, affine)
        assert sums.dz.tolist() == sums.dz_xhat.tolist() == [0.0] * 3
        assert backend.backward_apply(x, x, moments, affine, sums=sums)[0].shape == shape


def test_a_mask_without_a_value(backend):
    x, mask = torch.randn(4, 3, 2), torch.zeros(4, 1, 2, dtype=torch.bool)
    moments, affine = backend.stats(x, mask), Affine(None, None, 1e-5, None)
    assert moments.mean.tolist() == moments.var.tolist() == [0.0] * 3
    assert int(torch.as_tensor(moments.count).max()) == 0
    sums = backend.backward_reduce(x, x, moments, affine)
    dx, _ = backend.backward_apply(x, x, moments, affine, sums=sums, mask=mask)
    close(dx, oracle.train(x.numpy(), x.numpy(), mask=mask[:, 0].numpy()).dx, torch.float32, 1000)


def test_nan_and_infinity_are_seen(backend):
    """A batch that is not finite must show in the moments, channel by channel, and NaN must pass the activation."""
    x = torch.randn(6, 3, 2)
    x[1, 0, 0], x[2, 1, 1] = float("nan"), float("inf")
    moments = backend.stats(x)
    assert torch.isfinite(moments.mean + moments.var).tolist() == [False, False, True]
    y = backend.apply(x, Running(torch.zeros(3), torch.ones(3)), Affine(None, None, 1e-5, "relu"))
    assert y[1, 0, 0].isnan()
    assert y[2, 1, 1].isinf()


def test_half_precision_statistics_do_not_swallow_eps(backend):
    x, mean, var = torch.randn(50, 3, 1), torch.zeros(3), torch.rand(3) * 1e-3
    half = Running(mean.bfloat16(), var.bfloat16())
    whole = Running(half.mean.float(), half.var.float())
    affine = Affine(None, None, 1e-5, None)
    torch.testing.assert_close(backend.apply(x, half, affine), backend.apply(x, whole, affine))
