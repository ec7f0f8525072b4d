"""The walker over a model, and the comparison of outputs."""

import math

import pytest
import torch

from batchnorm.errors import ArgumentError
from batchnorm.surgery.replace import places, put
from batchnorm.surgery.report import Changed, Skipped, SurgeryReport
from batchnorm.surgery.verification import compare


def is_relu(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.ReLU)


def test_shared_modules_are_found_once_with_every_name_and_replaced_everywhere() -> None:
    shared = torch.nn.ReLU()
    block = torch.nn.Sequential(torch.nn.Linear(2, 2), shared)
    model = torch.nn.ModuleDict({"a": block, "b": block, "c": shared})
    (place,) = places(model, is_relu)
    assert place.names == ("a.1", "b.1", "c")
    new = torch.nn.Tanh()
    assert put(model, place, new) is model
    assert model["a"][1] is new
    assert model["c"] is new
    assert places(model, is_relu) == []


def test_the_model_itself_is_a_place() -> None:
    model = torch.nn.ReLU()
    (place,) = places(model, is_relu)
    assert place.name == ""
    new = torch.nn.Tanh()
    assert put(model, place, new) is new


def test_places_refuses_what_is_no_module() -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch.nn.Module, got dict"):
        places({}, is_relu)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "relative"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([math.inf, 2.0], [math.inf, 2.5], 0.25),
        ([], [], 0.0),
    ],
)
def test_relative_difference(before: list[float], after: list[float], relative: float) -> None:
    agreement = compare([(torch.tensor(before), {"y": torch.tensor(after)})], tolerance=0.1)
    assert agreement.max_relative == relative
    assert agreement.holds == (relative <= 0.1)
    assert ("NOT EQUAL" in str(agreement)) == (relative > 0.1)


def test_compare_refuses_outputs_that_are_not_built_alike_and_no_outputs() -> None:
    with pytest.raises(ArgumentError, match=r"not built alike: \(2,\) before, \(3,\) after"):
        compare([(torch.zeros(2), torch.zeros(3))], tolerance=0)
    with pytest.raises(ArgumentError, match="at least one input"):
        compare([], tolerance=0)


def test_a_report_names_everything() -> None:
    agreement = compare([(torch.ones(1), torch.ones(1))], tolerance=1e-5)
    report = SurgeryReport("fold", (Changed(("", "b"), "A -> B", "once"),), (Skipped("c", "it is odd"),), agreement)
    text = str(report)
    for part in ("fold: 1 changed, 1 left alone", "(the model itself), b: A -> B (once)", "c: left alone, it is odd"):
        assert part in text
    assert report.as_dict()["agreement"]["holds"] is True
