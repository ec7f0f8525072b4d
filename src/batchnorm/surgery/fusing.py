"""fuse_activations(): activations, and the additions before them, become part of batch normalization layers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from batchnorm.errors import ArgumentError
from batchnorm.kernels.contract import Activation
from batchnorm.surgery.block_graph import (
    NotTraceableError,
    graph_of,
    is_plain_sequence,
    observe,
    parts_of,
    shapes_in,
    tail_sequences,
)
from batchnorm.surgery.conversion import convert
from batchnorm.surgery.examples import Arguments, arguments_of, copied
from batchnorm.surgery.fusion_check import Checked, compare_training
from batchnorm.surgery.fusion_patterns import NoPatternError, Pattern, fuse_both_in, fuse_in, pattern_at
from batchnorm.surgery.inference_form import normalizations, why_watched
from batchnorm.surgery.recognition import Reading, core_class, read, titled
from batchnorm.surgery.replace import Place, places, put
from batchnorm.surgery.report import Changed, Skipped, SurgeryReport
from batchnorm.surgery.rewritten import rewrite


def fuse_activations(
    model: torch.nn.Module, example: Any, *, inplace: bool = False
) -> tuple[torch.nn.Module, SurgeryReport]:
    """Puts activations that follow batch normalization layers into the layers, in training and evaluation alike.

    BN -> activation and BN -> addition -> activation become one call of our layer, which reads and writes memory once;
    two layers that are added to one another, as at the end of a residual block with a convolution in its shortcut,
    become one call of `dual_batch_norm`.
    What follows what is read off each block's own forward by torch.fx, its children left whole; so control flow
    elsewhere does not matter. Where an activation is a module that does nothing else, torch.nn.Identity takes its place
    and no code changes. Where it is a function, is shared with other calls or comes after an addition, the block's
    forward is generated anew: the block keeps its class (as a subclass), attributes, submodules, hooks and state_dict,
    and can be copied, pickled and compiled. In a torch.fx.GraphModule the graph is changed. Layers become ours as by
    `convert`: the same objects with the same parameters; the activations of timm's layers are fused, too.

    Then outputs in evaluation, and outputs, gradients and running statistics in training, are compared before and after
    on copies in float64. If they differ, it is found out which layers are to blame, and the others are fused.

    Args:
        model: with batch normalization layers, torch.nn's, ours or other libraries'; in any mode, which it keeps.
        example: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments. What
            it does not reach is left alone; a branch that hangs on an argument is taken as the example takes it.
        inplace: change `model` itself instead of a copy.

    Returns:
        The network and the report: what was fused where, which layers are left and why, and the largest differences.
        Where `report.agreement.holds` is False the network is as it came.

    Raises:
        ArgumentError: there is no batch normalization layer, the model cannot be copied, or the example has no tensor.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> fused, report = fuse_activations(model, torch.randn(2, 3, 8, 8))
        >>> fused[1].activation, fused[2], report.agreement.holds
        ('relu', Identity(), True)
    """
    given = arguments_of(example)
    found = normalizations(model)
    if not found:
        raise ArgumentError(
            f"{type(model).__name__} has no batch normalization layer. Where torch.export has made operators of its "
            "layers, fuse before exporting."
        )
    refused: dict[str, str] = {}
    fusion, work, (agreement, notes) = _tried(model, given, refused)
    names = [one.names[0] for one in fusion.changed]
    if not agreement.holds and len(names) > 1:
        refused = _to_blame(model, given, names)
        if len(refused) < len(names):
            fusion, work, (agreement, notes) = _tried(model, given, refused)
    if not agreement.holds:
        notes = (*notes, "refused: before and after differ, and the network is as it came")
        left = tuple(Skipped(place.name, "the network was given back as it came") for place in found)
        return model if inplace else _copied(model), SurgeryReport("fuse", (), left, agreement, notes)
    if inplace:
        work = _Fusion(model, given, refused).run()
    return work, SurgeryReport("fuse", tuple(fusion.changed), fusion.skipped(), agreement, notes)


def _tried(
    model: torch.nn.Module, given: Arguments, refused: Mapping[str, str]
) -> tuple[_Fusion, torch.nn.Module, Checked]:
    """A copy of the network fused but for the layers in `refused`, and compared."""
    fusion = _Fusion(_copied(model), given, refused)
    work = fusion.run()
    return fusion, work, compare_training(model, work, given)


def _to_blame(model: torch.nn.Module, given: Arguments, names: list[str]) -> dict[str, str]:
    """Which of the layers cannot be fused, each with what it came to; the others can be fused together.

    By halves: one comparison for each half that holds, a few more for each layer that does not.
    """
    kept: list[str] = []
    refused: dict[str, str] = {}
    waiting = [names]
    while waiting:
        some = waiting.pop()
        others = {name: "" for name in names if name not in (*kept, *some)}
        agreement = _tried(model, given, others)[2].agreement
        if agreement.holds:
            kept += some
        elif len(some) == 1:
            refused[some[0]] = f"fused, the network computes something else ({agreement.max_relative:.2g} off)"
        else:
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
    return refused


@dataclasses.dataclass
class _Found:
    """A layer's call in the graph of a block, and what can be fused into it."""

    layer: torch.nn.Module
    pattern: Pattern
    other: _Found | None = None
    """What it is added to, where that is a layer's output too and both are done in one pass."""

    @property
    def both(self) -> list[_Found]:
        """It, and what is done in one pass with it."""
        return [self] if self.other is None else [self, self.other]


class _Fusion:
    """One model in the course of fusing, in place."""

    def __init__(self, model: torch.nn.Module, given: Arguments, refused: Mapping[str, str]) -> None:
        self.model = model
        self.refused = refused
        self.places: dict[torch.nn.Module, Place] = {place.module: place for place in normalizations(model)}
        self.names = {module: name for name, module in model.named_modules()}
        self.changed: list[Changed] = []
        self.reasons: dict[torch.nn.Module, str] = {}
        self.done: set[torch.nn.Module] = set()
        self.seen = observe(model, *copied(given))

    def run(self) -> torch.nn.Module:
        inside = {part for layer in self.places for part in layer.modules()}
        blocks = [module for module in self.model.modules() if module not in inside and module in self.seen]
        for block in blocks:
            self._fuse_block(block)
        for layer in self.places:
            self._fuse_own(layer)
        return self.model

    def skipped(self) -> tuple[Skipped, ...]:
        """The layers that are left, with reasons."""
        return tuple(
            Skipped(place.name, self.reasons.get(layer, "it is not called with this example"))
            for layer, place in self.places.items()
            if layer not in self.done
        )

    def _fuse_block(self, block: torch.nn.Module) -> None:
        looked_into = tail_sequences(block, lambda module: module in self.places, self.seen)
        parts = {*parts_of(block, self.seen), *(part for one in looked_into for part in one.children())}
        own = {layer for layer in parts if layer in self.places}
        if isinstance(block, GraphModule):
            own = {layer for layer in self.places if layer in set(block.modules())}
        own -= self.done
        if not own:
            return
        try:
            graph, found = self._look(block, looked_into, own)
            swapped, others = self._divide(block, graph, found)
            if others and not isinstance(block, GraphModule):
                # No more than has to be is written out in the block's forward: its parts are not called then.
                meant = {each.layer for one in others for each in one.both}
                needed = {part for part in looked_into if meant & set(part.modules())}
                graph, others = self._look(block, needed, meant)
        except NotTraceableError as error:
            for layer in own:
                self.reasons.setdefault(layer, str(error))
            return
        for one in swapped:
            self._swap(block, one)
        if others:
            self._rewrite(block, graph, others)

    def _look(
        self, block: torch.nn.Module, looked_into: Collection[torch.nn.Module], own: Collection[torch.nn.Module]
    ) -> tuple[Graph, list[_Found]]:
        """The block's graph, and what is found in it; reasons are noted for layers that nothing is fused into."""
        seen = self.seen[block]
        graph = block.graph if isinstance(block, GraphModule) else graph_of(block, seen, looked_into)
        calls: dict[torch.nn.Module, list[Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(block.get_submodule(str(node.target)), []).append(node)
        if not any(layer in calls for layer in own):
            return graph, []
        shapes = shapes_in(graph, block, seen)
        found: list[_Found] = []
        for layer, nodes in calls.items():
            if layer not in own:
                continue
            try:
                self._check(layer)
                if len(nodes) != 1 or self.seen[layer].calls != seen.calls:
                    count = self.seen[layer].calls
                    raise NoPatternError(f"it is called {count} times, and not by one call in one block")
                found.append(_Found(layer, pattern_at(nodes[0], block.get_submodule, shapes)))
            except NoPatternError as error:
                self.reasons.setdefault(layer, str(error))
        return graph, self._one_for_each(block, found)

    def _one_for_each(self, block: torch.nn.Module, found: list[_Found]) -> list[_Found]:
        """Of two layers that are added to one another one takes the activation: the block's own before a part's.

        The other one goes with it, in one pass, where both normalise by the batch alone.
        """
        chosen: dict[Node, _Found] = {}
        own = set(parts_of(block, self.seen))
        for one in sorted(found, key=lambda one: one.layer not in own):
            other = chosen.setdefault(one.pattern.activation, one)
            if other is one:
                continue
            if _normalises_plainly(one.layer) and _normalises_plainly(other.layer):
                other.other = one
            else:
                name = self.places[other.layer].name
                self.reasons.setdefault(one.layer, f"after it comes an addition to {name}, which takes the activation")
        return [one for one in found if chosen[one.pattern.activation] is one]

    def _check(self, layer: torch.nn.Module) -> None:
        """Raises NoPatternError unless the layer could take an activation."""
        if (name := self.places[layer].name) in self.refused:
            raise NoPatternError(self.refused[name])
        if reason := why_watched(layer):
            raise NoPatternError(reason)
        reading = read(layer)
        if isinstance(reading, str):
            raise NoPatternError(reading)
        if reading.behind:
            raise NoPatternError(f"it has modules of its own behind it ({', '.join(reading.behind)})")
        if reading.activation is not None:
            raise NoPatternError(f"it has an activation already, {reading.activation}")

    def _divide(self, block: torch.nn.Module, graph: Graph, found: list[_Found]) -> tuple[list[_Found], list[_Found]]:
        """What is done by taking the activation's module away, and what needs the block's forward rewritten."""
        if isinstance(block, GraphModule):
            return [], found
        fused = {one.pattern.activation for one in found if one.pattern.addition is None}
        swapped: list[_Found] = []
        others: list[_Found] = []
        for one in found:
            node = one.pattern.activation
            is_free = one.pattern.addition is None and node.op == "call_module"
            if is_free:
                module = block.get_submodule(str(node.target))
                calls = [
                    n for n in graph.nodes if n.op == "call_module" and block.get_submodule(str(n.target)) is module
                ]
                is_free = fused.issuperset(calls) and self.seen[module].calls == len(calls) * self.seen[block].calls
            (swapped if is_free else others).append(one)
        if others and is_plain_sequence(block):
            for one in others:
                self.reasons.setdefault(one.layer, "the activation after it is called elsewhere too")
            others = []
        if others:  # written out anyway, and then nothing is called for nothing
            swapped, others = [], found
        return swapped, others

    def _swap(self, block: torch.nn.Module, one: _Found) -> None:
        module = block.get_submodule(str(one.pattern.activation.target))
        self._take(one, f"{type(block).__name__} as it is")
        for place in places(self.model, lambda each: each is module):
            self.model = put(self.model, place, torch.nn.Identity().train(module.training))

    def _rewrite(self, block: torch.nn.Module, graph: Graph, found: list[_Found]) -> None:
        for one in found:
            if one.other is None:
                fuse_in(graph, one.pattern)
            else:
                fuse_both_in(graph, one.pattern, one.other.pattern)
            self._take(one, f"{type(block).__name__} with its forward written anew")
        if isinstance(block, GraphModule):
            block.recompile()
        else:
            rewrite(block, graph)

    def _take(self, one: _Found, how: str) -> None:
        before = titled(core_class(one.layer))
        _become_ours(one.layer, one.pattern.name)
        addition = " + addition" if one.pattern.addition is not None else ""
        what = f"{before} -> {type(one.layer).__name__}{addition} + {one.pattern.name}"
        self._note(one.layer, what, how)
        if one.other is not None:
            layer = one.other.layer
            before = titled(core_class(layer))
            _become_ours(layer, None)
            name = self.places[one.layer].name
            self._note(layer, f"{before} -> {type(layer).__name__} in one pass with {name}", how)

    def _fuse_own(self, layer: torch.nn.Module) -> None:
        """The activation that a layer of another library has inside of it."""
        reading = read(layer)
        if layer in self.done or isinstance(reading, str) or reading.known.is_ours or why_watched(layer):
            return
        if reading.activation is None or reading.behind or layer not in self.seen:
            return
        if (name := self.places[layer].name) in self.refused:
            self.reasons[layer] = self.refused[name]
            return
        before, activation = titled(core_class(layer)), reading.activation
        _become_ours(layer, activation)
        self._note(layer, f"{before} -> {type(layer).__name__} + {activation}", "its own activation")

    def _note(self, layer: torch.nn.Module, what: str, how: str) -> None:
        self.done.add(layer)
        self.changed.append(Changed(self.places[layer].names, what, how))


def _normalises_plainly(layer: torch.nn.Module) -> bool:
    reading = read(layer)
    return isinstance(reading, Reading) and reading.known.family == "batchnorm"


def _become_ours(layer: Any, activation: Activation | None) -> None:
    reading = read(layer)
    assert isinstance(reading, Reading)
    if not reading.known.is_ours:
        convert(layer, "batchnorm", inplace=True)
    layer.activation = activation


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and nothing is changed that "
            "was not tried on a copy: remove what cannot be copied, as hooks that hold generators or open files."
        ) from error
