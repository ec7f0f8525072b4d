"""convert(): the batch normalization layers of a network become layers of another kind, with all that they hold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import ArgumentError
from batchnorm.layers.domain import DomainBatchNorm
from batchnorm.layers.dual import dual_batch_norm
from batchnorm.layers.inventory import Layers, chosen_of
from batchnorm.layers.renorm import Schedule
from batchnorm.layers.tracing import uncompiled
from batchnorm.surgery.building import build
from batchnorm.surgery.conversion_check import Checked, Step, check_by_example, check_by_layer, output_on
from batchnorm.surgery.recognition import core_class, is_candidate, is_group, read, titled
from batchnorm.surgery.replace import Place, become, places
from batchnorm.surgery.report import Changed, Skipped, SurgeryReport
from batchnorm.surgery.targets import Options, Target, Use

_TAKE_INPUT_ONLY = ("torch", "group", "layer")

_MEANT: dict[Target, str] = {
    "ghost": "in training the layers use the statistics of ghost batches now; evaluation is the same",
    "renorm": "in training the layers correct batch statistics towards the running ones now; evaluation is the same. "
    "Each keeps its momentum (the paper's is 0.01), and the schedule counts its num_batches_tracked",
    "decorrelated": "in training the layers whiten groups of channels now; evaluation is the same until then",
    "frozen": "statistics, weight and bias are fixed now, in training too, and no parameters any more",
    "sync": "in training the layers use the statistics of all ranks' batches; with one rank they compute the same",
    "group": "GroupNorm normalises each example by itself and cannot compute what BatchNorm did: nothing was compared, "
    "and the network has to be trained",
    "layer": "GroupNorm with one group is LayerNorm over all axes but the batch's, with a weight for each channel. It "
    "cannot compute what BatchNorm did: nothing was compared, and the network has to be trained",
}


def convert(
    model: torch.nn.Module,
    to: Target = "batchnorm",
    *,
    inplace: bool = False,
    layers: Layers = None,
    example: Any = None,
    process_group: Any = None,
    ghost_size: int | None = None,
    r_max: Schedule | None = None,
    d_max: Schedule | None = None,
    group_size: int | None = None,
    num_groups: int | None = None,
) -> tuple[torch.nn.Module, SurgeryReport]:
    """Makes the batch normalization layers of a network layers of another kind, and checks that it computes the same.

    Each layer stays the same object, with its parameters, buffers, hooks, mode, dtype, device and place, also where it
    is shared or the model itself; with inplace=True an optimizer that was made before goes on. It takes torch.nn's
    layers, ours, and the ones of timm (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d) and torchvision
    (FrozenBatchNorm2d), whose activations are fused where ours have them and stay modules behind the layer elsewhere.

    - "batchnorm": ours for what stands there, without any change in what it computes: torch.nn.SyncBatchNorm becomes
      our SyncBatchNorm, and layers that another library froze stay fixed. Our own of other kinds become BatchNorm.
    - "torch": the way back: class, state_dict, hooks and all that a layer was before; for one that was made by hand
      torch.nn's twin. A fused activation that no class of torch.nn has becomes a module behind it.
    - "sync", "ghost", "renorm", "decorrelated", "frozen": the layer of that kind. Evaluation stays the same.
    - "group", "layer": GroupNorm, and GroupNorm with one group. Another function; statistics are set aside for the way
      back, `to="torch"`.

    What cannot be converted, or has a behaviour of its own, stays as it is; the report names it and says why. On an
    error the model is what it was.

    Args:
        model: the network; a layer by itself, too.
        to: what its layers become.
        inplace: whether the model itself is changed, and not a copy.
        layers: which of them: names or modules, also of parts that contain layers. None is all.
        example: an input for the model (a tensor, a tuple of arguments, a dict of keyword arguments), on which outputs
            before and after are compared: in evaluation, and in training where that stays the same. Hooks run along.
            Without one, each layer is compared on random input of its own shape.
        process_group: for "sync": the ranks that share statistics; None is all, or those the layer had.
        ghost_size: for "ghost": examples in a ghost batch; 32 if None.
        r_max: for "renorm": (step, value) pairs; see BatchRenorm.
        d_max: for "renorm": likewise.
        group_size: for "decorrelated": at most that many channels are whitened together; 16 if None. Each layer gets
            the largest divisor of its number of channels.
        num_groups: for "group": at most that many groups; 32 if None. Each layer gets the largest divisor.

    Returns:
        The converted model, and the report, which carries the largest difference found.

    Raises:
        ArgumentError: the model has no batch normalization layers, `layers` names none, an option does not go with
            `to`, the model cannot be copied, or it cannot be run on the example.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> faster, report = convert(model, example=torch.randn(2, 3, 8, 8))
        >>> type(faster[1]).__module__, report.changed[0].what, report.agreement.holds
        ('batchnorm.layers.batch_norm', 'torch.nn.BatchNorm2d -> BatchNorm2d', True)
        >>> back, _ = convert(faster, "torch")
        >>> type(back[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    options = Options(process_group, ghost_size, r_max, d_max, group_size, num_groups)
    options.check(to)
    names = _meant(model, layers)
    if to == "frozen" and places(model, lambda module: isinstance(module, DistributedDataParallel)):
        raise ArgumentError(
            "DistributedDataParallel waits for the gradients of all parameters: convert before wrapping."
        )
    work = model if inplace else _copied(model)
    found = [place for place in _candidates(work) if place.name in names]
    uses = _uses(work, found, example) if to in _TAKE_INPUT_ONLY else {}
    steps: list[tuple[Place, Step]] = []
    skipped: list[Skipped] = []
    for place in found:
        reading = read(place.module)
        built = (
            reading if isinstance(reading, str) else build(reading, to, options, uses.get(place.name, Use(None, True)))
        )
        if isinstance(built, str) or isinstance(reading, str):
            skipped.append(Skipped(place.name, str(built)))
        else:
            steps.append((place, Step(reading, built)))
    changed = tuple(_changed(place, step) for place, step in steps)
    checked = _apply(work, [step for _, step in steps], example)
    notes = [_MEANT[to]] if to in _MEANT and steps else []
    return work, SurgeryReport("convert", changed, tuple(skipped), checked.agreement, (*notes, *checked.notes))


def _candidates(model: torch.nn.Module) -> list[Place]:
    """Layers that have to be converted or named; those that are a part of another one are its own business."""
    found = places(model, lambda module: is_candidate(module) or is_group(module))
    wholes = [f"{name}." if name else "" for p in found if isinstance(p.module, DomainBatchNorm) for name in p.names]
    return [
        place
        for place in found
        if isinstance(place.module, DomainBatchNorm) or not any(place.name.startswith(whole) for whole in wholes)
    ]


def _meant(model: torch.nn.Module, layers: Layers) -> set[str]:
    """First names of the layers that are meant."""
    found = _candidates(model)
    if not found:
        raise ArgumentError(f"{type(model).__name__} has no batch normalization layer (torch.nn's or batchnorm's).")
    chosen = chosen_of({name: place.module for place in found for name in place.names}, layers).values()
    return {place.name for place in found if any(place.module is one for one in chosen)}


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass inplace=True."
        ) from error


def _uses(model: torch.nn.Module, found: list[Place], example: Any) -> dict[str, Use]:
    """How layers are called: read from the graphs of torch.fx, and seen on the example."""
    uses: dict[str, Use] = {}
    by_module = {place.module: place.name for place in found}
    for place in places(model, lambda module: isinstance(module, torch.fx.GraphModule)):
        for node in place.module.graph.nodes:  # type: ignore[union-attr]
            # dual_batch_norm gives the layer that is its first argument a residual.
            called = node.args[0] if node.target is dual_batch_norm else node
            if called is node and node.op != "call_module":
                continue
            if (name := by_module.get(place.module.get_submodule(called.target))) is not None:
                uses[name] = Use(None, called is node and len(node.args) + len(node.kwargs) == 1)
    if example is not None:
        twin = _copied(model)

        def note(name: str, args: Any, kwargs: Any) -> None:
            plain = len(args) + len(kwargs) == 1 and uses.get(name, Use(None, True)).is_plain
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            uses[name] = Use(max(tensors[0].ndim - 2, 1) if tensors else None, plain)

        for place in found:
            twin.get_submodule(place.name).register_forward_pre_hook(
                lambda _, args, kwargs, name=place.name: note(name, args, kwargs), with_kwargs=True
            )
        with uncompiled(), torch.no_grad():
            output_on(twin, example)
    return uses


def _changed(place: Place, step: Step) -> Changed:
    before = titled(core_class(step.reading.layer))
    return Changed(place.names, f"{before} -> {step.built.what}", step.built.note)


def _apply(model: torch.nn.Module, steps: list[Step], example: Any) -> Checked:
    """Changes the layers and compares; where anything fails, they are what they were."""
    if not any(step.built.keeps_evaluation for step in steps):
        example = None  # nothing to compare
    by_layer = check_by_layer(steps)
    old = [(step.reading.layer, type(step.reading.layer), vars(step.reading.layer)) for step in steps]
    before = None
    if example is not None:
        before, by_layer = _copied_or_not(model, by_layer)
    try:
        for step in steps:
            become(step.reading.layer, step.built.module)
        if before is None or not (by_layer.agreement and by_layer.agreement.holds):
            return by_layer
        after = copy.deepcopy(model)
        checked = check_by_example(before, after, example, trains=all(step.trains_alike for step in steps))
        alone = f"each layer by itself, on random input, gradients and statistics included: {by_layer.agreement}"
        return checked._replace(notes=(*checked.notes, alone))
    except BaseException:
        for layer, kind, state in old:
            object.__setattr__(layer, "__class__", kind)
            object.__setattr__(layer, "__dict__", state)
        raise


def _copied_or_not(model: torch.nn.Module, by_layer: Checked) -> tuple[torch.nn.Module | None, Checked]:
    try:
        return copy.deepcopy(model), by_layer
    except Exception as error:
        why = f"the whole network was not compared, as it cannot be copied: {type(error).__name__}"
        return None, by_layer._replace(notes=(why, *by_layer.notes))
