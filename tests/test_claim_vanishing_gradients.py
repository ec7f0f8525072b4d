"""The first gradients of the vanishing-gradients claim against plain torch, and its verdicts against its thresholds."""

import numpy as np
import pytest
import torch

from batchnorm.lab.claims import vanishing_gradients as claim
from batchnorm.lab.data import load
from batchnorm.lab.measures import ratio_over_seeds
from batchnorm.lab.models import Stack


def _first_gradients(arm):
    return claim.run(next(job for job in claim.jobs((0,), "quick") if job.runs[0].arm == arm))


@pytest.mark.parametrize("arm", ["sigmoid", "ReLU + BN"])
def test_gradient_norms_are_those_of_torch(arm):
    record = _first_gradients(arm)[0]
    data = load("digits", "standardised")
    network, seed = claim.ARMS[arm], record["seed"]
    weights = Stack([network], [seed], inputs=64, classes=10).weights
    linears = [torch.nn.Linear(*weight.shape[1:]) for weight in weights]
    with torch.no_grad():
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(weight[0].T)
            linear.bias.zero_()
    layers = []
    for linear in linears[:-1]:
        norm = [torch.nn.BatchNorm1d(network.width)] if network.norm == "batch" else []
        layers += [linear, *norm, torch.nn.Sigmoid() if network.activation == "sigmoid" else torch.nn.ReLU()]
    rows = np.random.default_rng(seed).permutation(len(data.train.y))[: claim.BATCH]
    # In float64. With the second seed one ReLU lies within rounding of 0, and either side of it is right.
    exact = torch.nn.Sequential(*layers, linears[-1]).double()
    logits = exact(torch.from_numpy(data.train.x[rows]).double())
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.train.y[rows])).backward()
    expected = [float(linear.weight.grad.norm()) for linear in linears[:-1]]
    assert record["values"]["gradient_norms"] == pytest.approx(expected, rel=1e-4)


def test_factor_is_the_geometric_mean_over_hidden_layers():
    assert claim.factor([99.0, 0.25**3, 0.25**2, 0.25, 1.0]) == pytest.approx(0.25)


def test_at_least_five_seeds_look_at_the_first_gradient():
    assert [record["seed"] for record in _first_gradients("Maxout")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("plain", "normalised", "relu", "verdict", "counter"),
    [
        (0.25, 1.0, 1.2, "shown", "counter-finding stands"),
        (0.25, 0.5, 1.2, "partly", "counter-finding stands"),
        (0.9, 1.0, 1.0, "partly", "counter-finding does not show"),
        (0.9, 0.5, 1.0, "not shown", "counter-finding does not show"),
    ],
)
def test_verdict_follows_the_thresholds(plain, normalised, relu, verdict, counter):
    factors = {"sigmoid": plain, "sigmoid_bn": normalised, "relu": 1.0, "maxout": 1.0, "relu_bn": relu}
    measures = [ratio_over_seeds(f"factor_{name}", "", [value] * 5) for name, value in factors.items()]
    measures += [ratio_over_seeds(f"accuracy_{name}", "", [50.0] * 3) for name in ("sigmoid", "sigmoid_bn")]
    found = claim.judge(measures)
    assert found.verdict == verdict
    assert counter in found.reading
