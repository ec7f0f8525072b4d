"""recalibrate(): a model and data become the statistics of inference; merge_statistics(): those of several models."""

from batchnorm.recalibration.estimation import recalibrate as recalibrate
from batchnorm.recalibration.federation import merge_statistics as merge_statistics
from batchnorm.recalibration.report import LayerChange as LayerChange
from batchnorm.recalibration.report import RecalibrationReport as RecalibrationReport
from batchnorm.recalibration.report import Skipped as Skipped
