"""What recalibrate() reports: how far each layer's statistics were off, and what was left alone."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import torch

from batchnorm.stats.running import Running

Estimator: TypeAlias = Literal["population", "mean_of_batches", "moving_average"]
Reading: TypeAlias = Literal["sequential", "batch"]


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """One layer that got new statistics.

    Attributes:
        name: where it is in the model.
        count: values behind the statistics of a channel; with a mask, of the channel that has fewest.
        batches: calls of the layer that entered; a reused layer has several for each batch of the data.
        mean_shift: |new mean - old mean| in units of the new standard deviation; the channel where it is largest.
        var_ratio: new variance / old variance or its inverse, whichever is above 1; the channel where it is largest.
            1 is no change.
    """

    name: str
    count: int
    batches: int
    mean_shift: float
    var_ratio: float

    @staticmethod
    def of(name: str, old: Running, new: Running, eps: float, *, count: int, batches: int) -> LayerChange:
        """The distance from `old` to `new`, (C,) each; eps (the layer's) keeps constant channels from dividing by 0."""
        with torch.no_grad():
            old_mean, old_var = old.mean.double(), old.var.double() + eps
            new_mean, new_var = new.mean.to(old_mean), new.var.to(old_var) + eps
            shift = float(((new_mean - old_mean).abs() / new_var.sqrt()).max())
            ratio = float(torch.maximum(new_var / old_var, old_var / new_var).max())
        return LayerChange(name, count, batches, shift, ratio)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A batch normalization layer that was left as it is."""

    name: str
    why: str


@dataclasses.dataclass(frozen=True)
class RecalibrationReport:
    """What `recalibrate` did; print it.

    Attributes:
        estimator: "population", "mean_of_batches" or "moving_average".
        reading: "sequential" or "batch".
        layers: the layers with new statistics, in the order in which the model uses them.
        skipped: the layers that were left alone, each with the reason.
        batches: batches of data in a pass, over all ranks.
        passes: how often the data were gone through; all but the first only up to the layer at hand.
        why_passes: what stood in the way of one pass in the sequential reading; None where nothing did.
        ranks: processes whose batches were merged.
        seconds: wall time.
    """

    estimator: Estimator
    reading: Reading
    layers: tuple[LayerChange, ...]
    skipped: tuple[Skipped, ...]
    batches: int
    passes: int
    ranks: int
    seconds: float
    why_passes: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        lines = [
            f"{len(self.layers)} layers recalibrated, {len(self.skipped)} left alone: {self.estimator}, {self.reading} "
            f"reading, {self.batches} batches{ranks}, {passes}, {self.seconds:.1f} s"
        ]
        if self.why_passes is not None and self.reading == "sequential" and self.passes > 1:
            lines.append(f"  a pass for each layer, as {self.why_passes}")
        names = [change.name for change in self.layers] + [skipped.name for skipped in self.skipped]
        width = max((len(name) for name in names), default=0)
        if self.layers:
            lines.append(f"  {'layer':<{width}}  values/channel  mean off by (std)  variance off by (factor)")
        for change in self.layers:
            lines.append(
                f"  {change.name:<{width}}  {change.count:>14,}  {change.mean_shift:>17.3g}  {change.var_ratio:>24.3g}"
            )
        lines += [f"  {skipped.name:<{width}}  left alone: {skipped.why}" for skipped in self.skipped]
        return "\n".join(lines)
