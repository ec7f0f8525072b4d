"""fold(): batch normalization layers become part of the convolutions and linear maps beside them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from batchnorm.errors import ArgumentError
from batchnorm.layers.activated import Activated
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.surgery.conversion import convert
from batchnorm.surgery.examples import Arguments, arguments_of, copied, in_float64, outputs_of, random_like
from batchnorm.surgery.folding_plan import Plan, Step, linear_map, plan
from batchnorm.surgery.inference_form import after_it, normalizations, scale_and_shift, why_not
from batchnorm.surgery.linear_maps import fold_behind, fold_in_front, write
from batchnorm.surgery.recognition import core_class, titled
from batchnorm.surgery.recording import Recording, record
from batchnorm.surgery.replace import Place, put
from batchnorm.surgery.report import Changed, Skipped, SurgeryReport
from batchnorm.surgery.verification import Agreement, compare

_RANDOM_INPUTS = 2
_ROUNDING_ERRORS = 3
"""Two runs with as much rounding as the network's own are two such errors apart at most, as a rule."""
_AT_MOST = 100
"""How often the tolerance may be multiplied for that."""
_PROOF = 1e-9
"""What folding may change in float64."""
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def fold(
    model: torch.nn.Module, example: Any, *, inplace: bool = False, tolerance: float | None = None
) -> tuple[torch.nn.Module, SurgeryReport]:
    """The network without the batch normalization layers that stand beside a convolution or linear map.

    At inference a layer is y = scale * x + shift, channel by channel, and goes into the weights of what stands before
    it (convolutions, transposed ones and linear maps of any rank, groups, dilation and padding), or after it where no
    zero padding comes between. Weights are computed in float64 and rounded once. In its place stands torch.nn.Identity,
    or what the layer did besides (activation, residual). A layer that stands alone becomes a FrozenBatchNorm.

    What takes what from which is seen by running the network on the example. So it may be of any class and do anything
    in between; only where it reads numbers out of tensors could another input go another way, and the report says so.
    Then outputs before and after are compared on the example and on random inputs. If they differ, nothing is folded.

    Args:
        model: with batch normalization layers, torch.nn's, ours or timm's. What is folded is its function in evaluation
            mode, in which the returned network is, whatever the mode of `model`.
        example: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        inplace: change `model` itself instead of a copy.
        tolerance: largest difference of any output over the largest output that passes. None goes by the coarsest dtype
            of the parameters: 1e-5 in float32, 1e-10 in float64, 0.02 in float16, 0.1 in bfloat16; where the network
            itself is further off its own float64 outputs, 3 times that (at most 100 times those), if folding in float64
            changes less than 1e-9.

    Returns:
        The network and the report: what was folded into what, which layers are left and why, and the largest
        differences. Where `report.agreement.holds` is False the network is as it came.

    Raises:
        ArgumentError: there is no batch normalization layer, the model cannot be copied, the example holds no tensor,
            or the network returns none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> folded, report = fold(model, torch.randn(2, 3, 8, 8))
        >>> folded[1], report.agreement.holds
        (Identity(), True)

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2; here with the layer's float64 scale and shift.
    """
    given = arguments_of(example)
    found = normalizations(model)
    if not found:
        raise ArgumentError(f"{type(model).__name__} has no batch normalization layer to fold.")
    work = _copy(model).eval()
    inputs, before, notes = _runs(work, given)
    if any(module.training for module in model.modules()):
        notes.append("the model was in training mode; folded is what it does in evaluation mode, in which it is now")
    limit = _tolerance(model) if tolerance is None else tolerance
    try:
        work, done = _folded(work, given)
        agreement = _compared(work, inputs, before, limit)
        if not agreement.holds and tolerance is None:
            agreement = _beside_own_rounding(agreement, model, inputs, before, notes)
    except Exception as error:  # the network's own code meets modules of another class
        done = _Done()
        agreement = Agreement(float("inf"), float("inf"), limit, len(inputs))
        notes.append(f"the folded network does not run, {type(error).__name__}: {error}")
    if not agreement.holds:
        notes.append("refused: the outputs differ, and the network is as it came")
        untouched = model if inplace else _copy(model)
        return untouched, SurgeryReport("fold", (), _all_left(found), agreement, tuple(notes))
    if done.looks_at_values:
        notes.append(
            "the network reads numbers out of tensors while it runs: other inputs might take a way that was not seen"
        )
    report = SurgeryReport("fold", tuple(done.changed), tuple(done.skipped), agreement, tuple(notes))
    return (_carried_over(work, done, model) if inplace else work), report


@dataclasses.dataclass
class _Done:
    changed: list[Changed] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    maps: list[str] = dataclasses.field(default_factory=list)
    layers: list[Place] = dataclasses.field(default_factory=list)
    alone: list[str] = dataclasses.field(default_factory=list)
    looks_at_values: bool = False


def _folded(work: torch.nn.Module, given: Arguments) -> tuple[torch.nn.Module, _Done]:
    """Folds round by round, as a map that takes in one layer may stand beside another one then."""
    done = _Done()
    while True:
        layers = normalizations(work)
        recording = record(work, [place.module for place in layers], *copied(given))
        done.looks_at_values |= recording.looks_at_values
        now = plan(recording, layers, work)
        if not now.steps:
            return _stand_alone(work, now, recording, done), done
        names = {module: name for name, module in work.named_modules()}
        for step in now.steps:
            work = _take(work, step, recording, names, done)


def _take(
    work: torch.nn.Module, step: Step, recording: Recording, names: dict[torch.nn.Module, str], done: _Done
) -> torch.nn.Module:
    layer = step.layer.module
    by_channel = scale_and_shift(layer)
    into = fold_behind if step.where == "behind" else fold_in_front
    for module, call in step.targets:
        write(module, into(linear_map(call), by_channel))
    targets = tuple(names[module] for module, _ in step.targets)
    kinds = ", ".join(dict.fromkeys(type(module).__name__ for module, _ in step.targets))
    has_residual = any(call.value_of("residual") is not None for call in recording.calls_of(layer))
    rest = _rest(layer, has_residual=has_residual)
    tail = "" if isinstance(rest, torch.nn.Identity) else f", then {type(rest).__name__}"
    where = "" if step.where == "behind" else "the following "
    done.changed.append(Changed((*step.layer.names, *targets), f"{titled(core_class(layer))} -> {where}{kinds}{tail}"))
    done.maps += targets
    done.layers.append(step.layer)
    return put(work, step.layer, rest)


def _rest(layer: torch.nn.Module, *, has_residual: bool) -> torch.nn.Module:
    """What stands where the layer stood."""
    behind = after_it(layer)
    if isinstance(layer, BatchNorm | FrozenBatchNorm) and (layer.activation is not None or has_residual):
        return Activated(layer.activation).eval()
    return (behind or torch.nn.Identity()).eval()


def _stand_alone(work: torch.nn.Module, now: Plan, recording: Recording, done: _Done) -> torch.nn.Module:
    for place, reason in now.left:
        layer = place.module
        if why_not(layer) is not None or not recording.calls_of(layer) or isinstance(layer, FrozenBatchNorm):
            done.skipped.append(Skipped(place.name, reason))
            continue
        before = titled(core_class(layer))
        convert(layer, "frozen", inplace=True)
        done.changed.append(Changed(place.names, f"{before} -> {type(layer).__name__}", reason))
        done.alone.append(place.name)
    return work


def _runs(work: torch.nn.Module, given: Arguments) -> tuple[list[Arguments], list[list[torch.Tensor]], list[str]]:
    """Inputs, the outputs before anything is changed, and what to say about them."""
    inputs, before, notes = [given], [outputs_of(work, given)], []
    for seed in range(_RANDOM_INPUTS):
        drawn = random_like(given, seed)
        try:
            outputs = outputs_of(work, drawn)
        except Exception as error:  # an input may have to be more than a tensor of some shape
            notes.append(f"random inputs could not be tried, {type(error).__name__}: {error}")
            break
        inputs.append(drawn)
        before.append(outputs)
    return inputs, before, notes


def _compared(
    work: torch.nn.Module, inputs: Sequence[Arguments], before: Sequence[list[torch.Tensor]], limit: float
) -> Agreement:
    after = (outputs_of(work, one) for one in inputs)
    return compare(zip(before, after, strict=True), tolerance=limit)


def _beside_own_rounding(
    agreement: Agreement,
    model: torch.nn.Module,
    inputs: Sequence[Arguments],
    before: Sequence[list[torch.Tensor]],
    notes: list[str],
) -> Agreement:
    """The agreement with a larger tolerance where the network as it came is itself that far off its float64 outputs.

    Some deep networks amplify the rounding of their dtype beyond any fixed tolerance: two runs that add in another
    order differ as much. Whether the fold is right is then decided in float64.
    """
    wide = [in_float64(one) for one in inputs]
    try:
        exact = _copy(model).eval().double()
        truth = [outputs_of(exact, one) for one in wide]
        own = compare(zip(truth, before, strict=True), tolerance=agreement.tolerance)
        proof = _compared(_folded(exact, wide[0])[0], wide, truth, _PROOF)
    except Exception:  # networks with constants of a dtype of their own
        return agreement
    if not proof.holds:
        return agreement
    raised = max(agreement.tolerance, min(_ROUNDING_ERRORS * own.max_relative, _AT_MOST * agreement.tolerance))
    notes.append(
        f"the network as it came is {own.max_relative:.2g} off its own outputs in float64 by rounding alone; the "
        f"tolerance is {_ROUNDING_ERRORS} times that, from {agreement.tolerance:.2g} to {_AT_MOST} times as much, as "
        f"folding in float64 changes them by {proof.max_relative:.2g}"
    )
    if agreement.max_relative > raised:
        notes.append("pass a tolerance to have it folded all the same, or fold in float64")
    return dataclasses.replace(agreement, tolerance=raised, own_rounding=own.max_relative)


def _carried_over(work: torch.nn.Module, done: _Done, model: torch.nn.Module) -> torch.nn.Module:
    """Makes `model` what its copy has become: its own parameters keep their identity."""
    for name in dict.fromkeys(done.maps):
        target: Any = model.get_submodule(name)
        made: Any = work.get_submodule(name)
        with torch.no_grad():
            target.weight.copy_(made.weight)
            if target.bias is None:
                target.register_parameter("bias", made.bias)
            else:
                target.bias.copy_(made.bias)
    for place in done.layers:
        model = put(model, place, work.get_submodule(place.name))
    for name in done.alone:
        convert(model.get_submodule(name), "frozen", inplace=True)
    return model.eval()


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and nothing is changed that "
            "was not tried on a copy: remove what cannot be copied, as hooks that hold generators or open files."
        ) from error


def _tolerance(model: torch.nn.Module) -> float:
    dtypes = {tensor.dtype for tensor in model.parameters()} & set(_TOLERANCES)
    return max((_TOLERANCES[dtype] for dtype in dtypes), default=_TOLERANCES[torch.float32])


def _all_left(found: list[Place]) -> tuple[Skipped, ...]:
    return tuple(Skipped(place.name, "the network was given back as it came") for place in found)
