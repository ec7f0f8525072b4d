"""The claims of the study, in the order in which they are shown: a plain tuple, nothing registers itself."""

from __future__ import annotations

from batchnorm.lab.claim import Claim
from batchnorm.lab.claims import (
    batch_size,
    cost,
    covariate_shift,
    distribution_drift,
    domain_shift,
    feature_scaling,
    image_statistics,
    inference_statistics,
    initial_scale,
    landscape,
    learning_rates,
    noisy,
    own_batches,
    own_gradients,
    own_landscape,
    own_rates,
    own_statistics,
    paper_mnist,
    paper_rates,
    placement,
    regularisation,
    residual_gradients,
    sigmoid_steps,
    small_batches,
    vanishing_gradients,
    whitening,
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
    paper_mnist,
    regularisation,
    paper_rates,
    covariate_shift,
    landscape,
    noisy,
    residual_gradients,
    small_batches,
    image_statistics,
    whitening,
    domain_shift,
    cost,
    own_rates,
    own_batches,
    own_statistics,
    own_gradients,
    own_landscape,
)

__all__ = ["CLAIMS"]
