"""Where jobs are trained: in this process, in processes of this machine, on a Dask cluster or a Ray cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeAlias

from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor

from batchnorm.errors import ArgumentError, MissingPackageError

Records: TypeAlias = "list[dict[str, Any]]"
EngineName = Literal["joblib", "dask", "ray"]

TRIES = 3
"""How often a job is tried whose worker dies."""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Engine(Protocol):
    """Trains jobs somewhere; no more at a time than it is `width` wide. What a job gives does not depend on where."""

    tries: int
    """How often a job is to be submitted whose worker dies; 1 where the cluster itself tries again."""

    @property
    def width(self) -> int:
        """Jobs that are trained side by side at present."""

    def submit(self, call: Callable[..., Records], *arguments: Any) -> Future[Records]:
        """Start a call; there must be room for it."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether a call ended with this error because its worker died, and not by its own doing."""

    def close(self) -> None:
        """Give up what is being trained, and end the workers that this engine started."""


class Here:
    """This process, one job after the other: `submit` comes back when the job is trained."""

    tries = 1
    width = 1

    def submit(self, call: Callable[..., Records], *arguments: Any) -> Future[Records]:
        """Run the call; its errors are raised here and now."""
        future: Future[Records] = Future()
        future.set_result(call(*arguments))
        return future

    def is_lost(self, error: BaseException) -> bool:
        """Never: if this process dies, nobody is left to ask."""
        return False

    def close(self) -> None:
        """Nothing to do."""


class Processes:
    """Processes of this machine (joblib's loky). Each is a pool of its own: one that dies takes no other job with it.

    Args:
        workers: how many.
    """

    tries = TRIES

    def __init__(self, workers: int) -> None:
        self.width = workers
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Records], ProcessPoolExecutor] = {}

    def submit(self, call: Callable[..., Records], *arguments: Any) -> Future[Records]:
        """Start a call on a process that has nothing to do, or on a new one."""
        for ended in [future for future in self._busy if future.done()]:
            pool = self._busy.pop(ended)
            if ended.cancelled() or isinstance(ended.exception(), BrokenProcessPool):
                pool.shutdown(kill_workers=True)
            else:
                self._idle.append(pool)
        pool = self._idle.pop() if self._idle else _process()
        future: Future[Records] = pool.submit(call, *arguments)
        self._busy[future] = pool
        return future

    def is_lost(self, error: BaseException) -> bool:
        """Killed, out of memory, crashed."""
        return isinstance(error, BrokenProcessPool)

    def close(self) -> None:
        """Kill the processes."""
        for pool in (*self._idle, *self._busy.values()):
            pool.shutdown(kill_workers=True)
        self._idle, self._busy = [], {}


def _process() -> ProcessPoolExecutor:
    # Ctrl-C reaches every process of a terminal; the workers leave it to this one, and print no tracebacks.
    return ProcessPoolExecutor(1, env=_ONE_THREAD, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


class Dask:
    """A Dask cluster; its scheduler itself tries a job again whose worker died.

    Args:
        address: of the scheduler; "" starts a cluster on this machine.
        workers: processes of a cluster that is started here.

    Raises:
        MissingPackageError: dask.distributed is not installed.
        ArgumentError: there is no scheduler at the address.
    """

    tries = 1

    def __init__(self, address: str, workers: int) -> None:
        try:
            import distributed
        except ImportError as error:
            raise MissingPackageError("--engine dask needs dask.distributed: pip install 'batchnorm[dask]'") from error
        self._cluster = None
        if not address:
            # One thread a worker: a process trains one network at a time.
            self._cluster = distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        try:
            self._client = distributed.Client(self._cluster or address)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"no Dask scheduler answers at --address {address!r}: {error}") from error
        self._executor = self._client.get_executor(pure=False)
        self._killed = distributed.KilledWorker

    @property
    def width(self) -> int:
        """The workers that are there now; they may come and go."""
        return len(self._client.ncores())

    def submit(self, call: Callable[..., Records], *arguments: Any) -> Future[Records]:
        """Hand a call to the scheduler."""
        future: Future[Records] = self._executor.submit(call, *arguments)
        return future

    def is_lost(self, error: BaseException) -> bool:
        """The scheduler gave up: the workers that tried it died."""
        return isinstance(error, self._killed)

    def close(self) -> None:
        """Cancel what is being trained; a cluster that was there before stays."""
        self._executor.shutdown(wait=False)
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


class Ray:
    """A Ray cluster; Ray itself tries a job again whose worker died.

    Args:
        address: of the cluster, such as "auto" or "ray://host:10001"; "" starts one on this machine.
        workers: processes of a cluster that is started here.

    Raises:
        MissingPackageError: ray is not installed.
        ArgumentError: there is no cluster at the address.
    """

    tries = 1

    def __init__(self, address: str, workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingPackageError("--engine ray needs Ray: pip install 'batchnorm[ray]'") from error
        self._ray = ray
        options: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": workers}
        try:
            ray.init(**options, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError) as error:
            raise ArgumentError(f"no Ray cluster answers at --address {address!r}: {error}") from error
        self._running: dict[Future[Records], Any] = {}

    @property
    def width(self) -> int:
        """Processors of the cluster."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def submit(self, call: Callable[..., Records], *arguments: Any) -> Future[Records]:
        """Hand a call to the cluster; each takes one processor."""
        self._running = {future: task for future, task in self._running.items() if not future.done()}
        task = self._ray.remote(num_cpus=1, max_retries=TRIES - 1)(call).remote(*arguments)
        future: Future[Records] = task.future()
        self._running[future] = task
        return future

    def is_lost(self, error: BaseException) -> bool:
        """Ray gave up: the workers that tried it died."""
        return isinstance(error, self._ray.exceptions.WorkerCrashedError | self._ray.exceptions.NodeDiedError)

    def close(self) -> None:
        """Cancel what is being trained; a cluster that was there before stays."""
        for future, task in self._running.items():
            if not future.done():
                self._ray.cancel(task, force=True)
        self._ray.shutdown()


def engine_of(name: EngineName, address: str, workers: int) -> Engine:
    """The engine of that name.

    Args:
        name: which.
        address: of a cluster; "" for none.
        workers: processes, where they are started here.

    Raises:
        MissingPackageError: its package is not installed.
        ArgumentError: an address without a cluster, or nobody answers there.
    """
    if name == "joblib":
        if address:
            raise ArgumentError("--address goes with --engine dask or ray; joblib's processes are on this machine")
        return Processes(workers) if workers > 1 else Here()
    return Dask(address, workers) if name == "dask" else Ray(address, workers)
