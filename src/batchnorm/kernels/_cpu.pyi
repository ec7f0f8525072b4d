"""The compiled core: csrc/bindings.cpp. Python code uses it through batchnorm.kernels.cpu."""

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
def is_ordinary(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    /,
) -> bool: ...
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
def pool_state() -> list[int]: ...
def set_exchange_api(capsule: Any, /) -> None: ...
def has_exchange_api() -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def choose_instruction_set(name: str, /) -> None: ...
def forbid_threads() -> None: ...
def cache_bytes() -> list[int]: ...
