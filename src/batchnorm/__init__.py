"""Batch normalization: exact statistics, drop-in layers, and the paper's claims measured on real data.

The public names are below; each is loaded when it is first used, so that importing batchnorm imports no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.functional import batch_norm as batch_norm
    from batchnorm.layers.batch_norm import BatchNorm as BatchNorm
    from batchnorm.layers.batch_norm import BatchNorm1d as BatchNorm1d
    from batchnorm.layers.batch_norm import BatchNorm2d as BatchNorm2d
    from batchnorm.layers.batch_norm import BatchNorm3d as BatchNorm3d
    from batchnorm.layers.decorrelated import DecorrelatedBatchNorm as DecorrelatedBatchNorm
    from batchnorm.layers.domain import DomainBatchNorm as DomainBatchNorm
    from batchnorm.layers.domain import use_domain as use_domain
    from batchnorm.layers.dual import dual_batch_norm as dual_batch_norm
    from batchnorm.layers.feature import FeatureNormalization as FeatureNormalization
    from batchnorm.layers.frozen import FrozenBatchNorm as FrozenBatchNorm
    from batchnorm.layers.ghost import GhostBatchNorm as GhostBatchNorm
    from batchnorm.layers.renorm import BatchRenorm as BatchRenorm
    from batchnorm.layers.save_memory import save_memory as save_memory
    from batchnorm.layers.sync import SyncBatchNorm as SyncBatchNorm
    from batchnorm.layers.transactions import transaction as transaction
    from batchnorm.layers.weight_decay import parameter_groups as parameter_groups
    from batchnorm.recalibration.estimation import recalibrate as recalibrate
    from batchnorm.recalibration.federation import merge_statistics as merge_statistics
    from batchnorm.stats.moments import Moments as Moments
    from batchnorm.surgery.conversion import convert as convert
    from batchnorm.surgery.exporting import export_onnx as export_onnx
    from batchnorm.surgery.folding import fold as fold
    from batchnorm.surgery.freezing import freeze as freeze
    from batchnorm.surgery.freezing import unfreeze as unfreeze
    from batchnorm.surgery.fusing import fuse_activations as fuse_activations
    from batchnorm.surgery.onnx_folding import fold_onnx as fold_onnx
    from batchnorm.surgery.porting.operation import port as port
    from batchnorm.surgery.saved_bytes import saved_bytes as saved_bytes

__version__ = "0.1.0"

_HOMES = {
    "batch_norm": "batchnorm.functional",
    "BatchNorm": "batchnorm.layers.batch_norm",
    "BatchNorm1d": "batchnorm.layers.batch_norm",
    "BatchNorm2d": "batchnorm.layers.batch_norm",
    "BatchNorm3d": "batchnorm.layers.batch_norm",
    "convert": "batchnorm.surgery.conversion",
    "dual_batch_norm": "batchnorm.layers.dual",
    "FeatureNormalization": "batchnorm.layers.feature",
    "Moments": "batchnorm.stats.moments",
    "export_onnx": "batchnorm.surgery.exporting",
    "fold": "batchnorm.surgery.folding",
    "fold_onnx": "batchnorm.surgery.onnx_folding",
    "freeze": "batchnorm.surgery.freezing",
    "fuse_activations": "batchnorm.surgery.fusing",
    "merge_statistics": "batchnorm.recalibration.federation",
    "port": "batchnorm.surgery.porting.operation",
    "parameter_groups": "batchnorm.layers.weight_decay",
    "recalibrate": "batchnorm.recalibration.estimation",
    "save_memory": "batchnorm.layers.save_memory",
    "saved_bytes": "batchnorm.surgery.saved_bytes",
    "transaction": "batchnorm.layers.transactions",
    "unfreeze": "batchnorm.surgery.freezing",
    "GhostBatchNorm": "batchnorm.layers.ghost",
    "BatchRenorm": "batchnorm.layers.renorm",
    "DecorrelatedBatchNorm": "batchnorm.layers.decorrelated",
    "FrozenBatchNorm": "batchnorm.layers.frozen",
    "DomainBatchNorm": "batchnorm.layers.domain",
    "use_domain": "batchnorm.layers.domain",
    "SyncBatchNorm": "batchnorm.layers.sync",
}

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "DecorrelatedBatchNorm",
    "DomainBatchNorm",
    "FeatureNormalization",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "Moments",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "dual_batch_norm",
    "export_onnx",
    "fold",
    "fold_onnx",
    "freeze",
    "fuse_activations",
    "merge_statistics",
    "parameter_groups",
    "port",
    "recalibrate",
    "save_memory",
    "saved_bytes",
    "transaction",
    "unfreeze",
    "use_domain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
