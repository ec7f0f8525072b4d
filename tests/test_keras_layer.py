"""batchnorm.keras.BatchNormalization against the oracle and against Keras' own, on the backend of KERAS_BACKEND."""

from __future__ import annotations

import inspect
import json

import keras
import numpy as np
import oracle
import pytest
from keras_calls import BACKEND, array, step, weights

from batchnorm.errors import ArgumentError, ShapeError, StatisticsWarning
from batchnorm.keras import BatchNormalization

EPS = 1e-3
CASES = [
    pytest.param((32, 5), -1, id="N,C"),
    pytest.param((8, 7, 3), -1, id="N,T,C"),
    pytest.param((8, 3, 7), 1, id="N,C,T"),
    pytest.param((3, 8, 7), 0, id="C-first-of-all"),
    pytest.param((4, 5, 6, 3), -1, id="N,H,W,C"),
    pytest.param((4, 3, 5, 6), 1, id="N,C,H,W"),
    pytest.param((2, 3, 4, 2, 5), 1, id="N,C,D,H,W"),
    pytest.param((4, 3, 5, 6), (1, 3), id="two-axes"),
    pytest.param((4, 3, 5, 6), (-1, 1), id="two-axes-descending"),
]


def numbers(shape, seed=0, mean=0.5, std=2.0):
    return (np.random.default_rng(seed).standard_normal(shape) * std + mean).astype(np.float32)


def channels_of(axis, shape):
    return tuple(sorted(one % len(shape) for one in (axis if isinstance(axis, tuple) else (axis,))))


def trained(axis, shape, **arguments):
    """A layer with gamma, beta and statistics that are not their defaults; and these."""
    layer = BatchNormalization(axis=axis, **arguments)
    layer.build(shape)
    rng = np.random.default_rng(7)
    for weight in layer.weights:
        weight.assign(rng.random(weight.shape) + 0.5)
    return layer, weights(layer)


def near(actual, expected, scale=1.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_a_training_step_is_the_papers(shape, axis, masked):
    channels = channels_of(axis, shape)
    x, dy = numbers(shape), numbers(shape, seed=1)
    rest = tuple(size for i, size in enumerate(shape) if i not in channels)
    mask = np.random.default_rng(2).random(rest) < 0.6 if masked else None
    layer, before = trained(axis, shape)
    got = step(layer, x, dy, mask, compiled=True)
    expected = oracle.train(x, dy, before["gamma"], before["beta"], eps=EPS, channels=channels, mask=mask)
    near(got.y, expected.y)
    near(got.dx, expected.dx)
    near(got.gradients["gamma"], expected.dweight, scale=10)
    near(got.gradients["beta"], expected.dbias, scale=10)
    near(got.statistics["moving_mean"], 0.99 * before["moving_mean"] + 0.01 * expected.mean)
    near(got.statistics["moving_variance"], 0.99 * before["moving_variance"] + 0.01 * expected.var)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_inference_uses_the_moving_statistics_and_leaves_them(shape, axis):
    channels = channels_of(axis, shape)
    x, dy = numbers(shape), numbers(shape, seed=1)
    layer, before = trained(axis, shape)
    got = step(layer, x, dy, training=False, compiled=True)
    given = before["moving_mean"], before["moving_variance"]
    expected = oracle.train(x, dy, before["gamma"], before["beta"], eps=EPS, channels=channels, given=given)
    near(got.y, expected.y)
    near(got.dx, expected.dx)
    near(got.gradients["gamma"], expected.dweight, scale=10)
    for name, value in got.statistics.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.5, "epsilon": 1e-5},
        {"center": False},
        {"scale": False},
        {"center": False, "scale": False},
        {"renorm": True},
        {"renorm": True, "renorm_clipping": {"rmax": 1.5, "rmin": 0.7, "dmax": 0.3}, "renorm_momentum": 0.8},
        {"renorm": True, "scale": False},
        {"renorm": True, "center": False, "scale": False},
    ],
    ids=str,
)
def test_three_steps_and_an_evaluation_are_those_of_keras(arguments):
    if "renorm" in arguments and "renorm" not in inspect.signature(keras.layers.BatchNormalization).parameters:
        pytest.skip("this version of Keras has no renorm")
    ours, theirs = BatchNormalization(**arguments), keras.layers.BatchNormalization(**arguments)
    for seed in range(3):
        x, dy = numbers((32, 4), seed), numbers((32, 4), seed + 10)
        got, expected = step(ours, x, dy), step(theirs, x, dy)
        near(got.y, expected.y)
        near(got.dx, expected.dx, scale=2)
        assert list(got.statistics) == list(expected.statistics)  # the weights and their order
        for name, value in expected.statistics.items():
            near(got.statistics[name], value)
        for name, value in expected.gradients.items():
            near(got.gradients[name], value, scale=10)
    near(array(ours(x)), array(theirs(x)))


def test_weights_go_over_to_keras_layer_and_back():
    layer, before = trained(-1, (8, 4))
    theirs = keras.layers.BatchNormalization()
    theirs.build((8, 4))
    theirs.set_weights(layer.get_weights())
    back = BatchNormalization()
    back.build((8, 4))
    back.set_weights(theirs.get_weights())
    for name, value in weights(back).items():
        np.testing.assert_array_equal(value, before[name])
    x = numbers((8, 4))
    near(array(theirs(x)), array(layer(x)))


@pytest.mark.parametrize("shape_axis", [((64, 5), -1), ((8, 3, 6, 6), 1)], ids=["N,C", "N,C,H,W"])
def test_a_mean_of_10000_keeps_its_digits(shape_axis):
    """Keras' own has a negative moving variance and NaN on the torch backend, and an error of 2e-3 on JAX."""
    shape, axis = shape_axis
    x, dy = numbers(shape, mean=1e4, std=1.0), numbers(shape, seed=1)
    layer = BatchNormalization(axis=axis, momentum=0.0)
    got = step(layer, x, dy, compiled=True)
    expected = oracle.train(x, dy, eps=EPS, channels=channels_of(axis, shape))
    np.testing.assert_allclose(got.y, expected.y, rtol=0, atol=5e-6)
    np.testing.assert_allclose(got.dx, expected.dx, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got.statistics["moving_variance"], expected.var, rtol=1e-5)
    np.testing.assert_allclose(got.statistics["moving_mean"], expected.mean, rtol=1e-7)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_what_a_mask_leaves_out_may_hold_anything(training):
    shape, mask = (6, 7, 3), np.arange(7)[None] < np.array([7, 3, 5, 1, 2, 7])[:, None]
    x, dy = numbers(shape), numbers(shape, seed=1) * mask[..., None]
    layer, before = trained(-1, shape)
    clean = step(layer, np.where(mask[..., None], x, 0), dy, mask, training)
    layer.set_weights([before[weight.name] for weight in layer.weights])
    padded = step(layer, np.where(mask[..., None], x, np.resize([np.nan, np.inf, -3e38], shape)), dy, mask, training)
    near(padded.dx, clean.dx)
    near(padded.y[mask], clean.y[mask])
    for name, value in clean.statistics.items():
        near(padded.statistics[name], value)
    for name, value in clean.gradients.items():
        near(padded.gradients[name], value)


def test_a_mask_of_the_first_axes_is_one_of_whole_steps():
    x = numbers((4, 5, 6, 3))
    mask = np.random.default_rng(0).random((4, 5)) < 0.5
    short, whole = BatchNormalization(), BatchNormalization()
    short(x, training=True, mask=mask)
    whole(x, training=True, mask=np.repeat(mask[..., None], 6, -1).astype("int32"))
    for name, value in weights(whole).items():
        near(weights(short)[name], value)


@pytest.mark.parametrize("shape", [(3, 7), (8, 6), (7,), (8, 7, 4), (8, 7, 1), ()])
def test_a_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(ShapeError, match=r"mask of shape .* does not fit .* without its channel axis, \(8, 7\)"):
        BatchNormalization()(numbers((8, 7, 4)), training=True, mask=np.ones(shape, bool))


@pytest.mark.parametrize("mask", [None, "nothing"], ids=["no-example", "nothing-counts"])
def test_an_empty_batch_leaves_the_statistics_alone(mask):
    x = numbers((0, 4)) if mask is None else numbers((5, 4))
    layer, before = trained(-1, (5, 4))
    y = array(layer(x, training=True, mask=None if mask is None else np.zeros(5, bool)))
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_one_value_a_channel_is_refused():
    with pytest.raises(ShapeError, match=r"Expected more than 1 value per channel when training.*Choose batch_size"):
        BatchNormalization()(numbers((1, 4)), training=True)
    assert array(BatchNormalization()(numbers((1, 4)))).shape == (1, 4)
    assert array(BatchNormalization()(numbers((1, 2, 4)), training=True)).shape == (1, 2, 4)


@pytest.mark.parametrize("renorm", [False, True], ids=["", "renorm"])
def test_a_batch_that_is_not_finite_stays_out_of_the_statistics(renorm):
    layer, before = trained(-1, (5, 4), renorm=renorm)
    x = numbers((5, 4))
    x[2, 1] = np.nan
    if BACKEND == "torch":
        with pytest.warns(StatisticsWarning, match="'batch_normalization.*' met a batch whose mean or variance is not"):
            layer(x, training=True)
    layer(x, training=True)  # said once
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_layer_that_is_not_trainable_is_in_inference_and_stays_as_it_is():
    layer, before = trained(-1, (8, 4))
    layer.trainable = False
    x = numbers((8, 4))
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x, training=False)))
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name])
    assert layer.trainable_variables == []
    layer.trainable = True
    layer(x, training=True)
    assert (weights(layer)["moving_mean"] != before["moving_mean"]).all()
    assert array(BatchNormalization(trainable=False)(x, training=True)) == pytest.approx(x / np.sqrt(1 + EPS), rel=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_statistics_are_float32_whatever_the_policy(policy):
    layer = BatchNormalization(dtype=policy, momentum=0.9)
    x = numbers((64, 4), mean=100.0, std=1.0)
    for _ in range(100):
        y = layer(x, training=True)
    half = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(y.dtype) == half
    assert {weight.dtype for weight in layer.non_trainable_variables} == {"float32"}
    # The input as the layer sees it; a bfloat16 mean would have stopped at 96.
    seen = array(keras.ops.cast(x, half))
    np.testing.assert_allclose(weights(layer)["moving_mean"], seen.mean(0) * (1 - 0.9**100), rtol=1e-5)
    np.testing.assert_allclose(array(y), (seen - seen.mean(0)) / np.sqrt(seen.var(0) + EPS), atol=2e-2)


def test_statistics_of_float16_input_do_not_overflow():
    x = numbers((64, 4), mean=3e4, std=1e4).clip(-6e4, 6e4)
    layer = BatchNormalization(dtype="mixed_float16", momentum=0.0)
    layer(x, training=True)
    np.testing.assert_allclose(weights(layer)["moving_variance"], x.astype(np.float16).astype("f8").var(0), rtol=1e-4)


def test_integers_are_read_as_float32():
    x = np.arange(40).reshape(10, 4)
    near(array(BatchNormalization()(x, training=True)), oracle.train(x, x, eps=EPS, channels=(1,)).y)


def test_the_config_gives_the_same_layer():
    arguments = {
        "axis": (1, -1),
        "momentum": 0.7,
        "epsilon": 1e-4,
        "center": False,
        "gamma_initializer": keras.initializers.RandomNormal(seed=1),
        "gamma_regularizer": keras.regularizers.L2(0.1),
        "gamma_constraint": keras.constraints.NonNeg(),
        "moving_variance_initializer": keras.initializers.Constant(2.0),
        "renorm": True,
        "renorm_clipping": {"rmax": 2.0},
        "renorm_momentum": 0.5,
        "name": "norm",
        "dtype": "mixed_bfloat16",
        "trainable": False,
    }
    layer = BatchNormalization(**arguments)
    config = layer.get_config()
    again = BatchNormalization.from_config(json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))["config"])
    assert config == again.get_config()
    assert again.axis == (1, -1)
    assert config["renorm_clipping"] == {"rmax": 2.0}
    assert again.gamma_regularizer.l2 == pytest.approx(0.1)
    assert not again.trainable
    assert set(keras.layers.BatchNormalization().get_config()) <= set(config)
    theirs = keras.layers.BatchNormalization(momentum=0.3).get_config()
    assert BatchNormalization.from_config(theirs).momentum == 0.3
    assert BatchNormalization.from_config({**theirs, "axis": [3]}).axis == 3  # as Keras 2 wrote it


def test_initializers_regularizers_and_constraints_do_their_work():
    layer = BatchNormalization(
        gamma_initializer=keras.initializers.Constant(-2.0),
        beta_initializer=keras.initializers.Constant(3.0),
        moving_mean_initializer=keras.initializers.Constant(4.0),
        moving_variance_initializer=keras.initializers.Constant(9.0),
        gamma_regularizer=keras.regularizers.L2(0.1),
        beta_regularizer=keras.regularizers.L1(1.0),
        gamma_constraint=keras.constraints.NonNeg(),
        beta_constraint=keras.constraints.MaxNorm(1.0),
        renorm=True,
    )
    layer(numbers((8, 5)))
    found = weights(layer)
    assert (found["moving_mean"] == 4).all()
    assert (found["moving_variance"] == 9).all()
    assert (found["renorm_mean"] == 4).all()
    assert (found["moving_stddev"] == 3).all()
    assert sum(array(loss) for loss in layer.losses) == pytest.approx(5 * (0.1 * 4 + 3))
    assert (array(layer.gamma.constraint(layer.gamma)) == 0).all()
    assert layer.beta.constraint is layer.beta_constraint


def test_symbolic_calls_give_shape_and_dtype():
    inputs = keras.Input((None, 6, 3))
    out = BatchNormalization(axis=(2, 3), dtype="mixed_bfloat16")(inputs)
    assert out.shape == (None, None, 6, 3)
    assert out.dtype == "bfloat16"
    spec = BatchNormalization().compute_output_spec(keras.KerasTensor((None, 3)))
    assert spec.shape == (None, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"axis": "last"}, "axis must be an int or a tuple of ints, got 'last'"),
        ({"axis": 1.5}, "axis must be an int or a tuple of ints"),
        ({"axis": ()}, "axis must be an int or a tuple of ints"),
        ({"momentum": 1.5}, r"momentum weights the old value and must be in \[0, 1\], got 1.5"),
        ({"renorm_momentum": -1}, "renorm_momentum weights"),
        ({"epsilon": -1e-3}, "epsilon must be at least 0, got -0.001"),
        ({"epsilon": float("nan")}, "epsilon must be at least 0"),
        ({"renorm": True, "renorm_clipping": {"max": 1}}, "may have the keys rmin, rmax, dmax; got max"),
        ({"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}}, "rmax must not be below rmin"),
        ({"renorm": True, "renorm_clipping": {"dmax": -1}}, "dmax must not be negative"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        BatchNormalization(**arguments)


@pytest.mark.parametrize(
    ("axis", "shape", "error", "words"),
    [
        (2, (8, 4), ShapeError, r"axis 2 is out of bounds for an input of shape \(8, 4\)"),
        (-3, (8, 4), ShapeError, "axis -3 is out of bounds"),
        ((1, -1), (8, 4), ArgumentError, "names one axis twice"),
        (1, (8, None, 4), ShapeError, "whose size must be known"),
    ],
)
def test_axes_that_an_input_does_not_have_are_refused(axis, shape, error, words):
    with pytest.raises(error, match=words):
        BatchNormalization(axis=axis).build(shape)


def test_an_input_of_another_shape_is_refused():
    layer = BatchNormalization()
    layer.build((None, 4))
    with pytest.raises(ValueError, match="expected axis 1 of input shape to have value 4"):
        layer(numbers((3, 5)))


def test_synchronized_is_refused_where_nothing_could_do_it(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ArgumentError, match="works on the backends torch, jax, tensorflow, and this is numpy"):
        BatchNormalization(synchronized=True)


def test_synchronized_alone_is_what_it_is_without():
    x = numbers((8, 4))
    near(array(BatchNormalization(synchronized=True)(x, training=True)), array(BatchNormalization()(x, training=True)))
