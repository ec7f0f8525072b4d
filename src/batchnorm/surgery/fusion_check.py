"""Whether a network computes and learns the same after its forward was rewritten: outputs, gradients, statistics."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree

from batchnorm.layers.random_state import random_state_kept
from batchnorm.layers.tracing import uncompiled
from batchnorm.surgery.examples import Arguments, copied, in_float64, outputs_of
from batchnorm.surgery.recording import tensors_in
from batchnorm.surgery.verification import Agreement, compare

_IN_FLOAT64 = 1e-8
_IN_OWN_DTYPE = 1e-3


class Checked(NamedTuple):
    """How far the two agree, and what has to be said about it."""

    agreement: Agreement
    notes: tuple[str, ...]


class _Run(NamedTuple):
    """One pass in training, and back."""

    outputs: list[torch.Tensor]
    gradients: torch.Tensor
    """Of the inputs and of all parameters, one behind the other: many are 0 but for rounding, which is no scale."""
    buffers: list[torch.Tensor]


def compare_training(before: torch.nn.Module, after: torch.nn.Module, given: Arguments) -> Checked:
    """Compares outputs in evaluation and, in training, outputs, gradients and buffers after the step, on copies.

    In float64, where rounding does not hide an error; in the network's own dtype if it does not run in float64.
    """
    notes: list[str] = []
    with random_state_kept(before), uncompiled():
        try:
            pair = copy.deepcopy(before).double(), copy.deepcopy(after).double()
            inputs, tolerance = in_float64(given), _IN_FLOAT64
            first = outputs_of(pair[0].eval(), inputs)
        except Exception:  # constants of a dtype of their own
            pair, inputs, tolerance = (copy.deepcopy(before), copy.deepcopy(after)), given, _IN_OWN_DTYPE
            first = outputs_of(pair[0].eval(), inputs)
            notes.append("the network does not run in float64 and was compared in its own dtype")
        pairs: list[tuple[Any, Any]] = []
        old: _Run | None = None
        try:
            old = _trained(pair[0], inputs)
        except Exception as error:  # one value a channel, targets that are missing
            notes.append(
                f"training was not compared: in training mode the example gives {type(error).__name__}: {error}"
            )
        try:
            pairs.append((first, outputs_of(pair[1].eval(), inputs)))
            if old is not None:
                pairs.append((tuple(old), tuple(_trained(pair[1], inputs))))
        except Exception as error:
            notes.append(f"the fused network does not run, {type(error).__name__}: {error}")
            return Checked(Agreement(float("inf"), float("inf"), tolerance, 1), tuple(notes))
    agreement = compare(pairs, tolerance=tolerance)
    # One example, in several modes.
    return Checked(Agreement(agreement.max_absolute, agreement.max_relative, tolerance, 1), tuple(notes))


def _trained(model: torch.nn.Module, given: Arguments) -> _Run:
    model.train()
    args, kwargs = copied(given)
    floats = [one for one in pytree.tree_leaves((args, kwargs)) if _is_float(one)]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        inputs = [one.requires_grad_() for one in floats]
        # A view of each: leaves that require gradients must not be written to in place.
        args, kwargs = pytree.tree_map(lambda leaf: leaf * 1 if _is_float(leaf) else leaf, (args, kwargs))
        outputs = [one for one in tensors_in(model(*args, **kwargs)) if one.is_floating_point()]
        loss = sum(((one * _weights(one)).sum() for one in outputs), torch.zeros(()))
        wanted = [*inputs, *(one for one in model.parameters() if one.requires_grad)]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
    gradients = [one.flatten() for one in found if one is not None]
    return _Run(
        [one.detach() for one in outputs],
        torch.cat(gradients) if gradients else torch.zeros(1),
        [one.detach().clone() for one in model.buffers()],
    )


def _weights(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
