"""The compiled core: csrc/bindings.cpp. Python code uses it through batchnorm.kernels.cpu."""

from collections.abc import Callable
from typing import Any

import torch

def forward(
    x: torch.Tensor,
    y: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: int,
    reduces: bool,
    maps: bool,
    threads: int,
    /,
) -> int: ...
def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    dx: torch.Tensor | None,
    dresidual: torch.Tensor | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: int,
    sum_dz: torch.Tensor | None,
    sum_dz_xhat: torch.Tensor | None,
    count: int,
    reduces: bool,
    maps: bool,
    is_estimated: bool,
    threads: int,
    /,
) -> bool: ...
def wide_stats(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, threads: int, /) -> int: ...

class Pass:
    """What backward needs of a forward pass besides its tensors: csrc/pass.hpp."""

    count: int
    eps: float
    is_estimated: bool
    is_taken: bool
    def write(self, mean: torch.Tensor, var: torch.Tensor, /) -> None: ...

def train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: int,
    features: int,
    threads: int,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float,
    /,
) -> tuple[torch.Tensor, Pass] | None: ...
def train_in_graph(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    features: int,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float,
    /,
) -> tuple[torch.Tensor, Pass | None, bool] | None: ...
def infer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: int,
    features: int,
    threads: int,
    mean: torch.Tensor,
    var: torch.Tensor,
    out: torch.Tensor | None,
    /,
) -> tuple[torch.Tensor, Pass] | None: ...
def differentiate(
    done: Pass,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    wanted: tuple[bool, ...],
    threads: int,
    /,
) -> tuple[torch.Tensor | None, ...] | None: ...
def set_torch(
    tensor: type,
    parameter: type,
    empty_like: Callable[[torch.Tensor], torch.Tensor],
    is_neg: Callable[[torch.Tensor], bool],
    new_large: Callable[[torch.Tensor], torch.Tensor],
    large: int,
    /,
) -> None: ...
def install_node(library: str, /) -> bool: ...
def set_node(cudnn_batch_norm: Callable[..., Any], /) -> None: ...
def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    tracked: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: int,
    momentum: float,
    /,
) -> bool: ...

POOLED_BYTES: int

def pooled_like(x: torch.Tensor, /) -> object | None: ...
def usual_pool_limit() -> int: ...
def limit_pool(bytes: int, /) -> None: ...
def recycle_heap(bytes: int, /) -> None: ...
def pool_state() -> list[int]: ...
def set_exchange_api(capsule: Any, /) -> None: ...
def has_exchange_api() -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def choose_instruction_set(name: str, /) -> None: ...
def forbid_threads() -> None: ...
def cache_bytes() -> list[int]: ...
