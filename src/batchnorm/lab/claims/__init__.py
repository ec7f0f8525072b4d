"""The claims of the study, in the order in which they are shown: a plain tuple, nothing registers itself."""

from __future__ import annotations

from batchnorm.lab.claim import Claim
from batchnorm.lab.claims import (
    batch_size,
    distribution_drift,
    feature_scaling,
    inference_statistics,
    initial_scale,
    learning_rates,
    paper_rates,
    placement,
    sigmoid_steps,
    vanishing_gradients,
)

CLAIMS: tuple[Claim, ...] = (
    feature_scaling,
    sigmoid_steps,
    vanishing_gradients,
    distribution_drift,
    learning_rates,
    initial_scale,
    batch_size,
    inference_statistics,
    placement,
    paper_rates,
)

__all__ = ["CLAIMS"]
