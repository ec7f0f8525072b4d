"""Networks for images, built from their description: VGG, Inception, plain and residual stacks, dense."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import ImageKind, ImageNetwork, ImageNorm
from batchnorm.layers.batch_norm import BatchNorm1d, BatchNorm2d
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.ghost import GhostBatchNorm
from batchnorm.layers.renorm import BatchRenorm

GROUPS = 8
"""Groups of group normalisation and of decorrelated batch normalisation, where the channels allow it."""
GHOST_SIZE = 16
"""Images in a ghost batch."""
R_MAX, D_MAX = ((50, 1.0), (400, 3.0)), ((50, 0.0), (250, 5.0))
"""The schedule of batch renormalization: the paper's with a hundredth of its steps."""


def build(network: ImageNetwork, shape: tuple[int, int, int], classes: int, *, seed: int) -> nn.Module:
    """A network with its initial weights.

    Weights are Gaussian, by He's rule in front of ReLU and LeCun's otherwise, biases 0. Networks that differ in their
    normalisation only start from the same weights.

    Args:
        network: its description.
        shape: of an image, (channels, height, width).
        classes: number of classes.
        seed: of the weights, and of what is dropped or added in training.

    Returns:
        The network, in training mode: (N, channels, height, width) -> logits, (N, classes).

    Raises:
        ArgumentError: there is no such kind, or the images are too small for it.
    """
    if network.kind not in _KINDS:
        raise ArgumentError(f"expected a network of kind {', '.join(_KINDS)}; got {network.kind!r}")
    made = _KINDS[network.kind](network, shape, classes)
    generator = torch.Generator().manual_seed(seed)
    gain = 2.0 if network.activation == "relu" else 1.0
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            scale = math.sqrt(gain / fan_in)
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
                if module.bias is not None:
                    module.bias.zero_()
        if isinstance(module, Noise):
            module.generator.manual_seed(seed)
    return made


def normalised_layers(network: nn.Module) -> list[nn.Module]:
    """The modules that stand for a normalisation, `nn.Identity` where there is none, in the order of the network."""
    return [module.norm for module in network.modules() if isinstance(module, _Normalised)]


class _Normalised(nn.Module):
    """A linear map, its normalisation and its activation."""

    def __init__(self, linear: nn.Module, units: int, network: ImageNetwork, *, activates: bool = True) -> None:
        super().__init__()
        self.linear = linear
        self.norm = _norm(network, units, is_map=isinstance(linear, nn.Conv2d))
        self.activation = _activation(network) if activates else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.linear(x)))
        return y


class Noise(nn.Module):
    """Noise after batch normalisation: y * s + m, drawn anew at each step for each value.

    s and m are normal with means 1 and 0 and standard deviations that are drawn once more for each channel and step,
    so that the distribution a layer sees shifts from step to step (Santurkar et al. 2018, section 2.2, whose noise has
    a time-varying mean and variance; the sizes here are ours).
    """

    SPREAD = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        """Noisy in training, unchanged in evaluation."""
        if not self.training:
            return x
        channels = (1, x.shape[1], *[1] * (x.ndim - 2))
        shift = torch.randn(channels, generator=self.generator) * self.SPREAD
        scale = 1 + torch.randn(channels, generator=self.generator) * self.SPREAD
        spread = torch.rand(channels, generator=self.generator) * self.SPREAD
        return x * scale + shift + torch.randn(x.shape, generator=self.generator) * spread


class _Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, two 3x3 (in place of a 5x5), and pooling."""

    def __init__(self, inputs: int, units: int, network: ImageNetwork) -> None:
        super().__init__()

        def conv(before: int, after: int, size: int) -> nn.Module:
            return _conv(before, after, network, size=size)

        self.one = conv(inputs, units, 1)
        self.three = nn.Sequential(conv(inputs, units, 1), conv(units, 2 * units, 3))
        half = max(units // 2, 1)
        self.five = nn.Sequential(conv(inputs, half, 1), conv(half, units, 3), conv(units, units, 3))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(inputs, units, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)

    @staticmethod
    def channels(units: int) -> int:
        """Channels that come out of the four branches."""
        return 5 * units


class _Residual(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, width: int, network: ImageNetwork) -> None:
        super().__init__()
        self.first = _conv(width, width, network)
        self.second = _conv(width, width, network, activates=False)
        self.activation = _activation(network)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(x + self.second(self.first(x)))
        return y


def _conv(before: int, after: int, network: ImageNetwork, *, size: int = 3, activates: bool = True) -> _Normalised:
    # A bias in front of a normalisation would be subtracted again with the mean.
    linear = nn.Conv2d(before, after, size, padding=size // 2, bias=network.norm == "none")
    return _Normalised(linear, after, network, activates=activates)


def _vgg(network: ImageNetwork, shape: tuple[int, int, int], classes: int) -> nn.Module:
    _check_side(network, shape, 8)
    layers: list[nn.Module] = []
    before = shape[0]
    for stage in range(3):
        width = network.width << stage
        layers += [_conv(before, width, network), _conv(width, width, network), nn.MaxPool2d(2)]
        before = width
    features = before * (shape[1] // 8) * (shape[2] // 8)
    return nn.Sequential(*layers, nn.Flatten(), *_dropout(network), nn.Linear(features, classes))


def _inception(network: ImageNetwork, shape: tuple[int, int, int], classes: int) -> nn.Module:
    _check_side(network, shape, 4)
    width = network.width
    layers: list[nn.Module] = [_conv(shape[0], 2 * width, network)]
    if network.responses:
        layers.append(nn.LocalResponseNorm(5))
    before = 2 * width
    for stage, units in enumerate((width // 2, width, width)):
        layers.append(_Inception(before, units, network))
        before = _Inception.channels(units)
        if stage < 2:
            layers.append(nn.MaxPool2d(2))
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *pooled, *_dropout(network), nn.Linear(before, classes))


def _plain(network: ImageNetwork, shape: tuple[int, int, int], classes: int) -> nn.Module:
    layers = [_conv(shape[0] if k == 0 else network.width, network.width, network) for k in range(network.depth)]
    return nn.Sequential(*layers, *_pooled_output(network, classes))


def _residual(network: ImageNetwork, shape: tuple[int, int, int], classes: int) -> nn.Module:
    first = _conv(shape[0], network.width, network)
    blocks = [_Residual(network.width, network) for _ in range((network.depth - 1) // 2)]
    return nn.Sequential(first, *blocks, *_pooled_output(network, classes))


def _dense(network: ImageNetwork, shape: tuple[int, int, int], classes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    before = math.prod(shape)
    for layer in range(network.depth):
        linear = nn.Linear(before, network.width, bias=network.norm == "none")
        layers += [*(_dropout(network) if layer else ()), _Normalised(linear, network.width, network)]
        before = network.width
    return nn.Sequential(*layers, *_dropout(network), nn.Linear(before, classes))


_KINDS: dict[ImageKind, Callable[[ImageNetwork, tuple[int, int, int], int], nn.Module]] = {
    "dense": _dense,
    "vgg": _vgg,
    "inception": _inception,
    "plain": _plain,
    "residual": _residual,
}


def _pooled_output(network: ImageNetwork, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), *_dropout(network), nn.Linear(network.width, classes)


def _dropout(network: ImageNetwork) -> tuple[nn.Module, ...]:
    return (nn.Dropout(network.dropout),) if network.dropout else ()


def _activation(network: ImageNetwork) -> nn.Module:
    kinds: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "identity": nn.Identity}
    return kinds[network.activation]()


def _norm(network: ImageNetwork, units: int, *, is_map: bool) -> nn.Module:
    batch = BatchNorm2d if is_map else BatchNorm1d
    groups = math.gcd(GROUPS, units)
    makers: dict[ImageNorm, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "batch": lambda: batch(units, momentum=network.momentum),
        "group": lambda: nn.GroupNorm(groups, units),
        "layer": lambda: nn.GroupNorm(1, units),
        "instance": lambda: nn.GroupNorm(units, units),
        "renorm": lambda: BatchRenorm(units, momentum=network.momentum, r_max=R_MAX, d_max=D_MAX),
        "ghost": lambda: GhostBatchNorm(units, ghost_size=GHOST_SIZE, momentum=network.momentum),
        "decorrelated": lambda: DecorrelatedBatchNorm(units, momentum=network.momentum, group_size=units // groups),
        "noisy": lambda: nn.Sequential(batch(units, momentum=network.momentum), Noise()),
    }
    return makers[network.norm]()


def _check_side(network: ImageNetwork, shape: tuple[int, int, int], least: int) -> None:
    if shape[1] < least or shape[2] < least:
        raise ArgumentError(
            f"a network of kind {network.kind!r} needs images of {least}x{least} pixels at least, got {shape[1:]}"
        )
