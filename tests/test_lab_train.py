"""Stacks train as their networks would alone; records say what happened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchnorm import BatchNorm1d
from batchnorm.errors import ArgumentError
from batchnorm.lab.config import Job, Network, Run, Training, at_least, even_steps, spaced_steps, stacked
from batchnorm.lab.data import load
from batchnorm.lab.models import Stack
from batchnorm.lab.train import train

TRAINING = Training(steps=30, evaluations=(0, 10, 30))
NETWORKS = {
    "plain sigmoid": Network(depth=2, width=12),
    "batch norm before": Network(depth=2, width=12, norm="batch"),
    "batch norm after": Network(depth=2, width=12, norm="batch", placement="after", activation="relu", init="fan_in"),
    "layer norm": Network(depth=2, width=12, norm="layer", activation="relu", init="fan_in"),
    "maxout": Network(depth=2, width=12, activation="maxout", norm="batch", init="fan_in"),
}


def runs(network: Network, rates: tuple[float, ...] = (0.1, 1.0), seeds: tuple[int, ...] = (0, 1)) -> tuple[Run, ...]:
    scales = (0.05, 0.2) if network.init == "gaussian" else (1.0, 1.5)
    return tuple(
        Run("test", "arm", seed, rate, replace(network, init_scale=scale), TRAINING)
        for seed in seeds
        for rate, scale in zip(rates, scales, strict=True)
    )


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_stack_trains_as_its_networks_alone(network: Network) -> None:
    together = runs(network)
    stacked_records = train(Job("test", together))
    for run, record in zip(together, stacked_records, strict=True):
        (alone,) = train(Job("test", (run,)))
        assert alone["key"] == record["key"]
        for curve in ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy"):
            expected, found = alone["curves"][curve], record["curves"][curve]
            assert np.array(found, dtype=float) == pytest.approx(np.array(expected, dtype=float), abs=2e-4, nan_ok=True)


def test_a_network_that_diverges_does_not_touch_the_others() -> None:
    network = Network(depth=3, width=12, norm="batch", activation="relu", init="fan_in")
    fine, wild = runs(network, seeds=(0,))
    wild = replace(wild, rate=1e9)
    (alone,) = train(Job("test", (fine,)))
    beside, broken = train(Job("test", (fine, wild)))
    assert broken["values"]["diverged_at"] is not None
    assert beside["values"]["diverged_at"] is None
    assert beside["curves"]["test_accuracy"] == pytest.approx(alone["curves"]["test_accuracy"], abs=2e-4)


def test_the_same_job_gives_the_same_numbers() -> None:
    job = Job("test", runs(NETWORKS["batch norm before"]))
    first, second = train(job), train(job)
    for one, other in zip(first, second, strict=True):
        assert {**one["curves"], "seconds": 0} == {**other["curves"], "seconds": 0}
        assert one["values"] == other["values"]


def test_training_puts_the_number_of_threads_back() -> None:
    threads = torch.get_num_threads()
    train(Job("test", runs(NETWORKS["plain sigmoid"])[:1]))
    assert torch.get_num_threads() == threads


def test_training_agrees_with_plain_torch() -> None:
    """One network, written down once more with torch's own modules, on the same batches."""
    network = Network(depth=2, width=12, norm="batch", init_scale=0.3)
    run = Run("test", "arm", 3, 0.5, network, Training(steps=20, evaluations=(20,)))
    (record,) = train(Job("test", (run,)))
    data = load("digits", "unit")
    stack = Stack([network], [3], inputs=64, classes=10)
    layers: list[torch.nn.Module] = []
    for weight, bias in zip(stack.weights, stack.biases, strict=True):
        linear = torch.nn.Linear(*weight.shape[1:])
        linear.weight.data, linear.bias.data = weight[0].T.clone(), bias[0, 0].clone()
        layers += [linear, BatchNorm1d(12), torch.nn.Sigmoid()]
    model = torch.nn.Sequential(*layers[:-2])
    order = np.concatenate([np.random.default_rng((3, 1)).permutation(1000)[:960].reshape(16, 60)])
    second = np.random.default_rng((3, 1))
    second.permutation(1000)
    order = np.concatenate([order, second.permutation(1000)[:960].reshape(16, 60)])
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    for rows in order[:20]:
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.5 * grad
    model.eval()
    correct = model(torch.from_numpy(data.test.x)).argmax(dim=1) == torch.from_numpy(data.test.y)
    assert record["curves"]["test_accuracy"][-1] == pytest.approx(correct.double().mean().item(), abs=5e-3)


def test_arms_of_a_pair_start_from_the_same_weights_and_see_the_same_batches() -> None:
    plain = Stack([Network(norm="none")], [5], inputs=64, classes=10)
    normalised = Stack([Network(norm="batch")], [5], inputs=64, classes=10)
    for one, other in zip(plain.weights, normalised.weights, strict=True):
        assert torch.equal(one, other)


def test_a_stack_refuses_networks_of_two_kinds() -> None:
    with pytest.raises(ArgumentError, match="differ in init_scale only"):
        Stack([Network(norm="batch"), Network(norm="none")], [0, 0], inputs=4, classes=2)
    with pytest.raises(ArgumentError, match="one seed for each"):
        Stack([Network()], [0, 1], inputs=4, classes=2)


def test_a_job_refuses_runs_of_two_trainings() -> None:
    one = runs(NETWORKS["plain sigmoid"])[0]
    with pytest.raises(ArgumentError, match="same training"):
        train(Job("test", (one, one.with_training(steps=31))))


def test_statistics_of_the_batch_are_used_without_an_update() -> None:
    stack = Stack([NETWORKS["batch norm before"]] * 2, [0, 1], inputs=64, classes=10).eval()
    x = torch.rand(1, 40, 64)
    trace = stack.trace(x, "batch")
    assert [tuple(moments.mean.shape) for moments in trace.moments] == [(2, 12), (2, 12)]
    assert torch.equal(stack.norms[0].running_mean, torch.zeros(2, 12))
    assert torch.allclose(trace.activation_inputs[0].mean(dim=1), torch.zeros(2, 12), atol=1e-5)
    again = stack.trace(x, trace.moments)
    assert torch.allclose(again.logits, trace.logits, atol=1e-5)


def test_steps_and_stacks() -> None:
    assert even_steps(9, 3) == (0, 3, 6, 9)
    steps = spaced_steps(1000, 10, 1.12)
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert list(steps) == sorted(set(steps))
    assert at_least((4, 9), 2) == (4, 9)
    many = runs(NETWORKS["plain sigmoid"], seeds=tuple(range(25)))
    jobs = stacked([*many, *runs(NETWORKS["layer norm"])], largest=40)
    assert [len(job.runs) for job in jobs] == [25, 25, 4]
    assert jobs[0].runs + jobs[1].runs == many


@pytest.mark.parametrize("inputs", ["raw", "unit", "binarised", "standardised"])
@pytest.mark.parametrize("name", ["digits", "wine"])
def test_data_is_split_without_overlap_and_prepared_on_the_training_rows(name: str, inputs: str) -> None:
    data = load(name, inputs)
    rows = [len(part.y) for part in (data.train, data.validation, data.test)]
    assert sum(rows) == data.card["rows"]
    assert all(len(part.x) == len(part.y) and part.x.dtype == np.float32 for part in (data.train, data.test))
    if inputs == "unit":
        assert data.train.x.max() == 1
    if inputs == "binarised":
        assert set(np.unique(data.train.x)) == {0, 1}
    if inputs == "standardised":
        varying = data.train.x.std(axis=0) > 0
        assert data.train.x.mean(axis=0) == pytest.approx(0, abs=1e-4)
        assert data.train.x[:, varying].std(axis=0) == pytest.approx(1, abs=1e-3)


def test_unknown_data_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'digits' or 'wine'"):
        load("mnist")
    with pytest.raises(ArgumentError, match="or standardised"):
        load("digits", "scaled")
