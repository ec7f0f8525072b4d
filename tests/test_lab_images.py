"""Images as a data set, networks for them, their training, and a study on them from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import ImageKind, ImageNetwork, ImageNorm, ImageTraining, Job, Network, Run, Training
from batchnorm.lab.datasets.images import Images
from batchnorm.lab.datasets.stored import store
from batchnorm.lab.fit import batches, data_of, fit
from batchnorm.lab.networks import Noise, build, normalised_layers
from batchnorm.lab.pictures import image_card, load_images
from batchnorm.lab.train import train

SIDE = 16


def made_images(seed: int = 0, channels: int = 3) -> Images:
    """Two classes that differ in brightness, with noise: easy to learn."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, 400)
    x = generator.normal(90 + 70 * y[:, None, None, None], 40, (400, SIDE, SIDE, channels)).clip(0, 255)
    x = x.astype(np.uint8)
    return Images(
        x[:300], y[:300].astype(np.int64), x[300:], y[300:].astype(np.int64), f"made up/squares{channels}.npz"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(store(made_images(), tmp_path_factory.mktemp("images") / "stored"))


TRAINING = ImageTraining(batch_size=32, steps=12, evaluations=(0, 6, 12))


def run_of(network: ImageNetwork, **changes: object) -> Run:
    return Run("test", "arm", 3, 0.1, network, replace(TRAINING, **changes))


def test_images_are_split_once_and_prepared_by_the_training_rows(folder: str) -> None:
    whole = load_images(folder, inputs="standardised")
    assert [len(part.y) for part in (whole.train, whole.validation, whole.test)] == [270, 30, 100]
    assert whole.train.x.shape == (270, 3, SIDE, SIDE)
    assert np.abs(whole.train.x.mean(axis=(0, 2, 3))).max() < 1e-5
    assert whole.train.x.std(axis=(0, 2, 3)) == pytest.approx(1, abs=1e-5)
    fewer = load_images(folder, rows=50, inputs="unit")
    again = load_images(folder, rows=0, inputs="unit")
    assert np.array_equal(fewer.validation.x, again.validation.x)
    assert {row.tobytes() for row in fewer.train.x} < {row.tobytes() for row in again.train.x}
    assert set(np.unique(load_images(folder, inputs="binarised").train.x)) == {0.0, 1.0}


def test_the_first_images_of_a_part_are_a_fair_sample_where_the_source_comes_class_by_class(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Statistics were taken of one class, and two were tested on, where folders of images came class by class."""
    y = np.repeat(np.arange(4), 100)
    x = np.broadcast_to(y[:, None, None, None], (400, 4, 4, 1)).astype(np.uint8)
    sorted_images = Images(x, y, x[::2], y[::2], "sorted.zip")
    data = load_images(str(store(sorted_images, tmp_path_factory.mktemp("sorted") / "stored")), inputs="raw")
    for part in (data.train, data.validation, data.test):
        assert np.array_equal(part.x[:, 0, 0, 0], part.y)
        assert set(part.y[: len(part.y) // 2]) == {0, 1, 2, 3}


def test_images_are_averaged_down(folder: str) -> None:
    small, large = load_images(folder, side=8, inputs="raw"), load_images(folder, inputs="raw")
    assert small.train.x.shape == (270, 3, 8, 8)
    assert small.train.x[5, 1, 2, 3] == pytest.approx(large.train.x[5, 1, 4:6, 6:8].mean())


def test_the_card_of_images_tells_no_path() -> None:
    card = image_card(made_images())
    assert (card["name"], card["source"], card["rows"], card["features"]) == ("squares3", "squares3.npz", 400, 768)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 271}, "has 270 beside validation"),
        ({"side": 5}, "cannot be averaged down to 5x5"),
        ({"inputs": "no"}, "expected inputs"),
    ],
)
def test_images_refuse_what_is_not_there(folder: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_images(folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", get_args(ImageKind))
@pytest.mark.parametrize("norm", get_args(ImageNorm))
def test_every_network_trains_with_every_normalisation(kind: ImageKind, norm: ImageNorm) -> None:
    network = build(ImageNetwork(kind=kind, norm=norm, depth=3, width=8, dropout=0.1), (3, SIDE, SIDE), 2, seed=0)
    x = torch.randn(16, 3, SIDE, SIDE)
    logits = network(x)
    assert logits.shape == (16, 2)
    logits.square().mean().backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in network.parameters())
    network.eval()
    assert torch.equal(network(x), network(x))
    is_there = [not isinstance(layer, torch.nn.Identity) for layer in normalised_layers(network)]
    assert is_there
    assert all(is_there) == (norm != "none")


def test_networks_that_differ_in_normalisation_start_from_the_same_weights() -> None:
    weights = []
    for norm in ("none", "batch", "group"):
        network = build(ImageNetwork(kind="inception", norm=norm), (1, SIDE, SIDE), 3, seed=7)  # type: ignore[arg-type]
        weights.append([one for one in network.parameters() if one.ndim > 1])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))
    first = weights[0][0].detach()
    assert float(first.std()) == pytest.approx((2 / first[0].numel()) ** 0.5, rel=0.15)


def test_noise_shifts_the_distribution_at_each_step_and_rests_in_evaluation() -> None:
    noise, x = Noise(), torch.randn(4000, 3)
    first, second = noise(x).mean(0), noise(x).mean(0)
    assert float((first - second).abs().max()) > 0.1
    assert noise.eval()(x) is x


def test_small_images_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ArgumentError, match="8x8 pixels at least"):
        build(ImageNetwork(kind="vgg"), (1, 4, 4), 2, seed=0)
    with pytest.raises(ArgumentError, match="expected a network of kind"):
        build(ImageNetwork(kind="resnext"), (1, 8, 8), 2, seed=0)  # type: ignore[arg-type]


def test_a_fit_learns_and_gives_the_same_numbers_again(folder: str) -> None:
    run = run_of(ImageNetwork(kind="vgg", norm="batch", width=4, dropout=0.1), steps=40, evaluations=(0, 20, 40))
    (first,), (second,) = fit(Job("test", (run,), folder)), fit(Job("test", (run,), folder))
    for name in ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy"):
        assert first["curves"][name] == second["curves"][name]
    assert first["curves"]["test_accuracy"][:-1] == [None, None]
    assert first["curves"]["test_accuracy"][-1] > 0.9
    assert first["values"]["diverged_at"] is None
    json.dumps(first, allow_nan=False)


def test_a_run_does_not_depend_on_its_job(folder: str) -> None:
    one, other = run_of(ImageNetwork(width=4)), run_of(ImageNetwork(width=4, norm="batch", dropout=0.5))
    together, (alone,) = fit(Job("test", (one, other), folder)), fit(Job("test", (other,), folder))
    assert together[1]["curves"]["train_loss"] == alone["curves"]["train_loss"]


def test_a_network_that_diverges_stands_still(folder: str) -> None:
    (record,) = fit(Job("test", (replace(run_of(ImageNetwork(width=4)), rate=1e6),), folder))
    assert record["values"]["diverged_at"] is not None
    assert 0 <= record["curves"]["test_accuracy"][-1] <= 0.7


def test_batches_of_one_class(folder: str) -> None:
    part = data_of(run_of(ImageNetwork()), folder).train
    drawn = batches(part, size=20, seed=0, order="by_class")
    labels = [next(drawn)[1] for _ in range(10)]
    assert all(len(set(one.tolist())) == 1 for one in labels)
    assert len({int(one[0]) for one in labels}) == 2
    with pytest.raises(ArgumentError, match="do not fill a batch of 1000"):
        next(batches(part, size=1000, seed=0))


class Look:
    """A probe that counts steps and adds up the squares of the weights."""

    def __init__(self, run: Run, data: object) -> None:
        self.steps, self.squares = 0, 0.0

    def evaluated(self, network: torch.nn.Module, step: int) -> None:
        self.squares = sum(float(one.square().sum()) for one in network.parameters() if one.ndim > 1)

    def stepping(self, *args: object) -> None:
        self.steps += 1

    def values(self) -> dict[str, float]:
        return {"steps": self.steps, "squares": self.squares}


def test_weight_decay_shrinks_weights_and_probes_are_asked(folder: str) -> None:
    squares = []
    for decay in (0.0, 0.5):
        run = run_of(ImageNetwork(width=4, norm="batch"), weight_decay=decay)
        (record,) = fit(Job("test", (run,), folder), Look)
        squares.append(record["values"]["squares"])
        assert record["values"]["steps"] == TRAINING.steps
    assert squares[1] < 0.7 * squares[0]


def test_fit_and_images_refuse_other_descriptions(folder: str) -> None:
    with pytest.raises(ArgumentError, match="expected a run on images"):
        fit(Job("test", (Run("test", "arm", 0, 0.1, ImageNetwork(), Training()),), folder))
    with pytest.raises(ArgumentError, match="expected a network for images"):
        fit(Job("test", (Run("test", "arm", 0, 0.1, Network(), TRAINING),), folder))


def test_stacks_train_on_images_too(folder: str) -> None:
    training = ImageTraining(inputs="binarised", batch_size=30, steps=20, evaluations=(0, 20))
    runs = tuple(Run("test", "arm", seed, 0.5, Network(depth=1, width=8, norm="batch"), training) for seed in (0, 1))
    for record in train(Job("test", runs, folder)):
        assert record["curves"]["test_accuracy"][-1] > 0.9
        assert record["data"]["name"] == "images"
