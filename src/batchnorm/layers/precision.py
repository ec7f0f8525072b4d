"""Statistics stay float32 at least: in half precision a running average stalls."""

from __future__ import annotations

import torch


def widened(now: torch.Tensor | None, before: torch.Tensor | None = None) -> torch.Tensor | None:
    """`now` in float32 where it is of half precision: a bfloat16 mean cannot take a step below 1/256 of its value.

    Args:
        now: a statistic, any shape, any float dtype.
        before: the same before it was converted to half precision; its digits are taken if they were more.
    """
    if now is None or now.dtype not in (torch.bfloat16, torch.float16):
        return now
    source = now if before is None or before.dtype == now.dtype else before
    return source.to(device=now.device, dtype=torch.float32)
