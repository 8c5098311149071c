"""The networks that train.py trains on 32x32 images.  Needs the extra: pip install '.[train]'

Sources: ResNet arXiv 1512.03385, MobileNetV2 arXiv 1801.04381, Inception-v3 arXiv 1512.00567.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Size = int | tuple[int, int]
COLORS = 3


def conv(
    ic: int, oc: int, kernel: Size = 3, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """A convolution that keeps the size, except for its stride; BatchNormalization; an activation, ReLU by default."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (sides[0] // 2, sides[1] // 2)
    layers = [nn.Conv2d(ic, oc, sides, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(oc)]
    return nn.Sequential(*layers, nn.ReLU() if activation is None else activation)


class Head(nn.Module):  # type: ignore[misc,unused-ignore]  # torch is typed only where it is installed
    """The mean over the image, and one linear layer."""

    def __init__(self, ic: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(ic, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


# ------------------------------------------------------------------------------------------------ ResNet


class BasicBlock(nn.Module):  # type: ignore[misc,unused-ignore]
    """He et al. 2015 (arXiv 1512.03385), figure 2 left, with the parameter-free shortcut (option A)."""

    def __init__(self, ic: int, oc: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ic, oc, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(oc)
        self.conv2 = nn.Conv2d(oc, oc, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(oc)
        self.stride, self.pad = stride, (oc - ic) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(x + y)


class CifarResNet(nn.Module):  # type: ignore[misc,unused-ignore]
    """The CIFAR ResNet of arXiv 1512.03385 section 4.2: 6n+2 layers, 16/32/64 channels; n=3 has 269,722 parameters."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        stages, ic = [], 16
        for oc in (16, 32, 64):
            for block in range(blocks):
                stages.append(BasicBlock(ic, oc, 2 if oc > 16 and block == 0 else 1))
                ic = oc
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(functional.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


class Residual(nn.Module):  # type: ignore[misc,unused-ignore]
    """A branch and a shortcut, which is a 1x1 convolution where the shape changes (option B), summed."""

    def __init__(self, branch: nn.Module, ic: int, oc: int, stride: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        plain = ic == oc and stride == 1
        self.branch = branch
        self.shortcut = nn.Identity() if plain else conv(ic, oc, 1, stride, activation=nn.Identity())
        self.activation = nn.ReLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.branch(x) + self.shortcut(x))
        return y


def imagenet_resnet(counts: tuple[int, ...], bottleneck: bool, classes: int, first: int = 64) -> nn.Module:
    """ResNet-18/50 (table 1 of arXiv 1512.03385) with the stem for 32x32 images: 3x3, stride 1, no pooling.

    first: channels of the stem and of the first stage's inner layers.
    """
    layers: list[nn.Module] = [conv(3, first)]
    ic, linear = first, nn.Identity()
    for stage, count in enumerate(counts):
        width = first << stage
        oc = 4 * width if bottleneck else width
        for block in range(count):
            stride = 2 if stage and not block else 1
            if bottleneck:
                branch = nn.Sequential(conv(ic, width, 1), conv(width, width, 3, stride), conv(width, oc, 1, activation=linear))
            else:
                branch = nn.Sequential(conv(ic, width, 3, stride), conv(width, oc, activation=linear))
            layers.append(Residual(branch, ic, oc, stride))
            ic = oc
    return nn.Sequential(*layers, Head(ic, classes))


# ------------------------------------------------------------------------------------------------ MobileNetV2


class InvertedResidual(nn.Module):  # type: ignore[misc,unused-ignore]
    """Section 3.3 of arXiv 1801.04381: widen by 1x1, depthwise 3x3, narrow by 1x1 without activation."""

    def __init__(self, ic: int, oc: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = ic * expansion
        self.branch = nn.Sequential(
            conv(ic, width, 1, activation=nn.ReLU6()),
            conv(width, width, 3, stride, groups=width, activation=nn.ReLU6()),
            conv(width, oc, 1, activation=nn.Identity()),
        )
        self.shortcut = ic == oc and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return x + y if self.shortcut else y


def mobilenet(classes: int) -> nn.Module:
    """A MobileNetV2 for 32x32 images: three resolutions; depthwise layers hold 4 % of its 0.24 M weights."""
    layers: list[nn.Module] = [conv(3, 16, activation=nn.ReLU6())]
    ic = 16
    for oc, count, stride, expansion in ((16, 1, 1, 2), (32, 3, 2, 4), (64, 4, 2, 6)):
        for block in range(count):
            layers.append(InvertedResidual(ic, oc, stride if block == 0 else 1, expansion))
            ic = oc
    return nn.Sequential(*layers, conv(ic, 256, 1, activation=nn.ReLU6()), Head(256, classes))


# ------------------------------------------------------------------------------------------------ Inception


class Branches(nn.Module):  # type: ignore[misc,unused-ignore]
    """Branches over the same input, concatenated along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        for output in outputs:
            if output.requires_grad:  # the gradient of torch.cat is a slice, on which ReLU's backward pass is slow
                output.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return torch.cat(outputs, 1)


class _MeanPoolFunction(torch.autograd.Function):  # type: ignore[misc,unused-ignore]
    """3x3 mean pooling with zero padding.  It is its own transpose, and PyTorch's backward pass is several times slower."""

    @staticmethod
    def forward(_context: object, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 3, 1, 1)

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:
        return functional.avg_pool2d(gradient, 3, 1, 1)


class _MeanPool(nn.Module):  # type: ignore[misc,unused-ignore]
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _MeanPoolFunction.apply(x) if self.training else functional.avg_pool2d(x, 3, 1, 1)
        return y


def _mean_pool(ic: int, oc: int) -> nn.Module:
    return nn.Sequential(_MeanPool(), conv(ic, oc, 1))


def _max_pool() -> nn.Module:
    return nn.MaxPool2d(3, 2, 1)


def _small_block(ic: int, one: int, three: int, five: int, pool: int) -> nn.Module:
    """Figure 5 of arXiv 1512.00567, reduced; the parameters are the branches' channels."""
    return Branches(
        conv(ic, one, 1),
        nn.Sequential(conv(ic, three * 2 // 3, 1), conv(three * 2 // 3, three)),
        nn.Sequential(conv(ic, five * 2 // 3, 1), conv(five * 2 // 3, five), conv(five, five)),
        _mean_pool(ic, pool),
    )


def _small_factorized(ic: int, one: int, wide: int, pool: int) -> nn.Module:
    """Figure 6 of arXiv 1512.00567 with n = 5, reduced."""
    inner = wide * 2 // 3
    return Branches(
        conv(ic, one, 1),
        nn.Sequential(conv(ic, inner, 1), conv(inner, inner, (1, 5)), conv(inner, wide, (5, 1))),
        _mean_pool(ic, pool),
    )


def small_inception(classes: int) -> nn.Module:
    """Inception blocks of three kinds at three resolutions, 0.27 M weights."""
    return nn.Sequential(
        conv(3, 16), conv(16, 32), _small_block(32, 16, 24, 12, 12),
        _max_pool(), _small_block(64, 32, 48, 24, 24), _small_factorized(128, 48, 56, 24),
        _max_pool(), _small_block(128, 48, 72, 36, 36), _small_factorized(192, 80, 96, 48), Head(224, classes),
    )  # fmt: skip


class _InceptionV3:
    """The blocks of Inception-v3 (table 1 of arXiv 1512.00567), with all numbers of channels divided by the same factor."""

    def __init__(self, divisor: int) -> None:
        self._divisor = divisor

    def _conv(self, ic: int, oc: int, kernel: Size = 3, stride: int = 1) -> nn.Sequential:
        return conv(ic if ic == COLORS else ic // self._divisor, oc // self._divisor, kernel, stride)

    def _mean_pool(self, ic: int, oc: int) -> nn.Module:
        return _mean_pool(ic // self._divisor, oc // self._divisor)

    def _a(self, ic: int, pool: int) -> nn.Module:
        return Branches(
            self._conv(ic, 64, 1),
            nn.Sequential(self._conv(ic, 48, 1), self._conv(48, 64, 5)),
            nn.Sequential(self._conv(ic, 64, 1), self._conv(64, 96), self._conv(96, 96)),
            self._mean_pool(ic, pool),
        )

    def _b(self, ic: int) -> nn.Module:
        narrow = nn.Sequential(self._conv(ic, 64, 1), self._conv(64, 96), self._conv(96, 96, 3, 2))
        return Branches(self._conv(ic, 384, 3, 2), narrow, _max_pool())

    def _c(self, ic: int, inner: int) -> nn.Module:
        row, column = (1, 7), (7, 1)
        return Branches(
            self._conv(ic, 192, 1),
            nn.Sequential(self._conv(ic, inner, 1), self._conv(inner, inner, row), self._conv(inner, 192, column)),
            nn.Sequential(
                self._conv(ic, inner, 1),
                self._conv(inner, inner, column),
                self._conv(inner, inner, row),
                self._conv(inner, inner, column),
                self._conv(inner, 192, row),
            ),
            self._mean_pool(ic, 192),
        )

    def _d(self, ic: int) -> nn.Module:
        long = (self._conv(ic, 192, 1), self._conv(192, 192, (1, 7)), self._conv(192, 192, (7, 1)), self._conv(192, 192, 3, 2))
        return Branches(nn.Sequential(self._conv(ic, 192, 1), self._conv(192, 320, 3, 2)), nn.Sequential(*long), _max_pool())

    def _e(self, ic: int) -> nn.Module:
        def pair(oc: int) -> nn.Module:
            return Branches(self._conv(oc, 384, (1, 3)), self._conv(oc, 384, (3, 1)))

        return Branches(
            self._conv(ic, 320, 1),
            nn.Sequential(self._conv(ic, 384, 1), pair(384)),
            nn.Sequential(self._conv(ic, 448, 1), self._conv(448, 384), pair(384)),
            self._mean_pool(ic, 192),
        )

    def net(self, classes: int) -> nn.Module:
        """The whole network without the auxiliary head and dropout, with a stem for 32x32 images."""
        return nn.Sequential(
            self._conv(COLORS, 192),
            self._a(192, 32), self._a(256, 64), self._a(288, 64),
            self._b(288), self._c(768, 128), self._c(768, 160), self._c(768, 160), self._c(768, 192),
            self._d(768), self._e(1280), self._e(2048), Head(2048 // self._divisor, classes),
        )  # fmt: skip


NETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": lambda classes: CifarResNet(3, classes),
    "resnet56": lambda classes: CifarResNet(9, classes),
    "resnet18": lambda classes: imagenet_resnet((2, 2, 2, 2), False, classes),
    "resnet50": lambda classes: imagenet_resnet((3, 4, 6, 3), True, classes),
    "mobilenet": mobilenet,
    "small_inception": small_inception,
    "inception_v3": _InceptionV3(1).net,
    "resnet18_quarter": lambda classes: imagenet_resnet((2, 2, 2, 2), False, classes, 16),
    "resnet50_quarter": lambda classes: imagenet_resnet((3, 4, 6, 3), True, classes, 16),
    "inception_v3_quarter": _InceptionV3(4).net,
}
