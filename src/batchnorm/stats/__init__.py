"""Moments of activations, and what is made of them."""

from batchnorm.stats.moments import Moments as Moments
from batchnorm.stats.population import mean_of_batches as mean_of_batches
from batchnorm.stats.population import moving_average as moving_average
from batchnorm.stats.population import population as population
from batchnorm.stats.running import Running as Running
