"""Stand-ins for timm's and torchvision's layers, which the tests do without: same names, homes and behaviour."""

from __future__ import annotations

import torch
from torch import nn


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: normalization, then drop, then act."""

    def __init__(self, num_features, *, act=None, drop=None, **arguments):
        super().__init__(num_features, **arguments)
        self.drop = drop or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's, which gets its modules from outside."""

    def forward(self, x):
        return self.act(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        weight, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """As timm's."""

    def __init__(self, num_features, *, act=None):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


for _layer in (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d):
    _layer.__module__ = "timm.layers.norm_act"
FrozenBatchNorm2d.__module__ = "torchvision.ops.misc"
