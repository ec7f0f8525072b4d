"""batch_norm(): values and gradients against the oracle, derivatives of any order, torch.func."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from cases import ACTIVATIONS, DTYPES, LAYOUT_PARAMS, close, make_like, make_parameters
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from batchnorm import Moments, batch_norm
from batchnorm.stats.running import Running

# Forward-mode autograd loads parts of torch that are themselves deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

AXES = [
    # input shape, channel axes as given, ascending and not negative
    ((5, 4), -1, (1,)),
    ((5, 4), 0, (0,)),
    ((5, 4), (1,), (1,)),
    ((6, 5, 4), -1, (2,)),
    ((3, 5, 4), 0, (0,)),
    ((3, 5, 4), (0, 2), (0, 2)),
    ((3, 5, 4), (-1, 0), (0, 2)),
    ((3, 5, 4), (0, 1), (0, 1)),
    ((3, 2, 5, 4), (1, 3), (1, 3)),
    ((3, 2, 5, 4), (0, 1), (0, 1)),
    ((3, 2, 5, 4), -1, (3,)),
    ((2, 3, 2, 3, 2), (1, 2, 4), (1, 2, 4)),
]


def _step(x, dy, weight=None, bias=None, residual=None, **options):
    """One forward and backward: y, Moments and the gradients of whatever was given."""
    leaves = [t.detach().requires_grad_() if t is not None else None for t in (x, weight, bias, residual)]
    y, moments = batch_norm(leaves[0], leaves[1], leaves[2], residual=leaves[3], **options)
    y.backward(dy)
    return y, moments, *(None if leaf is None else leaf.grad for leaf in leaves)


def _numpy(tensor):
    return None if tensor is None else tensor.detach().double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_values_and_gradients(layout, dtype):
    x = layout.make(dtype)
    dy, residual = make_like(x, 1), make_like(x, 2)
    weight, bias = make_parameters((x.shape[1],), dtype)
    y, moments, dx, dweight, dbias, dresidual = _step(x, dy, weight, bias, residual, activation="silu")
    expected = oracle.train(*map(_numpy, (x, dy, weight, bias)), activation="silu", residual=_numpy(residual))
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert moments.mean.dtype == moments.var.dtype == torch.float64
    assert not moments.mean.requires_grad
    scale = max(1.0, float(1 / np.sqrt(expected.var.min() + 1e-5))) * 2
    values = (x.numel() / x.shape[1]) ** 0.5
    close(y, expected.y, dtype, scale)
    close(dx, expected.dx, dtype, scale)
    close(dweight, expected.dweight, dtype, scale * values)
    close(dbias, expected.dbias, dtype, values)
    close(dresidual, expected.dresidual, dtype)
    close(moments.mean, expected.mean, torch.float64 if dtype == torch.float64 else torch.float32)
    close(moments.var, expected.var, torch.float64 if dtype == torch.float64 else torch.float32)
    assert int(moments.count) == expected.count.max()


@pytest.mark.parametrize(("shape", "given", "channels"), AXES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_channel_axes(shape, given, channels, masked):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    dy = torch.randn(shape, dtype=torch.float64)
    weight, bias = make_parameters(tuple(shape[axis] for axis in channels), torch.float64)
    mask = None
    if masked:
        mask = torch.rand([s for axis, s in enumerate(shape) if axis not in channels]) > 0.3
        mask.view(-1)[:2] = True
    y, moments, dx, dweight, dbias, _ = _step(x, dy, weight, bias, channel_axis=given, mask=mask)
    expected = oracle.train(
        *map(_numpy, (x, dy, weight, bias)), channels=channels, mask=None if mask is None else mask.numpy()
    )
    for found, value in ((y, expected.y), (dx, expected.dx), (dweight, expected.dweight), (dbias, expected.dbias)):
        close(found, value, torch.float64, 100)
    assert moments.mean.shape == moments.var.shape == weight.shape
    close(moments.mean, expected.mean, torch.float64)
    close(moments.var, expected.var, torch.float64)
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(moments.count), expected.count.shape), expected.count)
    # Given moments have the shape of the channel axes too.
    again, same = batch_norm(x, weight, bias, moments=moments, channel_axis=given)
    assert same is moments
    close(again, expected.y, torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["plain", "residual", "masked", "masked-residual", "given", "given-residual"])
def test_first_and_second_derivatives(activation, form):
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weight, bias = make_parameters((2,), torch.float64)
    residual = make_like(x, 6) if "residual" in form else None
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]) > 0 if "masked" in form else None
    given = Running(torch.tensor([0.3, -0.2]).double(), torch.tensor([0.7, 1.9]).double()) if "given" in form else None
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]

    def output(x, weight, bias, residual=None):
        return batch_norm(x, weight, bias, moments=given, mask=mask, activation=activation, residual=residual)[0]

    assert gradcheck(output, inputs, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(output, inputs, check_batched_grad=True)


def test_derivatives_with_respect_to_given_moments():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(2, dtype=torch.float64, requires_grad=True)
    var = torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()

    def with_moments(x, mean, var):
        return batch_norm(x, moments=Moments(mean, var, 5))[0]

    def with_running(x, mean, var):
        return batch_norm(x, moments=Running(mean, var))[0]

    for output in (with_moments, with_running):
        assert gradcheck(output, (x, mean, var))
        assert gradgradcheck(output, (x, mean, var))


def test_moments_in_the_graph_give_the_batchs_own_gradient():
    """Normalising with Moments.of(x), kept in the graph, is normalising with the batch."""
    x, dy = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    x.requires_grad_()
    y, _ = batch_norm(x, moments=Moments.of(x, 0))
    (dx,) = torch.autograd.grad(y, x, dy)
    close(dx, oracle.train(x.detach().numpy(), dy.numpy()).dx, torch.float64)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_any_choice_of_inputs_that_require_grad(wanted, activation):
    x, residual, dy = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    weight, bias = make_parameters((3,), torch.float64)
    expected = oracle.train(*map(_numpy, (x, dy, weight, bias)), activation=activation, residual=_numpy(residual))
    grads = (expected.dx, expected.dweight, expected.dbias, expected.dresidual)
    inputs = [t.requires_grad_(want) for t, want in zip((x, weight, bias, residual), wanted, strict=True)]
    y, _ = batch_norm(inputs[0], inputs[1], inputs[2], residual=inputs[3], activation=activation)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        for create_graph in (True, False):
            chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
            found = torch.autograd.grad(y, chosen, dy, retain_graph=True, create_graph=create_graph)
            for value, exact in zip(found, itertools.compress(grads, wanted), strict=True):
                close(value, exact, torch.float64)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_torch_func_transforms(activation):
    x = torch.randn(4, 2, dtype=torch.float64)
    weight, bias = make_parameters((2,), torch.float64)
    plain = torch.autograd.functional.jacobian(lambda *a: batch_norm(*a, activation=activation)[0], (x, weight, bias))

    def output(*args):
        return batch_norm(*args, activation=activation)[0]

    for transform in (jacrev, jacfwd):
        for found, expected in zip(transform(output, argnums=(0, 1, 2))(x, weight, bias), plain, strict=True):
            torch.testing.assert_close(found, expected)

    def loss(x):
        return output(x, weight, bias).pow(3).sum()

    torch.testing.assert_close(grad(loss)(x), torch.autograd.functional.jacobian(loss, x))
    torch.testing.assert_close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))
    tangent = torch.randn_like(x)
    _, forward = jvp(lambda x: output(x, weight, bias), (x,), (tangent,))
    torch.testing.assert_close(forward, torch.einsum("ijkl,kl->ij", plain[0], tangent))


def test_vmap_over_networks_and_over_inputs():
    x, weight, bias = torch.randn(5, 8, 3), torch.rand(5, 3), torch.randn(5, 3)
    y, moments = vmap(batch_norm)(x, weight, bias)
    for i in range(5):
        one, used = batch_norm(x[i], weight[i], bias[i])
        torch.testing.assert_close(y[i], one)
        torch.testing.assert_close(moments.var[i], used.var)
    assert moments.count.tolist() == [8] * 5
    shared = vmap(lambda x: batch_norm(x, weight[0], bias[0])[0], in_dims=1, out_dims=1)(x.transpose(0, 1))
    torch.testing.assert_close(shared[:, 0], batch_norm(x[0], weight[0], bias[0])[0])


def test_vmap_of_masks_and_of_given_moments():
    x, mask = torch.randn(4, 6, 3), torch.rand(4, 6) > 0.2
    y = vmap(lambda x, m: batch_norm(x, mask=m)[0])(x, mask)
    for i in range(4):
        torch.testing.assert_close(y[i], batch_norm(x[i], mask=mask[i])[0])
    mean, var = torch.randn(4, 3), torch.rand(4, 3)
    y = vmap(lambda x, mean, var: batch_norm(x, moments=Running(mean, var))[0])(x, mean, var)
    torch.testing.assert_close(y[1], batch_norm(x[1], moments=Running(mean[1], var[1]))[0])


def test_gradients_for_each_example_and_auxiliary_output():
    weight, x = torch.rand(3), torch.randn(4, 6, 3)

    def loss(weight, x):
        y, moments = batch_norm(x, weight)
        return y.pow(2).sum(), moments

    grads, moments = vmap(grad(loss, has_aux=True), in_dims=(None, 0))(weight, x)
    for i in range(4):
        torch.testing.assert_close(grads[i], grad(lambda w: loss(w, x[i])[0])(weight))  # noqa: B023
    assert moments.mean.shape == (4, 3)


def test_functional_call_with_weights_as_arguments():
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64)

    def loss(parameters):
        return batch_norm(functional_call(layer, parameters, (x,)))[0].pow(4).sum()

    parameters = dict(layer.named_parameters())
    found = grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), parameters.values())
    torch.testing.assert_close(tuple(found.values()), expected)


def test_forward_mode():
    x, tangent = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        y, moments = batch_norm(forward_ad.make_dual(x, tangent))
        found = forward_ad.unpack_dual(y).tangent
        assert forward_ad.unpack_dual(moments.mean).tangent is None
    jacobian = torch.autograd.functional.jacobian(lambda x: batch_norm(x)[0], x)
    torch.testing.assert_close(found, torch.einsum("ijkl,kl->ij", jacobian, tangent))


def test_a_gradient_penalty_trains():
    """Double backward inside of a loss, as in WGAN-GP, through a small network."""
    torch.manual_seed(0)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def penalty(weight):
        y, _ = batch_norm(x @ weight, activation="silu")
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return dx.norm()

    assert gradcheck(penalty, weight)


@pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
def test_without_autograd(name):
    x = torch.randn(4, 3, requires_grad=True)
    with getattr(torch, name)():
        y, _ = batch_norm(x, torch.ones(3), torch.zeros(3))
    assert not y.requires_grad
    close(y, oracle.train(_numpy(x), np.zeros((4, 3))).y, torch.float32)


def test_its_inputs_stay_as_they_were():
    x, weight, bias, residual = torch.randn(4, 3), torch.rand(3), torch.rand(3), torch.randn(4, 3)
    mask = torch.tensor([True, True, True, False])
    x[3] = float("nan")
    before = [t.clone() for t in (x, weight, bias, residual, mask)]
    batch_norm(x, weight, bias, residual=residual, mask=mask, activation="relu")
    for now, then in zip((x, weight, bias, residual, mask), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def test_weight_and_bias_of_float32_with_half_precision_input():
    for dtype in (torch.bfloat16, torch.float16):
        x, dy = torch.randn(8, 3).to(dtype), torch.randn(8, 3).to(dtype)
        weight, bias = make_parameters((3,), torch.float32)
        y, _, dx, dweight, dbias, _ = _step(x, dy, weight, bias)
        assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (dtype, dtype, torch.float32, torch.float32)
        expected = oracle.train(*map(_numpy, (x, dy, weight, bias)))
        close(y, expected.y, dtype)
        close(dweight, expected.dweight, torch.float32, 10)


def test_a_stack_of_networks_is_each_network_alone():
    x, weight, bias = torch.randn(3, 10, 4), torch.rand(3, 4), torch.randn(3, 4)
    y, moments = batch_norm(x, weight, bias, channel_axis=(0, 2))
    for k in range(3):
        one, used = batch_norm(x[k], weight[k], bias[k])
        torch.testing.assert_close(y[k], one)
        torch.testing.assert_close(moments.mean[k], used.mean)


# Masks


MASKS = [
    ((6, 3), (6,)),
    ((6, 3), (1,)),
    ((6, 3, 4), (6, 4)),
    ((6, 3, 4), (6, 1)),
    ((6, 3, 4), (4,)),
    ((6, 3, 4, 5), (6, 1, 1)),
    ((6, 3, 4, 5), (4, 5)),
    ((6, 3, 4, 5), (1, 4, 1)),
]


@pytest.mark.parametrize(("shape", "mask_shape"), MASKS, ids=str)
def test_mask_shapes(shape, mask_shape):
    x, dy = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask.view(-1)[0] = True
    y, moments, dx, *_ = _step(x, dy, mask=mask)
    expected = oracle.train(x.numpy(), dy.numpy(), mask=mask.numpy())
    close(y, expected.y, torch.float64)
    close(dx, expected.dx, torch.float64)
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(moments.count), (3,)), expected.count)


GARBAGE = [0.0, 1e30, -1e30, 3e38, float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["input", "residual", "both", "given moments"])
def test_padding_may_hold_anything(garbage, activation, where):
    """Output and gradients of what counts are those of a batch without the padding; all others are finite."""
    kept, padded = 5, 3
    x, residual, dy = (torch.randn(kept, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weight, bias = make_parameters((4,), torch.float32)
    given = {"moments": Running(torch.zeros(4), torch.ones(4))} if where == "given moments" else {}
    expected = _step(x, dy, weight, bias, residual, activation=activation, **given)
    junk = torch.full((padded, 4), garbage)
    fine = torch.zeros(padded, 4)
    x_padded = torch.cat([x, fine if where == "residual" else junk])
    residual_padded = torch.cat([residual, junk if where in ("residual", "both") else fine])
    mask = torch.arange(kept + padded) < kept
    found = _step(
        x_padded,
        torch.cat([dy, torch.zeros(padded, 4)]),
        weight,
        bias,
        residual_padded,
        activation=activation,
        mask=mask,
        **given,
    )
    for name, value, exact in zip(
        ("y", "dx", "dresidual"), (found[0], found[2], found[5]), (expected[0], expected[2], expected[5]), strict=True
    ):
        torch.testing.assert_close(value[:kept], exact, rtol=1e-5, atol=1e-6, msg=name)
    assert found[2].isfinite().all()
    assert found[5].isfinite().all()
    torch.testing.assert_close(found[3:5], expected[3:5], rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything_in_the_second_derivative():
    x = torch.randn(6, 2, dtype=torch.float64)
    mask = torch.arange(6) < 4
    x[4:] = float("nan")
    x.requires_grad_()
    y, _ = batch_norm(x, mask=mask, activation="silu")
    (dx,) = torch.autograd.grad(y[:4].pow(3).sum(), x, create_graph=True)
    dx.pow(2).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[4:] == 0).all()


def test_a_mask_that_leaves_nothing():
    x = torch.randn(5, 3, requires_grad=True)
    y, moments = batch_norm(x, mask=torch.zeros(5, dtype=torch.bool))
    y.sum().backward()
    assert (moments.mean.tolist(), moments.var.tolist()) == ([0.0] * 3, [0.0] * 3)
    assert (torch.as_tensor(moments.count) == 0).all()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_a_mask_of_true_is_no_mask():
    x, dy = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    whole, masked = _step(x, dy), _step(x, dy, mask=torch.ones(5, 4, dtype=torch.bool))
    torch.testing.assert_close(whole[0], masked[0])
    torch.testing.assert_close(whole[2], masked[2])


# Hard data


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("axis", [1, -1])
def test_float32_with_a_large_mean(mean, axis):
    x = (torch.randn(64, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean).float()
    dy = torch.randn(64, 16, 16)
    y, moments, dx, *_ = _step(x, dy, channel_axis=axis)
    expected = oracle.train(x.numpy(), dy.numpy(), channels=(axis % 3,))
    np.testing.assert_allclose(moments.var, expected.var, rtol=1e-5)
    np.testing.assert_allclose(y.detach().numpy(), expected.y, atol=2e-5)
    np.testing.assert_allclose(dx.numpy(), expected.dx, atol=2e-5)


def test_zero_variance():
    x = torch.full((6, 2), 3.0)
    y, moments, dx, *_ = _step(x, torch.randn(6, 2), torch.ones(2), torch.tensor([1.0, -1.0]))
    assert moments.var.tolist() == [0.0, 0.0]
    torch.testing.assert_close(y, torch.tensor([1.0, -1.0]).expand(6, 2))
    assert dx.isfinite().all()


def test_it_can_undo_itself():
    """gamma = sqrt(var + eps), beta = mean: the identity (section 3 of the paper)."""
    x = torch.randn(20, 3, dtype=torch.float64) * 5 + 2
    _, moments = batch_norm(x)
    y, _ = batch_norm(x, (moments.var + 1e-5).sqrt(), moments.mean)
    torch.testing.assert_close(y, x)


def test_a_transposed_input_gives_an_output_that_can_be_viewed():
    """torch's layers answer a transposed input with a contiguous tensor, and networks call view() on it."""
    x = torch.randn(4, 7, 3).transpose(1, 2)
    y, _ = batch_norm(x)
    assert y.view(4, -1).shape == (4, 21)
    last, _ = batch_norm(x.transpose(1, 2), channel_axis=-1)
    assert last.is_contiguous()


def test_buffers_written_after_an_evaluation_leave_its_gradient():
    """torch.nn's gradient changes silently in this case."""
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3, requires_grad=True)
    y, _ = batch_norm(x, moments=Running(mean, var), eps=0.0)
    var.fill_(100)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 3))
