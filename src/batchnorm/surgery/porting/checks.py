"""What a pair of layers cannot keep: looked for in all pairs before anything is written."""

from __future__ import annotations

import numpy as np

from batchnorm.surgery.porting.layer import PortableLayer


def problems(source: PortableLayer, target: PortableLayer) -> list[str]:
    """Why `target` cannot become what `source` is, in words; none where it can."""
    found = [f"{layer.kind} {_shown(layer)}: {layer.obstacle()}" for layer in (source, target) if layer.obstacle()]
    if found:
        return found
    if target.only_inference == "frozen":
        return [f"{target.kind} {_shown(target)}: it is frozen: batchnorm.unfreeze it first"]
    have, given = target.numbers(), source.numbers()
    pair = f"{_shown(source)} -> {_shown(target)}"
    if given.mean.shape != have.mean.shape:
        return [f"{pair}: {given.mean.shape} channels in the source, {have.mean.shape} in the target"]
    for name, value, place, neutral in (
        ("gamma", given.gamma, have.gamma, 1.0),
        ("beta", given.beta, have.beta, 0.0),
    ):
        if value is not None and place is None and not np.array_equal(value, np.full_like(value, neutral)):
            found.append(f"{pair}: the source has a {name} that is not {neutral:g} everywhere, the target has none")
    if given.momentum is None and target.rule == "biased":
        found.append(f"{pair}: momentum=None, the plain average over all batches, has no counterpart in {target.kind}")
    if rank_for(source, target) is None:
        found.append(f"{pair}: the source takes inputs of {source.ranks} axes, the target of {target.ranks}")
    return found


def rank_for(source: PortableLayer, target: PortableLayer) -> int | None:
    """A number of axes that inputs of both may have; None where there is none."""
    least = len(source.axis) + 1
    for axis in (*source.axis, *target.axis):
        least = max(least, axis + 1 if axis >= 0 else -axis)
    allowed = [set(layer.ranks) for layer in (source, target) if layer.ranks is not None]
    return next((rank for rank in range(least, 8) if all(rank in ranks for ranks in allowed)), None)


def _shown(layer: PortableLayer) -> str:
    return repr(layer.name) if layer.name else "(the layer itself)"
