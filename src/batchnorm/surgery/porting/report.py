"""What was carried over, how far it was verified, and which conventions hold now."""

from __future__ import annotations

import dataclasses
from typing import Any

from batchnorm.surgery.porting.layer import Rule
from batchnorm.surgery.porting.trial import Trial


@dataclasses.dataclass(frozen=True)
class PortedLayer:
    """One pair of layers.

    Attributes:
        source: name of the layer that was read; "" is the model itself.
        target: name of the layer that was written.
        kinds: framework and class of both.
        channels: sizes of the channel axes.
        eps: of both now; unit of the inputs, squared.
        momentum: weight of the NEW value, of both now; 1 - this is what Keras and Flax call momentum.
        axes: the channel axes of both, which are left as they are: move the axis of your inputs.
        rules: which variance of a batch moves the running one, of both; the running variance itself goes over as it is.
        trial: outputs and statistics of both, compared.
        not_tried: why a training step could not be tried, or "".
        note: what the target has and the source has not.
    """

    source: str
    target: str
    kinds: tuple[str, str]
    channels: tuple[int, ...]
    eps: float
    momentum: float | None
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    rules: tuple[Rule, Rule]
    trial: Trial
    not_tried: str
    note: str

    @property
    def holds(self) -> bool:
        """Whether everything that was compared agrees."""
        agreements = (self.trial.inference, self.trial.training, self.trial.mean_after_step, self.trial.var_after_step)
        return all(one is None or one.holds for one in agreements)

    def __str__(self) -> str:
        of = "(itself)"
        momentum = "None (plain average)" if self.momentum is None else f"{self.momentum:g} of the new value"
        lines = [
            f"{self.source or of} -> {self.target or of}: {self.kinds[0]} -> {self.kinds[1]}, channels "
            f"{'x'.join(map(str, self.channels))}, eps {self.eps:g}, momentum {momentum}, axis "
            f"{_axis(self.axes[0])} -> {_axis(self.axes[1])}",
            f"  inference    {self.trial.inference}",
        ]
        if self.trial.training is None:
            lines.append(f"  training     not tried: {self.not_tried}")
        else:
            lines += [
                f"  training     {self.trial.training}",
                f"  mean after   {self.trial.mean_after_step}",
                f"  variance     {self.trial.var_after_step}{self._rule()}",
            ]
        return "\n".join([*lines, *([f"  note: {self.note}"] if self.note else [])])

    def _rule(self) -> str:
        if self.rules[0] == self.rules[1]:
            return ""
        return (
            f"; {self.rules[0]} there, {self.rules[1]} here: {self.trial.var_gap:.2g} apart after one step, all of it "
            "n / (n - 1)"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        trial = {
            name: value.as_dict() if hasattr(value, "as_dict") else value
            for name, value in self.trial._asdict().items()
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "trial": trial, "holds": self.holds}


@dataclasses.dataclass(frozen=True)
class PortReport:
    """What `port` did; print it.

    Attributes:
        layers: the pairs.
        untouched: what else has weights in the target, class name -> how many; they are as they were.
        unmatched: batch normalization layers of the source and of the target that `layers` left out.
        notes: what holds for the whole.
    """

    layers: tuple[PortedLayer, ...]
    untouched: dict[str, int]
    unmatched: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that was compared agrees, in all layers."""
        return all(layer.holds for layer in self.layers)

    def __str__(self) -> str:
        verdict = "verified" if self.holds else "NOT EQUAL"
        lines = [f"port: {len(self.layers)} batch normalization layers, {verdict}", *map(str, self.layers)]
        for what, names in zip(("source", "target"), self.unmatched, strict=True):
            if names:
                lines.append(f"left out of the {what}: {', '.join(names)}")
        if self.untouched:
            lines.append(f"not touched: {', '.join(f'{number} {kind}' for kind, number in self.untouched.items())}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "action": "port",
            "holds": self.holds,
            "layers": [layer.as_dict() for layer in self.layers],
            "untouched": self.untouched,
            "unmatched": self.unmatched,
            "notes": self.notes,
        }


def _axis(axes: tuple[int, ...]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(axes)
