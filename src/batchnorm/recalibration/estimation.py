"""recalibrate(): the statistics that a model uses at inference, estimated again from data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, get_args

import torch

from batchnorm.errors import ArgumentError, BatchNormError, ShapeError
from batchnorm.layers.inventory import BatchNormalization, Layers
from batchnorm.layers.random_state import random_state_kept
from batchnorm.recalibration.buffers import by_channel, initial, write
from batchnorm.recalibration.choice import choose
from batchnorm.recalibration.collection import Call, Collected, Collector, Forward, Seen
from batchnorm.recalibration.lockstep import DECLINED, END, Lockstep
from batchnorm.recalibration.progress import Bar
from batchnorm.recalibration.ranks import Group, number_of_ranks, together
from batchnorm.recalibration.report import Estimator, LayerChange, Reading, RecalibrationReport, Skipped
from batchnorm.recalibration.restoration import lent_in_evaluation
from batchnorm.recalibration.source import OnFirstInput, Source
from batchnorm.stats.moments import Moments
from batchnorm.stats.population import mean_of_batches, moving_average, population
from batchnorm.stats.running import Running


def recalibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "population",
    layers: Layers = None,
    forward: Forward | None = None,
    group: Group = None,
    max_batches: int | None = None,
    reading: Reading = "sequential",
    memory: int | None = None,
) -> RecalibrationReport:
    """Estimates the inference statistics of a model's batch normalization layers again, in place, from data.

    For after a change of the weights (SWA, EMA, pruning, merging), of the data (another domain, resolution), or where
    running averages lag. Nothing is trained; nothing but running_mean, running_var and num_batches_tracked of the
    chosen layers is written, at the very end, all or nothing. The model runs in evaluation mode meanwhile (no dropout);
    modes, momentum, hooks, all other buffers and the state of the random generators are put back, on an error too.

    Readings. "sequential": each layer sees activations that the layers before it have normalised with the statistics
        that they will use at inference. Only this reading does not depend on how the data are split into batches beyond
        the first layer. It takes one pass: every batch waits in front of a layer, in the middle of its forward, until
        all have come and the layer is settled. Where that cannot be, it takes a pass as far as each layer, about half
        as many forward passes as there are layers in all; the report then says why: the waiting activations need more
        than `memory`; batches go through different layers, or twice through one; the model keeps something in its
        modules from one layer to the next. (A model that keeps it elsewhere, as in a global variable, needs memory=0.)
        "batch": each layer sees activations normalised with the statistics of their batch, as in training: one pass,
        and nothing waits. For a model with one layer the two are the same.

    Estimators. "population": all values of a channel, exactly, as one float64 pass over them. "mean_of_batches": the
        paper's (Ioffe & Szegedy 2015, Alg. 2), without the variance between batch means. "moving_average": what the
        layer itself would keep over these batches with its momentum, started from mean 0 and variance 1.

    Args:
        model: any module with batch normalization layers, torch.nn's or ours. Frozen layers are left alone: those that
            `freeze` holds, those in evaluation mode while another part of the model is in training mode, and those
            whose parameters all have requires_grad=False while other parameters of the model have it on. So are
            layers that no batch goes through, and layers without running statistics. The report names them.
        batches: batches, from any iterable or DataLoader; each a tensor, or a tuple or list that begins with the input
            tensor, or anything that `forward` takes. An iterator, which can be gone through only once, is kept in
            memory for the sequential reading.
        estimator: see above.
        layers: which layers: names or modules, also of parts that contain layers. None is all. A frozen layer that is
            named is recalibrated; one that `freeze` holds is refused.
        forward: forward(model, batch) runs the model on a batch, for batches of another kind and for masks. None moves
            the input to the model's device and calls model(input).
        group: ranks of torch.distributed whose batches are merged; every rank ends with the same statistics, also
            where some have fewer batches or none. None is the default group if torch.distributed is initialised (each
            rank must then call), "local" this process alone.
        max_batches: use this many batches at most, on each rank.
        reading: see above.
        memory: bytes of activations that may wait in the sequential reading, by an estimate; None takes half of what is
            free, 0 makes a pass for each layer.

    Returns:
        The report: how far each layer's statistics were off, and what was left alone.

    Raises:
        ArgumentError: bad arguments, no layers, no batches, batches of an unknown kind, or fewer batches in a later
            pass.
        ShapeError: too few values a channel for a variance.
        BatchNormError: a value that enters a layer is not finite, or another rank failed.
        RankError: another rank did not arrive within the group's timeout, or is gone.

    A reused layer gets the statistics of all its calls together. In the sequential reading its later calls are
    collected while the earlier ones use what is settled until then, which is not quite what they will use in the end.
    A layer that is not settled yet, on a path that only some batches take, uses its batch's statistics.

    Source: "population statistics" by a pass over the training set, Ioffe & Szegedy 2015, section 3.1; Wu & Johnson
        2021 (arXiv 2105.07576), section 3, whose PreciseBN is the batch reading.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.ReLU())
        >>> report = recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])])
        >>> model[0].running_mean.item(), round(model[0].running_var.item(), 4)
        (6.0, 34.6667)
    """
    start = time.perf_counter()
    _check(estimator, reading, max_batches, forward, memory, batches)
    ranks = number_of_ranks(group)
    chosen, skipped = choose(model, layers)
    source = Source(batches, max_batches, is_repeated=reading == "sequential")
    with Bar() as bar:
        work = _Estimation(model, chosen, estimator, source, forward or OnFirstInput(model), group, bar)
        if chosen:
            with lent_in_evaluation(model):
                work.run(reading, memory)
    skipped += [Skipped(name, "no batch went through it") for name in chosen if name not in work.estimates]
    changes = _write(chosen, work.estimates, work.seen)
    seconds = time.perf_counter() - start
    return RecalibrationReport(
        estimator, reading, tuple(changes), tuple(skipped), work.batches, work.passes, ranks, seconds, work.why
    )


class _Estimation:
    """Passes over the data until every layer has its estimate."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[str, BatchNormalization],
        estimator: Estimator,
        source: Source,
        forward: Forward,
        group: Group,
        bar: Bar,
    ) -> None:
        self.estimates: dict[str, Running] = {}
        self.seen: dict[str, list[Seen]] = {}
        self.batches = self.passes = 0
        self.why: str | None = None  # there are several passes
        self._model = model
        self._layers = layers
        self._estimator: Estimator = estimator
        self._source = source
        self._forward = forward
        self._group: Group = group
        self._bar = bar

    def run(self, reading: Reading, memory: int | None) -> None:
        """Fills `estimates`."""
        if reading == "batch" or not self._in_lockstep(memory):
            self._in_passes(reading)

    def _in_lockstep(self, memory: int | None) -> bool:
        """The sequential reading in one pass; False, and nothing done, where that cannot be."""
        merges = self._estimator == "population"
        lockstep = Lockstep(self._model, self._layers, self._forward, limit=memory, merges=merges)
        with random_state_kept(self._model), lockstep:
            batches: Iterable[Any] | None = self._source
            for settled in range(len(self._layers) + 1):
                self._bar.begin(self._source.length())
                frontier = partial(lockstep.frontier, batches, on_batch=self._bar.advance)
                found = together(frontier, self._group, list(self._layers))
                self.batches, batches = found.batches, None
                if not found.calls:
                    self._check_batches()
                if len(found.calls) > 1 or found.calls == [DECLINED]:
                    break
                if found.calls == [END]:
                    self.passes = 1
                    return True
                name = found.calls[0][0]
                self._take(found.calls[0], found)
                self.estimates[name] = self._estimate(name)
                write(self._layers[name], self.estimates[name])
                self._bar.layer(name, settled + 1, len(self._layers))
        self.why = lockstep.why or "on another rank the batches do not go through the same layers in the same order"
        self.estimates.clear()
        self.seen.clear()
        return False

    def _check_batches(self) -> None:
        if self.batches == 0:
            raise ArgumentError("no batches came: pass a DataLoader or an iterable with at least one batch.")

    def _in_passes(self, reading: Reading) -> None:
        """The first pass is the batch reading, and shows the order of the calls for the sequential one."""
        first = self._pass(target=None, settled=[])
        self.batches = first.batches
        self._check_batches()
        # What enters a call that comes first in every forward is the same in both readings.
        known = first.calls if reading == "batch" else [call for call in first.calls if call not in first.later]
        for call in known:
            self._take(call, first)
        for name in dict.fromkeys(name for name, _ in known):
            self.estimates[name] = self._estimate(name)
        self._settle_in_turn(known, [call for call in first.calls if call not in known])

    def _settle_in_turn(self, settled: list[Call], pending: list[Call]) -> None:
        for done, target in enumerate(pending, start=1):
            name = target[0]
            self._bar.layer(name, done, len(pending))
            found = self._pass(target, settled)
            if target not in found.seen:
                raise ArgumentError(
                    f"{name} was reached in the first pass over the batches and not in pass {self.passes}: the "
                    'sequential reading needs the same batches in each pass. Pass a list, or reading="batch".'
                )
            self._take(target, found)
            settled = [*settled, target]
            self.estimates[name] = self._estimate(name)

    def _pass(self, target: Call | None, settled: list[Call]) -> Collected:
        merges = self._estimator == "population"
        collector = Collector(self._layers, settled=self.estimates, settled_calls=settled, target=target, merges=merges)

        def collect() -> Collected:
            with random_state_kept(self._model):
                batches = iter(self._source)
                self._bar.begin(self._source.length())
                return collector.run(self._model, batches, self._forward, on_batch=self._bar.advance)

        self.passes += 1
        return together(collect, self._group, list(self._layers))

    def _take(self, call: Call, found: Collected) -> None:
        self.seen.setdefault(call[0], []).extend(found.seen[call])

    def _estimate(self, name: str) -> Running:
        seen = sorted(self.seen[name], key=lambda one: (one.batch, one.rank, one.number))
        # An empty batch has no statistics; layers in training pass over it too.
        parts = [one.moments for one in seen if not _is_empty(one.moments)]
        try:
            if not parts:
                raise ShapeError("no values came, only empty batches")
            estimate = _ESTIMATORS[self._estimator](parts, self._layers[name])
        except ShapeError as error:
            raise ShapeError(
                f"{name}: {error} The {self._estimator} estimator cannot give it a variance; nothing was changed."
            ) from error
        if not bool(torch.isfinite(estimate.mean + estimate.var).all()):
            what = "fewer than 2 values" if _fewest(parts) < 2 else "NaN, infinity or an overflow"
            raise BatchNormError(
                f"{name}: a channel's input has {what} in some batch, so that it has no variance. Nothing was changed; "
                "leave that batch out, or run the model in float32."
            )
        return estimate


def _moving_average(parts: list[Moments], layer: BatchNormalization) -> Running:
    if layer.momentum is None:  # the plain average over all batches
        return mean_of_batches(parts)
    start = Running(*(value.to(parts[0].mean.device) for value in initial(layer)))
    return moving_average(parts, layer.momentum, start=start)


_ESTIMATORS: dict[Estimator, Callable[[list[Moments], BatchNormalization], Running]] = {
    "population": lambda parts, _: population(parts),
    "mean_of_batches": lambda parts, _: mean_of_batches(parts),
    "moving_average": _moving_average,
}


def _check(
    estimator: str, reading: str, max_batches: int | None, forward: object, memory: int | None, batches: object
) -> None:
    if estimator not in get_args(Estimator):
        raise ArgumentError(f"estimator must be one of {', '.join(get_args(Estimator))}; got {estimator!r}.")
    if reading not in get_args(Reading):
        raise ArgumentError(f"reading must be one of {', '.join(get_args(Reading))}; got {reading!r}.")
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ArgumentError(f"max_batches must be an int of at least 1, or None for all; got {max_batches!r}.")
    if not (forward is None or callable(forward)):
        raise ArgumentError(f"forward must be forward(model, batch) or None, got {type(forward).__name__}.")
    if memory is not None and (not isinstance(memory, int) or memory < 0):
        raise ArgumentError(
            f"memory must be an int of bytes, at least 0, or None for half of what is free; got {memory!r}."
        )
    if isinstance(batches, torch.Tensor | str | Mapping) or not isinstance(batches, Iterable):
        raise ArgumentError(
            f"batches must be a DataLoader or another iterable of batches, got {type(batches).__name__}: "
            "pass [batch] for a single one."
        )


def _write(
    layers: Mapping[str, BatchNormalization], estimates: Mapping[str, Running], seen: Mapping[str, list[Seen]]
) -> list[LayerChange]:
    """Puts the estimates into the buffers: the one place in which recalibrate changes the model."""
    changes = []
    for name, new in estimates.items():
        layer, parts = layers[name], [one.moments for one in seen[name]]
        calls = sum(one.merged for one in seen[name])
        old = by_channel(layer)
        with torch.no_grad():
            write(layer, new)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(calls)
        count = _fewest([parts[0].merge(*parts[1:])])
        changes.append(LayerChange.of(name, old, by_channel(layer, new), layer.eps, count=count, batches=calls))
    return changes


def _fewest(parts: list[Moments]) -> int:
    return min(int(part.count.min()) if isinstance(part.count, torch.Tensor) else part.count for part in parts)


def _is_empty(moments: Moments) -> bool:
    return not bool(moments.count.any()) if isinstance(moments.count, torch.Tensor) else moments.count == 0
