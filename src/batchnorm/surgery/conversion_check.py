"""Whether converted layers compute what they did: in the whole network on an example, or each on random input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from batchnorm.errors import ArgumentError
from batchnorm.layers.inventory import is_frozen
from batchnorm.layers.random_state import random_state_kept
from batchnorm.layers.tracing import uncompiled
from batchnorm.surgery.recognition import Reading
from batchnorm.surgery.targets import Built
from batchnorm.surgery.verification import Agreement, call, compare

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
_RANKS = {torch.nn.BatchNorm1d: 2, torch.nn.BatchNorm2d: 4, torch.nn.BatchNorm3d: 5}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Checked(NamedTuple):
    """An Agreement, or none, and what has to be said about it."""

    agreement: Agreement | None
    notes: tuple[str, ...] = ()


class Step(NamedTuple):
    """A layer and what it will be."""

    reading: Reading
    built: Built

    @property
    def trains_alike(self) -> bool:
        """Whether the two can be compared in training: the same function, and no other rank is needed for it."""
        spans_ranks = self.reading.known.family == "sync" and dist.is_available() and dist.is_initialized()
        return self.built.keeps_training and not spans_ranks


def check_by_layer(steps: list[Step]) -> Checked:
    """Each layer before and after, on random input of its own shape: outputs; in training gradients and buffers, too.

    Modes in which a layer is meant to compute something else are left out. Layers and random generators stay as they
    are; hooks do not run.
    """
    on_meta = any(tensor.is_meta for step in steps for tensor in _tensors(step.reading.layer))
    if on_meta:
        return Checked(None, ("layers on the meta device have no numbers: nothing was compared",))
    dtypes = {tensor.dtype for step in steps for tensor in _tensors(step.reading.layer)}
    tolerance = max((_TOLERANCES[dtype] for dtype in dtypes if dtype in _TOLERANCES), default=1e-5)
    pairs = [pair for step in steps for pair in _pairs(step)]
    if not pairs:
        return Checked(None)
    return Checked(
        compare(pairs, tolerance=tolerance),
        ("compared layer by layer on random input: pass an example to compare the whole network",),
    )


def check_by_example(before: torch.nn.Module, after: torch.nn.Module, example: Any, *, trains: bool) -> Checked:
    """Outputs of the two networks on the example, in evaluation and, where `trains`, in training.

    Both run on copies. Where a difference is larger than rounding explains, the comparison is made again in float64: a
    network may amplify rounding, and there it nearly vanishes, while an error stays.

    Raises:
        ArgumentError: the network before cannot be run on the example, or its outputs hold no tensor.
    """
    dtypes = {tensor.dtype for tensor in _tensors(before)}
    tolerance = max((_TOLERANCES[dtype] for dtype in dtypes if dtype in _TOLERANCES), default=1e-5)
    notes: list[str] = []
    modes = [False]
    with random_state_kept(before), uncompiled(), torch.no_grad():
        output_on(before, example)
        if trains:
            try:
                _output(before, example, training=True)
                modes.append(True)
            except Exception as error:  # detection models ask for targets, one value a channel has no variance, ...
                notes.append(f"training was not compared, as the model fails in it: {type(error).__name__}: {error}")
        found = compare(_runs(before, after, example, modes), tolerance=tolerance)
        if not found.holds and dtypes != {torch.float64}:
            wide = _in_float64(before), _in_float64(after), _in_float64(example)
            try:
                again = compare(_runs(*wide, modes), tolerance=_TOLERANCES[torch.float32])
            except Exception as error:
                notes.append(f"the comparison could not be made again in float64: {type(error).__name__}: {error}")
            else:
                notes.append(
                    f"compared in float64, as in its own dtype the network's rounding came to {found.max_relative:.2g}"
                )
                found = again
    return Checked(found, tuple(notes))


def output_on(model: torch.nn.Module, example: Any) -> Any:
    """The output of a copy of the model, in evaluation.

    Raises:
        ArgumentError: the model fails on the example.
    """
    try:
        return _output(model, example, training=False)
    except Exception as error:
        raise ArgumentError(f"the model cannot be run on the example: {type(error).__name__}: {error}") from error


def _runs(before: Any, after: Any, example: Any, modes: list[bool]) -> Iterator[tuple[Any, Any]]:
    for training in modes:
        yield tuple(_output(model, example, training=training) for model in (before, after))


def _output(model: torch.nn.Module, example: Any, *, training: bool) -> Any:
    with random_state_kept(model):  # dropout draws the same for both
        return call(copy.deepcopy(model).train(training), _mapped(example, torch.clone))


def _in_float64(whole: Any) -> Any:
    if isinstance(whole, torch.nn.Module):
        return copy.deepcopy(whole).double()
    return _mapped(whole, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)


def _mapped(example: Any, function: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, function, example)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())


def _pairs(step: Step) -> Iterator[tuple[Any, Any]]:
    old, new = step.reading.layer, step.built.module
    modes = [False] * step.built.keeps_evaluation + [True] * step.trains_alike
    for training in modes:
        with random_state_kept(old):
            x = _random_input(step)
            yield _answer(old, x, training), _answer(new, x, training)


def _answer(layer: torch.nn.Module, x: torch.Tensor, training: bool) -> dict[str, Any]:
    """Output; in training the gradients by input and parameters and the running statistics, too."""
    probe = _probe(layer, training)
    x = x.clone().requires_grad_(training)
    parameters = [one for one in probe.parameters() if one.requires_grad] if training else []
    with random_state_kept(probe), torch.set_grad_enabled(training):
        y = probe(x)
        if not training:
            return {"y": y}
        target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        gradients = torch.autograd.grad((y * target).sum(), [x, *parameters], allow_unused=True)
    statistics = [one for one in probe.buffers() if one.is_floating_point()] if training else []
    return {"y": y.detach(), "gradients": gradients, "statistics": statistics}


def _probe(module: torch.nn.Module, training: bool) -> torch.nn.Module:
    """A copy that shares parameters and has buffers of its own; without hooks, which are nobody's business here."""
    new = object.__new__(type(module))
    computed = {name: one.detach() for name, one in vars(module).items() if isinstance(one, torch.Tensor)}
    new.__dict__ = {
        **vars(module),
        **computed,  # by hooks, from other parameters
        **{name: type(vars(module)[name])() for name in _HOOKS},
        "_buffers": {name: None if one is None else one.clone() for name, one in module._buffers.items()},
        "_modules": {name: None if one is None else _probe(one, training) for name, one in module._modules.items()},
        "training": module.training if is_frozen(module) else training,
    }
    return new


def _random_input(step: Step) -> torch.Tensor:
    """Normal numbers, mean 1, that both layers take."""
    layer, axis = step.reading.layer, step.reading.setting("channel_axis", 1)
    features = step.reading.num_features
    sizes, axes = (features, axis) if isinstance(axis, tuple) else ((features,), (axis,))
    new = step.built.module
    kinds = (layer, new[0] if isinstance(new, torch.nn.Sequential) else new)
    rank = next((rank for kind, rank in _RANKS.items() if any(isinstance(one, kind) for one in kinds)), 4)
    rank = max([rank, *(one + 2 if one >= 0 else 1 - one for one in axes if one != 1)])
    shape = [4] * rank
    for size, one in zip(sizes, sorted(one % rank for one in axes), strict=True):
        shape[one] = size
    home = next(_tensors(layer), torch.empty(()))
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 2 + 1).to(home.device, home.dtype)
