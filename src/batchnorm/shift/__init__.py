"""Covariate shift in tables and in layers: found by a calibrated comparison, and treated only on evidence."""

from batchnorm.shift.compare import Comparison as Comparison
from batchnorm.shift.compare import Variable as Variable
from batchnorm.shift.compare import compare as compare
from batchnorm.shift.density_ratio import KLIEP as KLIEP
from batchnorm.shift.density_ratio import ULSIF as ULSIF
from batchnorm.shift.density_ratio import ClassifierRatio as ClassifierRatio
from batchnorm.shift.density_ratio import RuLSIF as RuLSIF
from batchnorm.shift.effect import Effect as Effect
from batchnorm.shift.reference import Reference as Reference
from batchnorm.shift.treat import Treatment as Treatment
from batchnorm.shift.treat import treat as treat
