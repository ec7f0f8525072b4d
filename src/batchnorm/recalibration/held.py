"""A forward that can be held in the middle: a greenlet, which keeps its stack while others run in the same thread."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import _C


class Held:
    """One forward, from stop to stop; what it has computed so far stays alive in between.

    Whoever made it calls `resume`, and goes on when the forward stops again or ends. All of it runs in one thread, so
    that the memory and the workers behind torch's operations are those of a plain forward; of what torch keeps for a
    thread, autocast and whether gradients are recorded are each forward's own, as context variables are.

    Args:
        forward: runs the model; somewhere inside it may call `stop`.

    Attributes:
        has_left_modes: whether, at its last stop, another mode of torch was on, which all the others would see.
    """

    def __init__(self, forward: Callable[[], object]) -> None:
        self.has_left_modes = False
        self._coroutine = greenlet(forward)
        self._coroutine.gr_context = contextvars.copy_context()
        self._outside = _Modes.now()
        self._inside = self._outside
        self._is_dropped = False

    def resume(self) -> None:
        """Runs to the next stop, or to the end; raises what the forward raises."""
        self._in_its_modes(self._coroutine.switch)

    def stop(self) -> None:
        """Within the forward: gives the turn back until `resume` or `drop`."""
        if self._is_dropped:  # and somebody has caught that
            raise GreenletExit
        self._coroutine.parent.switch()

    def is_running(self) -> bool:
        """Whether the caller is the forward itself, and no thread that it has started."""
        return getcurrent() is self._coroutine

    def drop(self) -> None:
        """Ends it where it stands."""
        if self._coroutine.dead:
            return
        self._is_dropped = True
        self._in_its_modes(partial(self._coroutine.throw, GreenletExit))

    def _in_its_modes(self, switch: Callable[[], object]) -> None:
        if self._inside != self._outside:
            self._inside.set()
        try:
            switch()
        finally:
            self._inside = _Modes.now(self._outside)
            if self._inside != self._outside:
                self._outside.set()
                self.has_left_modes = _Modes.now(self._outside) != self._outside


class _Modes(NamedTuple):
    """What torch keeps for each thread."""

    records_gradients: bool
    signs: tuple[object, ...]
    """Of autocast, inference mode, transforms, overrides and streams."""
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def now(last: _Modes | None = None) -> _Modes:
        """Asked at each stop, and so in as few calls of torch as there can be.

        Args:
            last: what is most likely still so. Where autocast is off, and stays off, its dtype does not matter.
        """
        keys = _C._dispatch_tls_local_include_set().raw_repr(), _C._dispatch_tls_local_exclude_set().raw_repr()
        stacks = _C._len_torch_function_stack(), _C._len_torch_dispatch_stack()
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        found = torch.is_grad_enabled(), (keys, stacks, stream)
        if last is not None and found == last[:2] and not any(is_enabled for _, is_enabled, _ in last.autocast):
            return last
        kinds = _kinds()
        autocast = tuple([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds])
        return _Modes(*found, autocast)

    def set(self) -> None:
        """Switches to these; the others are left as they are."""
        _C._set_grad_enabled(self.records_gradients)
        for kind, is_enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)


@cache
def _kinds() -> tuple[str, ...]:
    """The devices that have an autocast."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
