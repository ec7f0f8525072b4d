"""A forward that can be held in the middle: it runs in a thread of its own, never beside another one."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch


class _Dropped(BaseException):
    """Ends a forward that is not wanted any more; no Exception, so that no model catches it."""


class Held:
    """One forward, from stop to stop; what it has computed so far stays alive in between.

    Whoever calls `resume` waits until the forward stops again or ends: of the caller and all the forwards that he holds
    only one runs at any time. What torch keeps for each thread (autocast, device, stream) is the caller's.

    Args:
        forward: runs the model; somewhere inside it may call `stop`.
    """

    def __init__(self, forward: Callable[[], object]) -> None:
        self.has_ended = False
        self._forward = forward
        self._error: BaseException | None = None
        self._is_dropped = False
        self._turn, self._answer = threading.Semaphore(0), threading.Semaphore(0)
        self._settings = _Settings()
        context = contextvars.copy_context()
        # A daemon: should a forward hang after Ctrl-C, the process still ends.
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="recalibrate", daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Runs to the next stop, or to the end; raises what the forward raises."""
        self._turn.release()
        self._answer.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Within the forward: gives the turn back until `resume` or `drop`."""
        if self._is_dropped:  # while it ran
            raise _Dropped
        self._answer.release()
        self._turn.acquire()
        if self._is_dropped:
            raise _Dropped

    def drop(self) -> None:
        """Ends it where it stands; waits for its next stop if it runs, as it does after an interrupt of the caller."""
        self._is_dropped = True
        self._turn.release()
        self._thread.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._is_dropped:
                with self._settings.applied():
                    self._forward()
        except _Dropped:
            pass
        except BaseException as error:
            self._error = error
        self.has_ended = True
        self._answer.release()


def can_hold() -> bool:
    """Whether a forward in another thread is what it would be here: no mode is on that only this thread knows."""
    return not (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    )


class _Settings:
    """What torch keeps for each thread, as it is in this one."""

    def __init__(self) -> None:
        types = {"cpu", *([] if (found := torch.accelerator.current_accelerator()) is None else [found.type])}
        self._autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in types]
        self._is_cached = torch.is_autocast_cache_enabled()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def applied(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        for kind, dtype, is_enabled in self._autocast:
            if is_enabled:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._is_cached))
        if self._stream is not None:
            stack.enter_context(torch.cuda.device(self._stream.device))
            stack.enter_context(torch.cuda.stream(self._stream))
        return stack
