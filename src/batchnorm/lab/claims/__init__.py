"""The claims of the study, in the order in which they are shown: a plain tuple, nothing registers itself."""

from __future__ import annotations

from batchnorm.lab.claim import Claim
from batchnorm.lab.claims import feature_scaling, sigmoid_steps, vanishing_gradients

CLAIMS: tuple[Claim, ...] = (feature_scaling, sigmoid_steps, vanishing_gradients)

__all__ = ["CLAIMS"]
