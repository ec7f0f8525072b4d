"""`batchnorm port`: from the file of one framework into that of another, or a message and status 2."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from typer.testing import CliRunner

from batchnorm import BatchNorm, BatchNorm2d
from batchnorm.cli.app import app
from batchnorm.errors import ArgumentError
from batchnorm.keras import BatchNormalization

SOURCE = """
import torch


def network(eps=1e-3, momentum=0.01):
    torch.manual_seed(0)
    norms = [torch.nn.BatchNorm2d(3, eps=eps, momentum=momentum), torch.nn.BatchNorm2d(4, eps=eps, momentum=momentum)]
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), norms[0], torch.nn.Conv2d(3, 4, 1), norms[1])


def other_eps():
    return network(eps=1e-5)


def other_momentum():
    return network(momentum=0.1)


def doubling():
    class Doubling(torch.nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = network()
    model[3].forward = Doubling(4, eps=1e-3).forward
    return model
"""


def keras_model(layer=BatchNormalization, **arguments):
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            keras.layers.Conv2D(3, 1),
            layer(name="first", **arguments),
            keras.layers.Conv2D(4, 1),
            layer(name="second", **arguments),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.random(weight.shape) + 0.5 for weight in model.weights])
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    keras_model().save("model.keras")
    keras_model(keras.layers.BatchNormalization).save("plain.keras")
    torch.manual_seed(1)
    norms = [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(4)]
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), norms[0], torch.nn.Conv2d(3, 4, 1), norms[1])
    for norm in norms:
        torch.nn.init.normal_(norm.running_mean)
    torch.save(network.state_dict(), "w.pt")
    safetensors.torch.save_file(network.state_dict(), "w.safetensors", metadata={"epoch": "7"})
    yield tmp_path
    sys.modules.pop("mine", None)


def invoke(*arguments):
    return CliRunner().invoke(app, ["port", *arguments])


@pytest.mark.parametrize("name", ["model.keras", "plain.keras"])
@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
def test_a_keras_file_becomes_a_state_dict_of_its_normalization(folder, name, out):
    done = invoke(name, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["holds"]
    assert report["out"] == out
    first = report["layers"][0]
    assert (first["source"], first["eps"], first["momentum"], first["axes"][0]) == ("first", 1e-3, 0.01, [-1])
    tensors = safetensors.torch.load_file(out) if out.endswith("s") else torch.load(out, weights_only=True)
    assert sorted(tensors) == sorted(
        f"{layer}.{name}" for layer in ("first", "second") for name in ("weight", "bias", "running_mean", "running_var")
    )
    layer = BatchNorm2d(4, eps=first["eps"], momentum=first["momentum"]).eval()
    state = {key.removeprefix("second."): value for key, value in tensors.items() if key.startswith("second.")}
    layer.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    x = np.random.default_rng(1).standard_normal((2, 5, 5, 4)).astype("float32")
    theirs = keras.ops.convert_to_numpy(keras.models.load_model(name).layers[-1](x, training=False))
    ours = layer(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).detach()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_settings_stand_in_the_safetensors_file(folder):
    assert invoke("model.keras", "-o", "out.safetensors").exit_code == 0
    with safetensors.safe_open("out.safetensors", framework="pt") as opened:
        words = json.loads(opened.metadata()["batch_normalization"])
    assert words["second"] == {"eps": 1e-3, "momentum": 0.01, "axis": [-1], "variance": "biased"}


def test_a_keras_file_goes_into_a_network(folder):
    done = invoke("model.keras", "--into", "w.safetensors", "--model", "mine:network", "-o", "out.safetensors")
    assert done.exit_code == 0, done.output
    assert "first -> 1: batchnorm BatchNormalization -> torch BatchNorm2d, channels 3, eps 0.001" in done.output
    assert "not touched: 2 Conv2d" in done.output
    before, after = (safetensors.torch.load_file(name) for name in ("w.safetensors", "out.safetensors"))
    assert list(before) == list(after)
    assert torch.equal(before["0.weight"], after["0.weight"])
    given = keras.models.load_model("model.keras").layers[1]
    np.testing.assert_array_equal(after["1.running_var"], keras.ops.convert_to_numpy(given.moving_variance))
    with safetensors.safe_open("out.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"epoch": "7"}


def test_a_network_that_only_a_factory_makes_will_do(folder):
    assert invoke("model.keras", "--model", "mine:network", "-o", "out.pt").exit_code == 0
    assert "0.weight" in torch.load("out.pt", weights_only=True)


def test_a_network_goes_into_a_keras_file_with_its_optimizer(folder):
    model = keras_model()
    model.compile("adam", "mse")
    x = np.ones((4, 5, 5, 2), "float32")
    model.fit(x, np.ones((4, 5, 5, 4)), verbose=0)
    model.save("trained.keras")
    done = invoke("w.pt", "--source-model", "mine:other_eps", "--into", "trained.keras", "-o", "out.keras")
    assert done.exit_code == 0, done.output
    old, new = keras.models.load_model("trained.keras"), keras.models.load_model("out.keras")
    weights = torch.load("w.pt", weights_only=True)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(new.layers[1].moving_mean), weights["1.running_mean"])
    assert (new.layers[1].epsilon, new.layers[1].momentum) == (1e-5, 0.99)
    np.testing.assert_array_equal(old.layers[0].get_weights()[0], new.layers[0].get_weights()[0])
    assert int(new.optimizer.iterations) == 1


def test_layers_are_paired_by_name(folder):
    done = invoke("model.keras", "--model", "mine:network", "-o", "out.pt", "--layer", "second=3", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["unmatched"] == [["first"], ["1"]]


def test_layers_with_several_channel_axes_keep_them(folder):
    keras_model(axis=(1, 3)).save("several.keras")
    assert invoke("several.keras", "-o", "out.safetensors").exit_code == 0
    tensors = safetensors.torch.load_file("out.safetensors")
    layer = BatchNorm((5, 3), channel_axis=(1, 3))
    layer.load_state_dict(
        {**{k[6:]: v for k, v in tensors.items() if k[:6] == "first."}, "num_batches_tracked": torch.tensor(0)}
    )
    assert tensors["first.weight"].shape == (5, 3)


def test_another_momentum_is_said_and_another_eps_is_refused(folder):
    done = invoke("model.keras", "--model", "mine:other_momentum", "-o", "out.pt")
    assert done.exit_code == 0
    assert (
        "note: a state_dict holds no momentum: to train on, make the layers of mine:other_momentum with" in done.output
    )
    refused(
        ["model.keras", "--model", "mine:other_eps", "-o", "new.pt"], "make the layers with 1: eps=0.001, 3: eps=0.001"
    )


def test_what_is_not_equal_is_not_written_and_ends_with_status_1(folder):
    done = invoke("model.keras", "--model", "mine:doubling", "-o", "out.pt", "--json")
    assert done.exit_code == 1, done.output
    report = json.loads(done.output)
    assert not report["holds"]
    assert report["out"] is None
    assert [layer["holds"] for layer in report["layers"]] == [True, False]
    assert not (folder / "out.pt").exists()


def refused(arguments, words):
    """Ends with that error, and writes nothing."""
    done = invoke(*arguments)
    assert isinstance(done.exception, ArgumentError), (done.output, done.exception)
    assert words in str(done.exception)
    name = arguments[arguments.index("-o") + 1]
    assert name == "w.pt" or not Path(name).exists()


BAD = [
    (["missing.keras", "-o", "out.pt"], "missing.keras is no file"),
    (["w.pt", "-o", "out.pt"], "--source-model must name the factory of the network"),
    (
        ["w.pt", "--source-model", "mine:network", "-o", "out.pt"],
        "--into or --model must say which model gets the layers",
    ),
    (["model.keras", "--source-model", "mine:network", "-o", "out.pt"], "--source-model goes with a state_dict"),
    (["model.keras", "--into", "w.pt", "-o", "out.pt"], "--model must name the factory of the network"),
    (["model.keras", "--layer", "first", "--model", "mine:network", "-o", "out.pt"], "--layer must be SOURCE_LAYER="),
    (["model.keras", "--layer", "first=a", "-o", "out.pt"], "--layer pairs two models: it needs --into or --model"),
    (["model.keras", "-o", "out.keras"], "--out: expected a file named *.safetensors, *.pt, *.pth; got out.keras"),
    (["model.keras", "--into", "plain.keras", "-o", "out.pt"], "--out: expected a file named *.keras; got out.pt"),
    (["model.keras", "-o", "w.pt"], "w.pt exists: pass --force to overwrite it"),
    (["model.keras", "-o", "missing/out.pt"], "the folder of --out, missing, does not exist"),
    (["model.keras", "--model", "mine:nothing", "-o", "out.pt"], "module mine has no 'nothing'"),
    (["truncated.keras", "-o", "out.pt"], "truncated.keras is no .keras file"),
    (["foreign.keras", "-o", "out.pt"], "foreign.keras is no .keras file"),
    (["archive.keras", "-o", "out.pt"], "archive.keras cannot be loaded by Keras with safe_mode"),
    (["broken.keras", "-o", "out.pt"], "broken.keras cannot be loaded by Keras with safe_mode"),
    (["lambda.keras", "-o", "out.pt"], "lambda.keras cannot be loaded by Keras with safe_mode"),
    (["foreign.pt", "--source-model", "mine:network", "--into", "model.keras", "-o", "out.keras"], "weights_only=True"),
    (["dense.keras", "-o", "out.pt"], "no batch normalization layer: there is nothing to port"),
    (["renorm.keras", "-o", "out.pt"], "cannot port 'first': renorm=True has no counterpart"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_refused_and_nothing_is_written(folder, arguments, words):
    whole = (folder / "model.keras").read_bytes()
    if arguments[0] == "truncated.keras":
        (folder / "truncated.keras").write_bytes(whole[: len(whole) // 2])
    elif arguments[0] == "foreign.keras":
        (folder / "foreign.keras").write_bytes(b"\x89HDF\r\n" + bytes(1000))
    elif arguments[0] == "archive.keras":
        with zipfile.ZipFile("archive.keras", "w") as archive:
            archive.writestr("readme.txt", "no model")
    elif arguments[0] == "broken.keras":
        with zipfile.ZipFile("model.keras") as old, zipfile.ZipFile("broken.keras", "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, content[:900] if name.endswith(".h5") else content)
    elif arguments[0] == "lambda.keras":
        norm = keras.layers.BatchNormalization()
        keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x + 1), norm]).save("lambda.keras")
    elif arguments[0] == "foreign.pt":
        (folder / "foreign.pt").write_bytes(b"nothing of the kind")
    elif arguments[0] == "dense.keras":
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save("dense.keras")
    elif arguments[0] == "renorm.keras":
        keras_model(renorm=True).save("renorm.keras")
    refused(arguments, words)
    assert (folder / "model.keras").read_bytes() == whole


def test_force_overwrites(folder):
    assert invoke("model.keras", "-o", "w.pt", "--force").exit_code == 0
    assert "first.weight" in torch.load("w.pt", weights_only=True)


def test_as_a_command_it_ends_with_status_2_and_one_line(folder):
    (folder / "foreign.keras").write_bytes(b"nothing of the kind")
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", "port", "foreign.keras", "-o", "out.pt"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: foreign.keras is no .keras file")
    assert "Traceback" not in done.stderr
