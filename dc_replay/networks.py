"""Networks to match with and to train on exemplars, and a matching network as a pure function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_replay.errors import ArgumentError

Parameters = dict[str, Tensor]
"""Weights of a network by name."""

NetworkFactory = Callable[[int], nn.Module]
"""Builds a freshly initialised classifier of images for a number of classes."""

Norm = Literal["instance", "batch"]

Precision = Literal["auto", "float32", "bfloat16"]
"""What convolutions compute in; ``"auto"`` is bfloat16 where the hardware has it."""


class FeatureNetwork(nn.Module):
    """A classifier made of ``embed``, which yields features, and a linear ``head``."""

    head: nn.Module

    def embed(self, images: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to features ``[batch, features]``."""
        raise NotImplementedError(f"{type(self).__name__} must define embed")

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to logits ``[batch, classes]``."""
        logits: Tensor = self.head(self.embed(images))
        return logits


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return InstanceNorm(channels)


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation with affine weights.

    Eagerly it is a group normalisation with one group for each channel, which on a CPU is much
    faster than ``nn.InstanceNorm2d``. Compiled, it is a formula that a compiler fuses with what
    comes before and after, and that reads the images once for both moments.

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``[batch, channels, height, width]``."""
        if not torch.compiler.is_compiling():
            return super().forward(images)
        return self.formula(images)

    def formula(self, images: Tensor) -> Tensor:
        """The same, from the mean and the mean square."""
        # Moments about a pixel do not cancel out where an image's mean is far from 0; the result
        # is the same whichever it is, so it needs no gradient.
        images = images - images[..., :1, :1].detach()
        mean = images.mean(dim=(2, 3), keepdim=True)
        variance = (images.square().mean(dim=(2, 3), keepdim=True) - mean.square()).clamp(min=0)
        scale = torch.rsqrt(variance + self.eps) * self.weight[:, None, None]
        return images * scale + (self.bias[:, None, None] - mean * scale)


class HalvingPool(nn.AvgPool2d):
    """Average pooling of 2 by 2 pixels; compiled, a mean that is fused with what comes before."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, images: Tensor) -> Tensor:
        """Pool ``[batch, channels, height, width]``; an odd last row or column is left out."""
        if not torch.compiler.is_compiling():
            return super().forward(images)
        return self.formula(images)

    def formula(self, images: Tensor) -> Tensor:
        """The same, as a mean over parts of a view."""
        height, width = images.shape[-2] // 2, images.shape[-1] // 2
        whole = images[..., : 2 * height, : 2 * width]
        return whole.reshape(*images.shape[:2], height, 2, width, 2).mean(dim=(3, 5))


class ConvNet(FeatureNetwork):
    """ConvNet-D: ``depth`` times convolution, instance normalisation, ReLU and average pooling.

    Source: Gidaris and Komodakis, CVPR 2018; the usual network of the condensation papers.

    Args:
        classes: Number of outputs.
        channels: Channels of the images.
        size: Height and width of the images. Where they are 28x28 the first convolution pads by
            3, as published, so that the sides become 32.
        width: Channels of each layer.
        depth: Number of layers; each halves the sides.

    Raises:
        ArgumentError: If nothing is left of the image after ``depth`` halvings.
    """

    def __init__(
        self,
        classes: int,
        *,
        channels: int = 3,
        size: tuple[int, int] = (32, 32),
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        height, width_left = size
        layers: list[nn.Module] = []
        for layer in range(depth):
            padding = 3 if layer == 0 and tuple(size) == (28, 28) else 1
            layers += [
                nn.Conv2d(channels, width, 3, padding=padding),
                _norm("instance", width),
                nn.ReLU(),
                HalvingPool(),
            ]
            height = (height + 2 * padding - 2) // 2
            width_left = (width_left + 2 * padding - 2) // 2
            channels = width
        if min(height, width_left) < 1:
            raise ArgumentError(
                f"`depth` is {depth}, but images of {size[0]}x{size[1]} pixels can be halved fewer "
                f"times; use a smaller depth"
            )
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width * height * width_left, classes)

    def embed(self, images: Tensor) -> Tensor:
        """Map images to flattened features."""
        features: Tensor = self.layers(images)
        return features.flatten(1)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; halves the sides by stride or by pooling."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, pool: bool) -> None:
        super().__init__()
        step = 1 if pool else stride
        shrink: list[nn.Module] = [HalvingPool()] if pool and stride > 1 else []
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=step, padding=1, bias=False),
            _norm(norm, outputs),
            nn.ReLU(),
            *shrink,
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            _norm(norm, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=step, bias=False),
                *shrink,
                _norm(norm, outputs),
            )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.main(images) + self.shortcut(images))


def _stem(
    channels: int, width: int, size: tuple[int, int], norm: Norm, pool: bool
) -> list[nn.Module]:
    """What comes before the first stage; it shrinks images of more than 64 pixels to a side."""
    side = min(size)
    halvings = 2 if side > 128 else 1 if side > 64 else 0
    kernel = 7 if halvings == 2 else 3
    stride = 2 if halvings == 2 and not pool else 1
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False),
        _norm(norm, width),
        nn.ReLU(),
    ]
    if pool:
        layers += [HalvingPool() for _ in range(halvings)]
    elif halvings:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return layers


class ResNet10(FeatureNetwork):
    """ResNet-10: a stem and four stages of one basic block, He-initialised.

    The stem is a 3x3 convolution. For sides of more than 64 pixels it halves them by max pooling;
    for more than 128 it is 7x7 and has a stride of 2 besides.

    With ``norm="instance"`` and ``pool=True`` it is ResNetAP-10, which replaces strides and max
    pooling by average pooling so that gradients to pixels are smooth.

    Source: He et al., CVPR 2016; the variant of Kim et al., ICML 2022.

    Args:
        classes: Number of outputs.
        channels: Channels of the images.
        size: Height and width of the images; the smaller one chooses the stem.
        width: Channels of the stem and first stage; later stages have 2, 4 and 8 times as many.
            Published are 32 for CIFAR and 64 for ImageNet.
        norm: ``"batch"`` or ``"instance"``.
        pool: Whether average pooling replaces strides.
    """

    def __init__(
        self,
        classes: int,
        *,
        channels: int = 3,
        size: tuple[int, int] = (32, 32),
        width: int = 32,
        norm: Norm = "batch",
        pool: bool = False,
    ) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        stages = _stem(channels, width, size, norm, pool)
        inputs = width
        for stage, outputs in enumerate(widths):
            stages.append(_Block(inputs, outputs, 1 if stage == 0 else 2, norm, pool))
            inputs = outputs
        self.layers = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        for module in self.layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, images: Tensor) -> Tensor:
        """Map images to features averaged over positions."""
        features: Tensor = self.layers(images)
        return features.mean(dim=(2, 3))


def resnet_ap10(
    classes: int, *, channels: int = 3, size: tuple[int, int] = (224, 224), width: int = 64
) -> ResNet10:
    """ResNetAP-10, the matching network for 224x224 images; see :class:`ResNet10`."""
    return ResNet10(classes, channels=channels, size=size, width=width, norm="instance", pool=True)


class DenseNet121(FeatureNetwork):
    """DenseNet-121 in its form for 32x32 images: a 3x3 stem of stride 1 without pooling.

    Source: Huang et al., CVPR 2017; torchvision's implementation.
    """

    def __init__(self, classes: int, *, channels: int = 3) -> None:
        super().__init__()
        from torchvision.models import densenet121

        network = densenet121(weights=None, num_classes=classes)
        self.layers = network.features
        self.layers.conv0 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layers.pool0 = nn.Identity()
        self.head = network.classifier

    def embed(self, images: Tensor) -> Tensor:
        """Map images to features averaged over positions."""
        features: Tensor = F.relu(self.layers(images))
        return features.mean(dim=(2, 3))


@functools.lru_cache(maxsize=64)
def convnet_for(shape: tuple[int, ...], *, width: int = 128) -> NetworkFactory:
    """A factory of ConvNets that fit images: 3 layers for sides of 32, 4 for 64, and so on.

    Args:
        shape: Ends in channels, height and width of the images.
        width: Channels of each layer.
    """
    channels, height, side = (int(n) for n in shape[-3:])
    depth = max(1, round(math.log2(min(height, side) / 4))) if min(height, side) > 1 else 1
    return functools.partial(
        ConvNet, channels=channels, size=(height, side), width=width, depth=depth
    )


class _BFloat16Conv2d(nn.Conv2d):
    """A convolution that computes in bfloat16 and keeps everything around it as it is."""

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self._conv_forward(images.bfloat16(), self.weight.bfloat16(), None)
        outputs = outputs.to(images.dtype)
        return outputs if self.bias is None else outputs + self.bias[:, None, None]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def computed_in(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """What a precision means on a device.

    Raises:
        ArgumentError: If it is unknown, or the device lacks it.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ArgumentError(
            f"`precision` is {precision!r}, but must be 'auto', 'float32' or 'bfloat16'"
        )
    if precision == "bfloat16" and not has_bfloat16(device):
        raise ArgumentError(
            f"`precision` is 'bfloat16', which the device {str(device)!r} does not multiply "
            f"natively; use 'auto', which takes float32 there"
        )
    if precision == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    return precision


def set_precision(network: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    """Let a network's convolutions compute in another precision, in place.

    Weights, normalisation layers, activations and losses stay in float32.

    Args:
        network: Any module; its ``nn.Conv2d`` layers are changed.
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for bfloat16 where the device
            has it.
        device: Where the network will run.

    Raises:
        ArgumentError: If the precision is unknown, or the device lacks it.
    """
    lower = computed_in(precision, device) == "bfloat16"
    for module in network.modules():
        if lower and type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.__class__ = _BFloat16Conv2d
        elif not lower and type(module) is _BFloat16Conv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return network


class MatchingNetwork:
    """A classifier as a pure function of its weights that also yields its last features.

    Built once for a factory; its weights live outside it, so a fresh network is a fresh
    dictionary of weights and the function stays the same.

    Any module that ends in a ``nn.Linear`` with one output for each class will do: the features are
    what enters that layer. Batch normalisation is made to use the statistics of each batch alone,
    because running ones are state.

    Args:
        factory: Builds a freshly initialised classifier for a number of classes.
        classes: Number of classes.
        example: Normalised images ``[batch, channels, height, width]`` as it will see them.
        precision: What its convolutions compute in; see :func:`set_precision`.

    Raises:
        ArgumentError: If the network does not accept the images, or has no usable features.
    """

    def __init__(
        self,
        factory: NetworkFactory,
        classes: int,
        example: Tensor,
        *,
        precision: Precision = "float32",
    ) -> None:
        self.factory = factory
        self.classes = classes
        self.device = example.device
        network = set_precision(self._build(), precision, example.device)
        if isinstance(network, FeatureNetwork):
            self._module: nn.Module = _OwnFeatures(network)
        else:
            self._module = _TappedFeatures(network, self._find_head(network))
        self._module.requires_grad_(False)
        self._shapes = {name: p.shape for name, p in network.named_parameters()}
        self._check(example[:1].expand(2, *example.shape[1:]))

    def fresh(self) -> Parameters:
        """Weights of a newly built network, detached, on the device of the example."""
        built = {name: p.detach().clone() for name, p in self._build().named_parameters()}
        if {name: p.shape for name, p in built.items()} != self._shapes:
            raise ArgumentError(
                "`network` built two networks whose weights differ in name or shape; "
                "a factory must build the same architecture each time"
            )
        return built

    @property
    def structure(self) -> str:
        """The network's layers and the shapes of its weights."""
        return f"{self._module} {self._shapes}"

    def __call__(self, parameters: Parameters, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to logits ``[batch, classes]`` and features ``[batch, features]``."""
        named = {f"network.{name}": value for name, value in parameters.items()}
        outputs: tuple[Tensor, Tensor] = torch.func.functional_call(self._module, named, (images,))
        return outputs

    def names(self, dimensions: Iterable[int]) -> list[str]:
        """Names of the weights that have one of these numbers of dimensions."""
        return [name for name, shape in self._shapes.items() if len(shape) in set(dimensions)]

    def _build(self) -> nn.Module:
        if not callable(self.factory) or isinstance(self.factory, nn.Module):
            raise ArgumentError(
                f"`network` is a {type(self.factory).__name__}; pass a function that builds a "
                f"torch.nn.Module from a number of classes, for example convnet_for(shape)"
            )
        network = self.factory(self.classes)
        if not isinstance(network, nn.Module):
            raise ArgumentError(
                f"`network` must build a torch.nn.Module from a number of classes, but it returned "
                f"{type(network).__name__}"
            )
        return torch.func.replace_all_batch_norm_modules_(network).to(self.device)

    def _find_head(self, network: nn.Module) -> nn.Linear:
        linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
        for module in reversed(linears):
            if module.out_features == self.classes:
                return module
        raise ArgumentError(
            f"`network` has no usable features: it must end in a torch.nn.Linear with "
            f"{self.classes} outputs, one for each class, but its linear layers have "
            f"{[module.out_features for module in linears]}; add such a layer"
        )

    def _check(self, example: Tensor) -> None:
        """Try two images: of one alone, batch normalisation may have too few values."""
        parameters = self.fresh()
        with torch.no_grad():
            try:
                logits, features = self(parameters, example)
            except ArgumentError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                raise ArgumentError(
                    f"`network` does not accept images of shape {list(example.shape[1:])}: "
                    f"{error}; build it for this number of channels and this size"
                ) from error
        if not isinstance(logits, Tensor):
            raise ArgumentError(
                f"`network` returns a {type(logits).__name__}, but must return its logits alone, a "
                f"tensor [batch, classes]; wrap it in a module that does"
            )
        if features.ndim != 2 or logits.shape != (2, self.classes):
            raise ArgumentError(
                f"`network` has no usable features: for two images its last linear layer takes "
                f"shape {list(features.shape)} and the network yields {list(logits.shape)}, but "
                f"[2, features] and [2, {self.classes}] are needed; flatten before that layer, "
                f"and end with it"
            )
        try:
            torch.func.grad(lambda weights: self(weights, example)[0].sum())(parameters)
        except RuntimeError as error:
            raise ArgumentError(
                f"`network` cannot be differentiated by torch.func: {str(error).splitlines()[0]}; "
                f"a layer that changes its own buffers in the forward pass must go; in the place "
                f"of a normalisation with running statistics of your own use torch.nn.GroupNorm, "
                f"or torch.nn.BatchNorm2d, which is made to use those of each batch"
            ) from error


class _OwnFeatures(nn.Module):
    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.embed(images)
        return self.network.head(features), features


class _TappedFeatures(nn.Module):
    """Takes the features where they enter the last linear layer."""

    def __init__(self, network: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.network = network
        self._taken: Tensor | None = None
        head.register_forward_pre_hook(self._take)

    def _take(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._taken = inputs[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        features, self._taken = self._taken, None
        if features is None:
            raise ArgumentError(
                "`network` has no usable features: its forward pass does not call its last "
                "linear layer; call the layer as a module"
            )
        return logits, features
