"""merge_statistics(): the running statistics of several clients or checkpoints as those of all their data together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from batchnorm.errors import ArgumentError, BatchNormError, ShapeError
from batchnorm.stats.running import Running, moments_behind

Counts: TypeAlias = Sequence[int | Mapping[str, int]]


def merge_statistics(state_dicts: Sequence[Mapping[str, Any]], counts: Counts) -> dict[str, torch.Tensor]:
    """Merges running statistics by the law of total variance: federated averaging done right.

    The plain average of running variances leaves out the variance between the clients' means. With n_i values behind
    each client's statistics, mean = sum(n_i * mean_i) / n and var = sum(n_i * (var_i + (mean_i - mean)^2)) / n (biased;
    Bessel's correction is undone before and done again afterwards).

    Exact where the statistics of each client are those of its n_i values (after `recalibrate`); moving averages are as
    good as they stand for them.

    Args:
        state_dicts: of models of the same architecture, torch.nn's or ours, on any devices.
        counts: for each of them how many values a channel stand behind its statistics (examples times H*W): an int,
            or a mapping from the layers' names to ints where layers differ. Numbers of examples give the same mean, and
            the same variance but for Bessel's correction. 0 leaves a client out.

    Returns:
        running_mean, running_var and num_batches_tracked (the sum) of every layer, with dtype and device of the first
        state_dict, and nothing else: how weights are averaged is another question, and buffers of other kinds have no
        such rule. Load it with `model.load_state_dict(merged, strict=False)`.

    Raises:
        ArgumentError: no state_dicts, not one count for each, a count that is no int or negative, no count above 0, a
            layer without a count, or no or different layers.
        ShapeError: statistics of one layer differ in shape, or 1 value stands behind all.
        BatchNormError: a statistic is not finite.

    Example:
        >>> def client(mean, var):
        ...     return {"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.tensor([var])}
        >>> merged = merge_statistics([client(1.0, 2.0), client(11.0, 2.0)], counts=[2, 2])  # of 0, 2 and of 10, 12
        >>> merged["bn.running_mean"].item(), round(merged["bn.running_var"].item(), 4)
        (6.0, 34.6667)
    """
    state_dicts = list(state_dicts)
    layers = _layers(state_dicts)
    _check_counts(counts, len(state_dicts))
    merged: dict[str, torch.Tensor] = {}
    for layer in layers:
        numbers = [_count(count, layer, index) for index, count in enumerate(counts)]
        if sum(numbers) < 2:
            raise ShapeError(f"{layer or 'the layer'}: counts add up to {sum(numbers)}; a variance needs 2 values.")
        parts = [
            moments_behind(_running(state, layer, index), number)
            for index, (state, number) in enumerate(zip(state_dicts, numbers, strict=True))
        ]
        shapes = {tuple(part.mean.shape) for part in parts}
        if len(shapes) > 1:
            raise ShapeError(f"{layer}: running_mean has different shapes in the state_dicts, {sorted(shapes)}.")
        whole = parts[0].merge(*parts[1:])
        for name, value in (("running_mean", whole.mean), ("running_var", whole.unbiased_var)):
            merged[_key(layer, name)] = value.to(state_dicts[0][_key(layer, name)])
        tracked = [state[_key(layer, "num_batches_tracked")] for state in state_dicts if _is_tracked(state, layer)]
        if len(tracked) == len(state_dicts):
            total = sum(int(one) for one, number in zip(tracked, numbers, strict=True) if number)
            merged[_key(layer, "num_batches_tracked")] = torch.as_tensor(total).to(tracked[0])
    return merged


def _layers(state_dicts: Sequence[Mapping[str, Any]]) -> list[str]:
    if not state_dicts:
        raise ArgumentError("no state_dicts came: pass at least one.")
    for index, state in enumerate(state_dicts):
        if not isinstance(state, Mapping):
            raise ArgumentError(f"state_dicts[{index}] must be a state_dict, got {type(state).__name__}.")
    of_each = [list(_names(state)) for state in state_dicts]
    if not of_each[0]:
        raise ArgumentError("state_dicts[0] has no running_mean beside a running_var: no layer's statistics to merge.")
    for index, names in enumerate(of_each):
        different = set(names) ^ set(of_each[0])
        if different:
            raise ArgumentError(
                f"state_dicts[0] and [{index}] have statistics of different layers: {', '.join(sorted(different))}."
            )
    return of_each[0]


def _names(state: Mapping[str, Any]) -> Iterator[str]:
    for key in state:
        layer, _, name = key.rpartition(".")
        if name == "running_mean" and _key(layer, "running_var") in state:
            yield layer


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _is_tracked(state: Mapping[str, Any], layer: str) -> bool:
    return _key(layer, "num_batches_tracked") in state


def _check_counts(counts: Counts, clients: int) -> None:
    if not isinstance(counts, Collection):
        raise ArgumentError(f"counts must be a list, with one entry for each state_dict; got {counts!r}.")
    if len(counts) != clients:
        raise ArgumentError(f"counts must have one entry for each state_dict, {clients}; got {len(counts)}.")


def _count(count: int | Mapping[str, int], layer: str, index: int) -> int:
    if isinstance(count, Mapping):
        if layer not in count:
            raise ArgumentError(f"counts[{index}] has no entry for the layer {layer!r}.")
        count = count[layer]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ArgumentError(
            f"counts[{index}] must be an int of at least 0 (values a channel), got {count!r}: use int(...)."
        )
    return count


def _running(state: Mapping[str, Any], layer: str, index: int) -> Running:
    wide = [state[_key(layer, name)].detach().to("cpu", torch.float64) for name in ("running_mean", "running_var")]
    if not all(bool(torch.isfinite(one).all()) for one in wide):
        raise BatchNormError(f"state_dicts[{index}]: statistics of {layer!r} are not finite; leave that client out.")
    return Running(*wide)
