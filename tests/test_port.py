"""port(): from each framework into each, against the oracle; what it refuses, and that it then writes nothing."""

from __future__ import annotations

import copy
import json
import re

import keras
import numpy as np
import oracle
import pytest
import torch

import batchnorm
from batchnorm import BatchNorm, BatchNorm2d, BatchRenorm, SyncBatchNorm, freeze, port
from batchnorm.errors import ArgumentError, VerificationError
from batchnorm.keras import BatchNormalization

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("flax", minversion="0.12")

C = 3


def built(layer, shape=(None, 5, 5, C)):
    layer.build(shape)
    return layer


MAKERS = {
    "torch": lambda: torch.nn.BatchNorm2d(C),
    "ours": lambda: BatchNorm2d(C),
    "ours-last": lambda: BatchNorm(C, channel_axis=-1),
    "keras": lambda: built(keras.layers.BatchNormalization()),
    "keras-first": lambda: built(keras.layers.BatchNormalization(axis=1), (None, C, 5, 5)),
    "ours-keras": lambda: built(BatchNormalization()),
    "flax": lambda: nnx.BatchNorm(C, rngs=nnx.Rngs(0)),
}


def channels_last(kind):
    return kind in ("ours-last", "keras", "ours-keras", "flax")


def is_torch(kind):
    return kind in ("torch", "ours", "ours-last")


def read(layer):
    """mean, var, gamma, beta, as the layer holds them."""
    if isinstance(layer, keras.layers.Layer):
        found = layer.moving_mean, layer.moving_variance, layer.gamma, layer.beta
        return [keras.ops.convert_to_numpy(value).astype("f8") for value in found]
    if isinstance(layer, nnx.Module):
        return [np.asarray(value[...]).astype("f8") for value in (layer.mean, layer.var, layer.scale, layer.bias)]
    found = layer.running_mean, layer.running_var, layer.weight, layer.bias
    return [value.detach().numpy().astype("f8") for value in found]


def fill(layer, seed=5):
    """Statistics, gamma and beta that are not the defaults; eps 0.003 and 0.2 of the new value."""
    mean, var, gamma, beta = (np.random.default_rng(seed).random((4, C)) + 0.5).astype("float32")
    if isinstance(layer, keras.layers.Layer):
        layer.set_weights([gamma, beta, mean, var])
        layer.epsilon, layer.momentum = 0.003, 0.8
    elif isinstance(layer, nnx.Module):
        layer.mean[...], layer.var[...], layer.scale[...], layer.bias[...] = mean, var, gamma, beta
        layer.epsilon, layer.momentum = 0.003, 0.8
    else:
        with torch.no_grad():
            for tensor, value in zip(
                (layer.running_mean, layer.running_var, layer.weight, layer.bias), (mean, var, gamma, beta), strict=True
            ):
                tensor.copy_(torch.from_numpy(value))
        layer.eps, layer.momentum = 0.003, 0.2
    return layer


def output(layer, x, training):
    if isinstance(layer, nnx.Module):
        return np.asarray(layer(x, use_running_average=not training))
    if isinstance(layer, keras.layers.Layer):
        return keras.ops.convert_to_numpy(layer(x, training=training)).astype("f8")
    with torch.no_grad():
        return layer.train(training)(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("target", MAKERS)
@pytest.mark.parametrize("source", MAKERS)
def test_the_target_computes_what_the_source_did_and_goes_on_by_its_own_rule(source, target):
    given, made = fill(MAKERS[source]()), MAKERS[target]()
    before = read(given)
    returned, report = port(given, made)
    assert returned is made
    for old, now, still in zip(before, read(made), read(given), strict=True):
        np.testing.assert_array_equal(old, now)
        np.testing.assert_array_equal(old, still)
    mean, var, gamma, beta = before
    x = np.random.default_rng(1).standard_normal((8, 5, 5, C)).astype("float32")
    x = x if channels_last(target) else np.ascontiguousarray(np.moveaxis(x, -1, 1))
    axis = (3,) if channels_last(target) else (1,)
    expected = oracle.normalise(x, mean, var, gamma, beta, eps=0.003, channels=axis)
    np.testing.assert_allclose(output(made, x, training=False), expected, rtol=1e-4, atol=1e-5)
    step = oracle.train(x, x, gamma, beta, eps=0.003, channels=axis)
    np.testing.assert_allclose(output(made, x, training=True), step.y, rtol=1e-4, atol=1e-5)
    batch = oracle.unbiased(step.var, step.count) if is_torch(target) else step.var
    np.testing.assert_allclose(read(made)[0], 0.8 * mean + 0.2 * step.mean, rtol=1e-5)
    np.testing.assert_allclose(read(made)[1], 0.8 * var + 0.2 * batch, rtol=1e-5)
    (one,) = report.layers
    assert report.holds
    assert one.trial.training.holds
    assert one.trial.var_after_step.holds
    assert (one.trial.var_gap > 1e-4) == (is_torch(source) != is_torch(target))
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["trial"]["mean_after_step"]["holds"]


def test_the_report_says_what_is_kept_and_which_rule_holds_now():
    _, report = port(fill(MAKERS["keras"]()), torch.nn.BatchNorm2d(C))
    shown = str(report)
    assert "Keras BatchNormalization -> torch BatchNorm2d, channels 3, eps 0.003, momentum 0.2 of the new" in shown
    assert "axis -1 -> 1" in shown
    assert "biased there, unbiased here: " in shown
    assert "all of it n / (n - 1)" in shown


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(2, C, 1)
        self.bn1 = torch.nn.BatchNorm2d(C)
        self.rest = torch.nn.Sequential(torch.nn.Conv2d(C, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(C + 1))


class Flax(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.z = nnx.BatchNorm(C, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.a = nnx.BatchNorm(4, rngs=rngs)


def keras_model(layer=BatchNormalization):
    inner = keras.Sequential(
        [keras.Input((4, 4, C)), keras.layers.Conv2D(4, 1), layer(name="second"), layer(name="third")], name="inner"
    )
    return keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Conv2D(C, 1), layer(name="first"), inner])


MODELS = {"torch": Torch, "flax": Flax, "keras": keras_model}
NAMES = {
    "torch": ["bn1", "rest.1", "rest.2"],
    "flax": ["z", "blocks.1", "a"],
    "keras": ["first", "inner/second", "inner/third"],
}


def numbered(kind):
    """A model whose n-th layer, in the order of definition, has running mean n."""
    model = MODELS[kind]()
    for number, layer in enumerate(layers_of(kind, model), start=1):
        if kind == "torch":
            layer.running_mean.fill_(number)
        elif kind == "flax":
            layer.mean[...] = layer.mean[...] * 0 + number
        else:
            layer.moving_mean.assign(layer.moving_mean * 0 + number)
    return model


def layers_of(kind, model):
    if kind == "torch":
        return [model.get_submodule(name) for name in NAMES["torch"]]
    if kind == "flax":
        return [model.z, model.blocks[1], model.a]
    return [model.layers[1], *model.layers[2].layers[1:]]


@pytest.mark.parametrize("target", MODELS)
@pytest.mark.parametrize("source", MODELS)
def test_models_are_matched_in_the_order_of_definition(source, target):
    given, made = numbered(source), MODELS[target]()
    _, report = port(given, made)
    assert [(one.source, one.target) for one in report.layers] == list(zip(NAMES[source], NAMES[target], strict=True))
    assert [read(layer)[0][0] for layer in layers_of(target, made)] == [1, 2, 3]
    assert sum(report.untouched.values()) == (1 if target == "flax" else 2)
    assert any("matched in order, and 2 of them share" in note for note in report.notes) == (source != target)


def test_named_layers_are_taken_and_the_others_left():
    given, made = numbered("keras"), Torch()
    _, report = port(given, made, layers={"inner/third": "rest.1", "first": "bn1"})
    assert [float(layer.running_mean[0]) for layer in layers_of("torch", made)] == [1, 3, 0]
    assert report.unmatched == (("inner/second",), ("rest.2",))
    assert "left out of the target: rest.2" in str(report)
    assert "not touched: 2 Conv2d" in str(report)


def test_equal_names_go_together_whatever_the_order():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.third, self.first, self.second = (torch.nn.BatchNorm2d(4) for _ in range(3))

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (torch.nn.BatchNorm2d(4) for _ in range(3))
            self.second.running_mean.fill_(2)

    _, report = port(One(), made := Other())
    assert float(made.second.running_mean[0]) == 2
    assert report.notes == ()


def test_flax_layers_go_by_number_and_not_by_the_alphabet():
    blocks = nnx.List([nnx.BatchNorm(C, rngs=nnx.Rngs(0)) for _ in range(12)])
    for number, layer in enumerate(blocks):
        layer.mean[...] = layer.mean[...] + number
    made = torch.nn.Sequential(*(torch.nn.BatchNorm1d(C) for _ in range(12)))

    class Model(nnx.Module):
        def __init__(self):
            self.blocks = blocks

    port(Model(), made)
    assert [int(layer.running_mean[0]) for layer in made] == list(range(12))


def test_several_channel_axes_go_over():
    given = built(BatchNormalization(axis=(1, -1)), (None, 4, 5, C))
    given.moving_mean.assign(np.arange(12.0).reshape(4, C))
    made, report = port(given, BatchNorm((4, C), channel_axis=(0, 2)))
    assert made.running_mean.tolist() == np.arange(12.0).reshape(4, C).tolist()
    assert report.holds


def test_a_shared_layer_is_one():
    shared = torch.nn.BatchNorm2d(C)
    given = built(keras.layers.BatchNormalization())
    _, report = port(given, torch.nn.Sequential(shared, torch.nn.ReLU(), shared))
    assert len(report.layers) == 1


def test_what_trains_now_and_did_not_is_said():
    given = built(keras.layers.BatchNormalization(scale=False))
    made, report = port(given, torch.nn.BatchNorm2d(C))
    assert (made.weight == 1).all()
    assert "gamma is 1 now and trains, which the source's did not" in str(report)


def test_a_gamma_of_ones_needs_no_gamma():
    made, _ = port(torch.nn.BatchNorm2d(C), built(keras.layers.BatchNormalization(scale=False, center=False)))
    assert made.epsilon == 1e-5


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: freeze(torch.nn.BatchNorm2d(C))[0], "frozen"),
        (lambda: torch.nn.SyncBatchNorm(C), "synchronized"),
        (lambda: SyncBatchNorm(C), "synchronized"),
        (lambda: built(BatchNormalization(synchronized=True)), "synchronized"),
        (lambda: built(keras.layers.BatchNormalization(trainable=False)), "trainable=False"),
        (lambda: nnx.BatchNorm(C, axis_name="devices", rngs=nnx.Rngs(0)), "synchronized.*devices"),
    ],
)
def test_where_a_step_cannot_be_tried_inference_is_compared_and_that_is_said(make, why):
    _, report = port(make(), torch.nn.BatchNorm2d(C))
    (one,) = report.layers
    assert one.trial.inference.holds
    assert one.trial.training is None
    assert "training     not tried: " in str(report)
    assert re.match(why, one.not_tried)


class Scaled(torch.nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def renormalised():
    return built(BatchNormalization(renorm=True))


def parametrized():
    layer = torch.nn.BatchNorm2d(C)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    return layer


REFUSED = [
    (lambda: torch.nn.BatchNorm2d(4), MAKERS["keras"], r"\(4,\) channels in the source, \(3,\) in the target"),
    (MAKERS["keras"], lambda: torch.nn.BatchNorm1d(C), r"inputs of \(4,\) axes, the target of \(2, 3\)"),
    (
        lambda: torch.nn.BatchNorm2d(C, momentum=None),
        MAKERS["flax"],
        "the plain average over all batches, has no counter",
    ),
    (lambda: torch.nn.BatchNorm2d(C, track_running_stats=False), MAKERS["keras"], "keeps no running statistics"),
    (
        lambda: BatchNorm2d(C, activation="relu"),
        MAKERS["keras"],
        "activation that is fused into it, relu, would be lost",
    ),
    (MAKERS["keras"], lambda: BatchNorm2d(C, activation="relu"), "activation that is fused into it"),
    (lambda: BatchRenorm(C), MAKERS["keras"], "its training is not plain batch normalization"),
    (lambda: Scaled(C), MAKERS["keras"], "torch Scaled .* its training is not plain"),
    (lambda: torch.nn.LazyBatchNorm2d(), MAKERS["keras"], "it has no shape yet: call the model once"),
    (MAKERS["keras"], parametrized, "its parameters are parametrized"),
    (MAKERS["keras"], lambda: freeze(torch.nn.BatchNorm2d(C))[0], "it is frozen: batchnorm.unfreeze it first"),
    (lambda: keras.layers.BatchNormalization(), MAKERS["torch"], "it has no weights yet: build the model, or call it"),
    (renormalised, MAKERS["torch"], "renorm=True has no counterpart"),
    (lambda: fill(MAKERS["torch"]()), lambda: built(BatchNormalization(scale=False)), "gamma that is not 1 everywhere"),
    (lambda: fill(MAKERS["torch"]()), lambda: built(BatchNormalization(center=False)), "beta that is not 0 everywhere"),
    (lambda: torch.nn.Linear(2, 2), lambda: torch.nn.Linear(2, 2), "no batch normalization layer: there is nothing"),
    (lambda: torch.nn.Linear(2, 2), MAKERS["torch"], "source has 0 batch normalization layers and target 1: say which"),
    (
        lambda: "model.keras",
        MAKERS["torch"],
        "source must be a layer or a model of PyTorch, Keras 3 or Flax NNX, got str",
    ),
    (MAKERS["torch"], lambda: None, "target must be a layer or a model of .*, got NoneType"),
]


@pytest.mark.parametrize(("source", "target", "words"), REFUSED)
def test_what_cannot_be_kept_is_refused(source, target, words):
    with pytest.raises(ArgumentError, match=words):
        port(source(), target())


def test_subclasses_of_other_frameworks_are_refused():
    class Mine(nnx.BatchNorm):
        pass

    class Yours(keras.layers.BatchNormalization):
        pass

    for given in (Mine(C, rngs=nnx.Rngs(0)), built(Yours())):
        with pytest.raises(ArgumentError, match="it is a subclass, whose behaviour is not known here"):
            port(given, torch.nn.BatchNorm2d(C))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"first": "nowhere"}, "target has no batch normalization layer 'nowhere'; it has bn1, rest.1, rest.2"),
        ({"nowhere": "bn1"}, "source has no batch normalization layer 'nowhere'; it has first, inner/second"),
        ({"inner/second": "rest.1", "inner/third": "rest.1"}, "names a layer of the target twice"),
    ],
)
def test_names_that_are_not_there_are_refused(names, words):
    with pytest.raises(ArgumentError, match=words):
        port(keras_model(), Torch(), layers=names)


def test_nothing_is_written_where_one_layer_cannot_be_kept():
    given, made = numbered("keras"), Torch()
    made.rest[2] = torch.nn.BatchNorm2d(5)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ArgumentError, match=r"nothing was written: 'inner/third' -> 'rest.2': \(4,\) channels"):
        port(given, made)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    assert made.bn1.eps == 1e-5


def test_nothing_is_written_where_the_outputs_differ():
    given, made = fill(torch.nn.BatchNorm2d(C)), MAKERS["keras"]()
    given.forward = lambda x: torch.nn.BatchNorm2d.forward(given, x) * 2
    before = made.get_weights()
    with pytest.raises(
        VerificationError, match=r"do not compute the same, and nothing was written(.|\n)*NOT EQUAL"
    ) as e:
        port(given, made)
    assert not e.value.report.holds
    for old, now in zip(before, made.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    assert made.epsilon == 1e-3


def test_hooks_and_modes_of_both_are_left_alone():
    given, made = torch.nn.BatchNorm2d(C), fill(torch.nn.BatchNorm2d(C)).eval()
    calls = []
    for layer in (given, made):
        layer.register_forward_hook(lambda *_: calls.append(1))
    port(given, made)
    assert calls == []
    assert given.training
    assert not made.training
    assert int(given.num_batches_tracked) == 0


def test_a_compiled_model_predicts_with_what_it_was_given():
    model = keras.Sequential([keras.Input((5, 5, C)), BatchNormalization()])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).standard_normal((4, 5, 5, C)).astype("float32")
    model.predict(x, verbose=0)
    given = fill(torch.nn.BatchNorm2d(C)).eval()
    port(given, model)
    with torch.no_grad():
        expected = given(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_layers_are_compared_in_float32():
    given = fill(MAKERS["ours-keras"]())
    made, report = port(given, built(BatchNormalization(dtype="mixed_bfloat16")))
    assert report.holds
    assert made.epsilon == 0.003


def test_what_half_precision_cannot_hold_is_refused_and_put_back():
    given = torch.nn.Sequential(fill(MAKERS["torch"]()), fill(MAKERS["torch"]()))
    made = torch.nn.Sequential(torch.nn.BatchNorm2d(C), torch.nn.BatchNorm2d(C).bfloat16())
    with pytest.raises(VerificationError, match="cannot hold mean as it is in the source; nothing was written"):
        port(given, made)
    for name, value in torch.nn.Sequential(torch.nn.BatchNorm2d(C), torch.nn.BatchNorm2d(C)).state_dict().items():
        assert (made.state_dict()[name] == value).all()
    assert made[0].eps == 1e-5


def test_port_is_public():
    assert batchnorm.port is port
