"""Covariate shift in tables and in layers: found by a calibrated comparison, and treated only on evidence."""

from batchnorm.shift.compare import Comparison as Comparison
from batchnorm.shift.compare import Variable as Variable
from batchnorm.shift.compare import compare as compare
from batchnorm.shift.effect import Effect as Effect
from batchnorm.shift.reference import Reference as Reference
