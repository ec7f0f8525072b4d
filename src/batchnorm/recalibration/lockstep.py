"""The sequential reading in one pass: every batch waits in front of each layer until the layer is settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch

from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.inventory import BatchNormalization
from batchnorm.layers.observe import input_moments, input_of
from batchnorm.recalibration.chain import Steps, stretches_of
from batchnorm.recalibration.collection import Call, Collected, Forward, Seen, merged
from batchnorm.recalibration.held import Held
from batchnorm.recalibration.interception import intercepted
from batchnorm.recalibration.memory import free_bytes
from batchnorm.recalibration.source import OnFirstInput, first_input
from batchnorm.recalibration.statefulness import Watch
from batchnorm.stats.moments import Moments

END: Call = ("the end of the forward", 0)
DECLINED: Call = ("declined", 0)

_LIVE = 4
"""Memory of a waiting forward, in units of its largest input to a layer: residuals, inputs of enclosing modules."""
_SHARE = 0.5
"""Of the free memory that may be used where no limit is given."""
_SMALL = 64 << 10
"""Bytes of a layer's input: small ones are gone through together, as a call for each would cost more than the sums."""
_TOGETHER = 512 << 10
"""Bytes of a group of such inputs: they stay in the caches."""
_LITTLE = 64 << 20
"""Bytes that are always there: looking how much memory is free takes a millisecond."""


class Lockstep:
    """Holds one forward for each batch in front of the same layer, all of them, so that each batch is computed once.

    `frontier` brings all forwards to the next layer and gives what enters it there; the caller settles the layer and
    asks for the next frontier. That works for models whose forwards all go through the same layers in the same order,
    through each once, and which keep nothing in themselves between two layers; where the activations fit in memory.
    Otherwise a frontier is DECLINED, with the reason in `why`, and the passes must do it.

    Args:
        model: in evaluation mode.
        layers: name -> layer.
        forward: runs the model on a batch.
        limit: bytes of activations that may be kept, estimated; None takes half of the free memory; 0 declines.
        merges: whether the Moments of all batches may be merged at once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[str, BatchNormalization],
        forward: Forward,
        *,
        limit: int | None,
        merges: bool,
    ) -> None:
        self.why: str | None = None
        self.batches = 0
        self._kept = 0  # bytes, estimated
        self._model, self._layers, self._forward = model, layers, forward
        self._limit = limit
        self._merges = merges
        self._plain = frozenset(name for name, layer in layers.items() if merges and _is_plain(layer))
        self._waiting: list[_Waiting] = []
        self._running: _Waiting | None = None
        self._watch = Watch(model)
        self._chain = stretches_of(model, layers) if isinstance(forward, OnFirstInput) else None
        self._next_stretch = 1
        self._interception = ExitStack()

    def __enter__(self) -> Lockstep:
        if self._chain is None:
            self._interception.enter_context(intercepted(self._layers, self._before))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for one in self._waiting:
                one.held.drop()
        finally:
            self._interception.close()

    def frontier(self, batches: Iterable[Any] | None, *, on_batch: Callable[[], None]) -> Collected:
        """Runs all forwards to their next layer: what enters it, or END or DECLINED as the only call.

        Args:
            batches: the first time, those to begin with; None afterwards.
            on_batch: called when a forward has come there.
        """
        if batches is not None:
            self.why = self._obstacle()
            if self.why is None:
                self._begin(batches, on_batch)
        elif self._chain is not None and self._waiting and self._next_stretch == len(self._chain) - 1:
            return Collected(self.batches, [END], set(), {})  # no layer is left, and nobody wants the output
        else:
            self._next_stretch += 1
            # What ran last goes first: its activations are still in the caches.
            self._waiting.reverse()
            for waiting in self._waiting:
                self._resume(waiting)
                on_batch()
                if self.why is not None:
                    break
        calls = {waiting.call for waiting in self._waiting}
        if self.why is None and (len(calls) > 1 or any(number for _, number in calls)):
            self.why = "batches go through the layers in different orders, or through one of them twice"
        if self.why is not None:
            return Collected(self.batches, [DECLINED], set(), {})
        call = next(iter(calls), None)
        if call in (None, END):
            return Collected(self.batches, [] if call is None else [END], set(), {})
        return Collected(self.batches, [call], set(), {call: self._seen(self._layers[call[0]])})

    def _seen(self, layer: BatchNormalization) -> list[Seen]:
        """What enters the layer in front of which all of them wait."""
        inputs = [one.small for one in self._waiting if one.small is not None]
        if len(inputs) == len(self._waiting) and len({(x.shape[1:], x.dtype) for x in inputs}) == 1:
            number = max(1, _TOGETHER * len(inputs) // max(sum(x.nbytes for x in inputs), 1))
            groups = [inputs[i : i + number] for i in range(0, len(inputs), number)]
            parts = [input_moments(layer, (torch.cat(group),), {}) for group in groups]
            return [Seen(self.batches, 0, 0, parts[0].merge(*parts[1:]), merged=len(inputs))]
        waiting = sorted(self._waiting, key=lambda one: one.number)
        seen = [
            Seen(one.number, 0, 0, one.moments if one.small is None else input_moments(layer, (one.small,), {}))
            for one in waiting
        ]
        return merged(seen) if self._merges else seen

    def _obstacle(self) -> str | None:
        if self._limit == 0:
            return "memory=0"
        if any(type(module).__module__.startswith("torch.distributed") for module in self._model.modules()):
            return "its parameters are spread over the ranks"
        return None

    def _begin(self, batches: Iterable[Any], on_batch: Callable[[], None]) -> None:
        for number, batch in enumerate(batches, start=1):
            self.batches = number
            waiting = _Waiting(number, self._held(batch))
            self._waiting.append(waiting)
            self._resume(waiting)
            on_batch()
            if self.why is not None:
                return

    def _held(self, batch: Any) -> Held | Steps:
        if self._chain is None:
            return Held(partial(self._forward, self._model, batch))
        assert isinstance(self._forward, OnFirstInput)
        return Steps(self._chain, first_input(batch, self._forward.device), self._before)

    def _resume(self, waiting: _Waiting) -> None:
        self._running = waiting
        if waiting.number == 1:
            self._watch.begin()
        waiting.small, waiting.call = None, END
        waiting.held.resume()
        if waiting.held.has_left_modes:
            self.why = "a mode of torch is switched on during a forward"
            waiting.held.drop()  # before anything else runs in that mode
        elif waiting.number == 1 and self._watch.has_changed():
            self.why = "the model keeps something in its modules during a forward"
        elif waiting.device is not None:
            self._check_room(waiting.device)

    def _check_room(self, device: torch.device) -> None:
        if self._limit is None:
            if self._kept <= _LITTLE:
                return
            self._limit = int(_SHARE * free_bytes(device))
        if self._kept > self._limit:
            self.why = (
                f"the activations of all batches take more than the {self._limit / 2**30:.1f} GB there are for them"
            )

    def _before(self, name: str, layer: BatchNormalization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting = self._running
        assert waiting is not None
        if not waiting.held.is_running():
            self.why = "a forward goes through a layer in a thread of its own"
        if self.why is not None:
            return
        x = input_of(args, kwargs)
        number = waiting.counts.get(name, 0)
        waiting.counts[name] = number + 1
        waiting.call = name, number
        nbytes = x.nbytes
        if nbytes <= _SMALL and name in self._plain and x.ndim > 1 and kwargs.get("mask") is None:
            waiting.small = x
        else:
            waiting.moments = input_moments(layer, args, kwargs)
        if nbytes > waiting.most_bytes:
            self._kept += _LIVE * (nbytes - waiting.most_bytes)
            waiting.most_bytes = nbytes
        waiting.device = x.device
        waiting.held.stop()


def _is_plain(layer: BatchNormalization) -> bool:
    """Whether the layer has its batches on the first axis and the channels on the second."""
    return not isinstance(layer, DecorrelatedBatchNorm) and getattr(layer, "channel_axis", 1) == 1


class _Waiting:
    """A forward, and where it stands."""

    def __init__(self, number: int, held: Held | Steps) -> None:
        self.held = held
        self.number = number
        self.counts: dict[str, int] = {}
        self.call: Call = END
        self.moments: Moments
        self.small: torch.Tensor | None = None  # what enters the layer, where its Moments are not taken at once
        self.most_bytes = 0
        self.device: torch.device | None = None
