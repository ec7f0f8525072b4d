"""Models with batchnorm.keras.BatchNormalization: trained, saved, loaded, cloned; on the backend of KERAS_BACKEND."""

from __future__ import annotations

import copy

import keras
import numpy as np
import pytest
from keras_calls import BACKEND, array, weights
from sklearn.datasets import load_digits

from batchnorm.keras import BatchNormalization, clone_layer

VERSION = tuple(int(part) for part in keras.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    # Whole batches of most sizes here: JAX compiles everything once more for a shorter one.
    return (images[:1280], labels[:1280]), (images[1280:1536], labels[1280:1536])


@pytest.fixture(autouse=True)
def _keras_seed():
    keras.utils.set_random_seed(0)


def dense(layer=BatchNormalization, widths=(64, 32)):
    """As the courses write it."""
    inputs = x = keras.Input((64,))
    for units in widths:
        x = keras.layers.Dense(units, activation="relu")(x)
        x = layer()(x)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))


def convolutional(layer=BatchNormalization, **arguments):
    stack = [keras.Input((8, 8, 2)), keras.layers.Conv2D(4, 3, use_bias=False), layer(**arguments)]
    model = keras.Sequential([*stack, keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(3)])
    rng = np.random.default_rng(1)
    model.set_weights([rng.random(weight.shape) + 0.5 for weight in model.weights])
    return model


IMAGES = np.random.default_rng(0).standard_normal((5, 8, 8, 2)).astype("float32")


def predictions(model, inputs=IMAGES):
    return model.predict(inputs, verbose=0)


def test_the_courses_model_is_fitted_evaluated_saved_and_loaded(digits, tmp_path):
    train, test = digits
    model = dense()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(*train, epochs=12, batch_size=64, validation_data=test, verbose=0)
    loss, accuracy = model.evaluate(*test, verbose=0)
    assert history.history["accuracy"][-1] > 0.97
    assert accuracy > 0.85
    assert accuracy == pytest.approx(history.history["val_accuracy"][-1])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    np.testing.assert_array_equal(predictions(loaded, test[0]), predictions(model, test[0]))
    assert loaded.evaluate(*test, verbose=0)[0] == pytest.approx(loss)
    loaded.fit(*train, epochs=1, verbose=0)  # with the optimizer's state
    assert (weights(loaded.layers[2])["moving_mean"] != weights(model.layers[2])["moving_mean"]).any()


def test_fit_gives_what_it_gives_with_keras_layer(digits):
    """With images, whose statistics are harmless, the two cannot be told apart."""
    train, test = digits
    models = dense(BatchNormalization, (16,)), dense(keras.layers.BatchNormalization, (16,))
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        model.fit(*train, epochs=1, batch_size=192, shuffle=False, verbose=0)  # the last one is shorter
    ours, theirs = (predictions(model, test[0]) for model in models)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_frozen_layer_stays_as_it_is_through_fit(digits):
    (images, labels), _ = digits
    model = dense()
    model.layers[2].trainable = False
    model.compile("adam", "sparse_categorical_crossentropy")
    frozen, other = weights(model.layers[2]), weights(model.layers[4])
    model.fit(images, labels, epochs=1, batch_size=256, verbose=0)
    for name, value in weights(model.layers[2]).items():
        np.testing.assert_array_equal(value, frozen[name])
    assert (weights(model.layers[4])["moving_variance"] != other["moving_variance"]).all()


def test_a_large_offset_of_the_features_does_not_stop_training(digits):
    (images, labels), _ = digits
    inputs = keras.Input((64,))
    model = keras.Sequential([inputs, BatchNormalization(momentum=0.5), keras.layers.Dense(10, activation="softmax")])
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(images + 1e3, labels, epochs=4, verbose=0)
    assert history.history["accuracy"][-1] > 0.95
    assert (weights(model.layers[0])["moving_variance"] >= 0).all()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles nothing there unless asked, and takes a minute for it")
def test_compiled_or_not_it_is_the_same(digits):
    (images, labels), _ = digits
    models = dense(widths=(16,)), dense(widths=(16,))
    models[1].set_weights(models[0].get_weights())
    for model, jit_compile in zip(models, (False, True), strict=True):
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", jit_compile=jit_compile)
        for start in (0, 256):
            model.train_on_batch(images[start : start + 256], labels[start : start + 256])
    for one, other in zip(*(model.weights for model in models), strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"axis": (1, 3)}, {"renorm": True}, {"axis": 1, "momentum": 0.5}], ids=str)
def test_a_saved_model_loads_as_it_was(tmp_path, arguments):
    model = convolutional(**arguments)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predictions(loaded), predictions(model))
    assert loaded.layers[1].get_config() == model.layers[1].get_config()


def test_a_saved_model_of_ours_loads_with_keras_own_layer(tmp_path, monkeypatch):
    model = convolutional()
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    # As it is where this library is not installed.
    monkeypatch.delitem(keras.saving.get_custom_objects(), "batchnorm>BatchNormalization")
    theirs = {"batchnorm>BatchNormalization": keras.layers.BatchNormalization}
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=theirs)
    assert type(loaded.layers[1]) is keras.layers.BatchNormalization
    np.testing.assert_allclose(predictions(loaded), predictions(model), rtol=1e-5, atol=1e-5)
    again = convolutional(keras.layers.BatchNormalization)
    again.set_weights([weight * 0 for weight in again.get_weights()])
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(predictions(again), predictions(model), rtol=1e-5, atol=1e-5)


def test_a_saved_model_with_keras_layer_becomes_ours(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(epsilon=0.1)])
    old = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(momentum=0.5), inner])
    rng = np.random.default_rng(1)
    old.set_weights([rng.random(weight.shape) + 0.5 for weight in old.weights])
    old.save(tmp_path / "old.keras")
    loaded = keras.models.load_model(tmp_path / "old.keras")
    new = keras.models.clone_model(loaded, clone_function=clone_layer, recursive=True)
    new.set_weights(loaded.get_weights())
    first, second = new.layers[0], new.layers[1].layers[1]
    assert type(first) is type(second) is BatchNormalization
    assert (first.momentum, second.epsilon) == (0.5, 0.1)
    x = rng.standard_normal((5, 4)).astype("float32")
    np.testing.assert_allclose(predictions(new, x), predictions(old, x), rtol=1e-5, atol=1e-5)


def test_masks_of_other_layers_arrive():
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    embedding, layer = keras.layers.Embedding(5, 3, mask_zero=True), BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((4,)), embedding, layer, keras.layers.GlobalAveragePooling1D()])
    model(tokens, training=True)
    seen = array(embedding(tokens))[tokens > 0]
    np.testing.assert_allclose(weights(layer)["moving_mean"], seen.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(weights(layer)["moving_variance"], seen.var(0), rtol=1e-4)


def test_a_subclassed_model_is_built_and_fitted(digits):
    (images, labels), _ = digits

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = keras.layers.Dense(16), BatchNormalization(), keras.layers.Dense(10)

        def call(self, inputs, training=None):
            return self.last(keras.ops.relu(self.norm(self.first(inputs), training=training)))

    model = Model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    assert model.fit(images, labels, epochs=3, verbose=0).history["accuracy"][-1] > 0.9


def test_penalties_enter_the_loss(digits):
    (images, _), _ = digits
    x = images[:64]
    model = keras.Sequential([keras.Input((64,)), BatchNormalization(gamma_regularizer=keras.regularizers.L2(1.0))])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    without = float(np.mean((predictions(model, x) - x) ** 2))
    assert model.evaluate(x, x, verbose=0) == pytest.approx(without + 64, rel=1e-4)
    model.fit(x, x, epochs=1, batch_size=64, verbose=0)
    assert (weights(model.layers[0])["gamma"] < 0.99).all()  # 1 - 0.01 * 2 * 1, and a little from the error


@pytest.mark.skipif(BACKEND == "jax", reason="Keras 3.15 rematerialises no BatchNormalization there, its own neither")
@pytest.mark.skipif(VERSION < (3, 15), reason="earlier versions of Keras rematerialise otherwise, or not at all")
def test_a_rematerialised_layer_takes_a_batch_in_once():
    x = np.random.default_rng(0).standard_normal((16, 4)).astype("float32")
    with keras.RematScope(mode="full"):
        layer = BatchNormalization(momentum=0.5)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), layer])
    model.compile("sgd", "mse")
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    seen = array(twin.layers[0](x))
    model.train_on_batch(x, x)
    np.testing.assert_allclose(weights(layer)["moving_mean"], seen.mean(0) / 2, rtol=1e-4, atol=1e-6)


def test_a_layer_can_be_copied():
    layer = convolutional().layers[1]
    twin = copy.deepcopy(layer)
    for name, value in weights(twin).items():
        np.testing.assert_array_equal(value, weights(layer)[name])
