"""Runs a function on several gloo processes, as torchrun would, and gathers what each returns."""

from __future__ import annotations

import datetime
import os
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
"""From a process that has loaded torch already, where there can be one: for each to load it anew takes seconds."""
mp.get_context(START).set_forkserver_preload(["torch", "torch.distributed"])


def run(function, world: int, folder: Path, *args: Any, timeout: float = 60.0) -> list[Any]:
    """`function(rank, *args)` on `world` ranks; what each returned, or the error it raised.

    A rank that is killed gives None. `timeout`: seconds that a collective operation waits for the others, once all have
    come.
    """
    context = mp.get_context(START)
    ranks = [context.Process(target=_main, args=(function, r, world, folder, timeout, args)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
        if rank.is_alive():
            rank.kill()
            raise AssertionError("a rank hangs")
    return results(world, folder)


def results(world: int, folder: Path) -> list[Any]:
    """What the ranks of an earlier `run` in that folder returned."""
    found = [folder / f"{r}.pt" for r in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in found]


def _main(function, rank, world, folder, timeout, args):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),  # a busy machine takes its time to start them
    )
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout))
    try:
        result = function(rank, *args)
    except Exception as error:
        result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(result, folder / f"{rank}.part")
    os.replace(folder / f"{rank}.part", folder / f"{rank}.pt")
    # Without goodbye: it would wait for ranks that a test has killed.
    os._exit(0)
