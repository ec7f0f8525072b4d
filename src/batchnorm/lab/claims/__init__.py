"""The claims of the study, in the order in which they are shown: a plain tuple, nothing registers itself."""

from __future__ import annotations

from batchnorm.lab.claim import Claim

CLAIMS: tuple[Claim, ...] = ()

__all__ = ["CLAIMS"]
