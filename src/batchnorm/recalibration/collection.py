"""One pass over the data: the Moments that enter each call of the layers, while earlier layers are settled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch

from batchnorm.layers.inventory import BatchNormalization
from batchnorm.layers.observe import input_moments
from batchnorm.recalibration.buffers import write
from batchnorm.recalibration.interception import intercepted
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

Call: TypeAlias = tuple[str, int]
"""A layer's name and the number of its call within one forward: reused layers have several."""

Forward: TypeAlias = Callable[[torch.nn.Module, Any], object]

_MERGE_AFTER = 64


class Seen(NamedTuple):
    """What entered one call of a layer."""

    batch: int
    """Number of the batch in its pass (of the last one where several are merged)."""
    rank: int
    number: int
    """Of the call within its forward."""
    moments: Moments
    merged: int = 1
    """Calls that are merged into these Moments."""


class Collected(NamedTuple):
    """What a pass has found."""

    batches: int
    calls: list[Call]
    """Each call that happened, in the order of first appearance."""
    later: set[Call]
    """Those that came after another one in some forward: what enters them may depend on other layers."""
    seen: dict[Call, list[Seen]]
    """What entered each call; only the target, where the pass has one."""


class _Enough(BaseException):
    """Ends a forward at the layer that the pass is about; no Exception, so that no model catches it."""


class Collector:
    """Stands before the layers for the length of one pass.

    The layers are in evaluation mode throughout. Before each call its statistics are written into the buffers: those
    that are settled, or the ones of the very batch. So a layer of any kind normalises as asked, and nothing of what it
    does in training (updates, collectives, refusals) happens.

    Args:
        layers: name -> layer.
        settled: name -> statistics that its settled calls use.
        settled_calls: calls that use them.
        target: the one call to collect, at which each forward ends; None collects all and settles none.
        merges: whether Moments may be merged on the way, to save memory.
    """

    def __init__(
        self,
        layers: Mapping[str, BatchNormalization],
        *,
        settled: Mapping[str, Running],
        settled_calls: Iterable[Call],
        target: Call | None,
        merges: bool,
    ) -> None:
        self._layers = layers
        self._settled = settled
        self._settled_calls = frozenset(settled_calls)
        self._target = target
        self._merges = merges
        self._counts: Counter[str] = Counter()
        self._batch = 0
        self._calls: dict[Call, None] = {}
        self._later: set[Call] = set()
        self._seen: dict[Call, list[Seen]] = {}

    def run(
        self, model: torch.nn.Module, batches: Iterable[Any], forward: Forward, *, on_batch: Callable[[], None]
    ) -> Collected:
        """Sends each of `batches` through the model."""
        number = 0
        with intercepted(self._layers, self._before):
            for number, batch in enumerate(batches, start=1):
                self._batch = number
                self._counts.clear()
                with suppress(_Enough):
                    forward(model, batch)
                on_batch()
        return Collected(number, list(self._calls), self._later, self._seen)

    def _before(self, name: str, layer: BatchNormalization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = (name, self._counts[name])
        self._counts[name] += 1
        self._calls.setdefault(call)
        if self._counts.total() > 1:
            self._later.add(call)
        if call in self._settled_calls:
            write(layer, self._settled[name])
            return
        moments = input_moments(layer, args, kwargs)
        if self._target in (None, call):
            self._keep(call, Seen(self._batch, 0, call[1], moments))
        if self._target == call:
            raise _Enough
        write(layer, Running(moments.mean, moments.var))  # biased, as in training

    def _keep(self, call: Call, seen: Seen) -> None:
        kept = self._seen.setdefault(call, [])
        kept.append(seen)
        if self._merges and len(kept) >= _MERGE_AFTER:
            kept[:] = merged(kept)


def merged(seen: list[Seen]) -> list[Seen]:
    """The same as one, with the number of the last batch; nothing stays nothing."""
    if len(seen) < 2:
        return seen
    moments = seen[0].moments.merge(*(one.moments for one in seen[1:]))
    return [seen[-1]._replace(moments=moments, merged=sum(one.merged for one in seen))]
