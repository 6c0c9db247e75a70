"""How much work a run does: seconds for tests, minutes on a CPU, or the published settings."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dc_replay import Condenser, OnReal, PixelStep, recipe
from dc_replay.errors import ArgumentError
from dc_replay.networks import (
    ConvNet,
    DenseNet121,
    FeatureNetwork,
    NetworkFactory,
    ResNet10,
    resnet_ap10,
)
from dc_replay.sampling import Representative, Uniform
from dc_replay.selection import Forgetting, Herding, KCenter


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a run that trade accuracy for time.

    Attributes:
        width: Channels of the ConvNets, the one that condenses and the one that is trained.
        outer: Matching networks of the recipes that optimise; None is the published number.
        inner: Pixel steps with each; None is the published number.
        pixel_lr: Learning rate of the pixels at 10 images per class, for IDC and those after it.
        pixel_lr_unpacked: The same for IDC-I, whose images hold one each.
        pixel_lr_features: The same for DM, at any number of images; None is the published rate, as
            it always is for DC and DSA.
        pixel_final: The share of it that is left at the end, of DM's, too.
        real_batch: Real images of a class that a step matches; None is the published number.
        subset_weight: Weight of subset matching, where a method has it.
        multisize_period: Outer iterations between two choices of multisize condensation.
        multisize_proportional: Whether its prefix weighs by its share of the images.
        network_images: Real images that the matching network learns from after each pixel step.
        selection_epochs: Epochs before herding, k-center and the like look at features.
        epochs: Epochs of training in an experience.
        set_steps: Gradient steps of training on one condensed set of all classes.
        lr: Learning rate of that training.
        batch: Images in a mini-batch.
        gdumb_batch: Images in a mini-batch of protocol gdumb.
    """

    width: int
    outer: int | None
    inner: int | None
    pixel_lr: float
    pixel_lr_unpacked: float
    pixel_lr_features: float | None
    pixel_final: float
    subset_weight: float
    multisize_period: int
    multisize_proportional: bool
    real_batch: int | None
    network_images: int
    selection_epochs: int
    epochs: int
    set_steps: int
    lr: float
    batch: int
    gdumb_batch: int


PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        width=8,
        outer=3,
        inner=2,
        pixel_lr=5e-3,
        pixel_lr_unpacked=5e-3,
        pixel_lr_features=None,
        pixel_final=1.0,
        subset_weight=3.0,
        multisize_period=1,
        multisize_proportional=False,
        real_batch=8,
        network_images=64,
        selection_epochs=2,
        epochs=2,
        set_steps=4,
        lr=0.01,
        batch=64,
        gdumb_batch=64,
    ),
    "fast": Preset(
        width=64,
        outer=8,
        inner=20,
        # Found on held-out training images of 20 classes of CIFAR-100: few steps want long ones,
        # and then shorter ones.
        pixel_lr=0.12,
        pixel_lr_unpacked=0.5,
        pixel_lr_features=1.0,
        pixel_final=0.0,
        # Found on held-out images of the same classes for IDC, among 0.1, 0.3, 1, 3 and 10.
        subset_weight=3.0,
        multisize_period=1,
        # Found on held-out images, too: nothing is then lost at the full size.
        multisize_proportional=True,
        real_batch=64,
        network_images=1000,
        selection_epochs=5,
        epochs=40,
        set_steps=1000,
        lr=0.02,
        batch=64,
        gdumb_batch=64,
    ),
    "paper": Preset(
        width=128,
        outer=None,
        inner=None,
        pixel_lr=5e-3,
        pixel_lr_unpacked=5e-3,
        pixel_lr_features=None,
        pixel_final=1.0,
        subset_weight=3.0,
        multisize_period=100,
        multisize_proportional=False,
        real_batch=None,
        network_images=2048,
        selection_epochs=50,
        epochs=1000,
        set_steps=20_000,
        lr=0.01,
        batch=64,
        gdumb_batch=256,
    ),
}

_PUBLISHED_OUTER = {"idc": 2000, "idc_i": 2000, "dream": 1200, "dream_plus": 1200}
_PUBLISHED_INNER = 100
_PACKED = ("representative", "idc", "dream", "dream_plus")
_CONVNET = re.compile(r"convnet(\d+)(?::([1-9]\d*))?")
_LIKE_IDC = ("idc", "idc_i", "dream", "dream_plus")


def preset(name: str) -> Preset:
    """Find a preset by name.

    Raises:
        ArgumentError: If there is none of that name.
    """
    if name not in PRESETS:
        raise ArgumentError(f"`preset` is {name!r}, but the known ones are {', '.join(PRESETS)}")
    return PRESETS[name]


def condenser(
    name: str, settings: Preset, *, factor: int, ipc: int, network: NetworkFactory
) -> Condenser:
    """Build a recipe the way a preset has it.

    Args:
        name: The recipe. Those that pack images take ``factor``; the others store them as they are.
        settings: The preset.
        factor: Crops along each side of a stored image.
        ipc: Stored images per class, which some published settings depend on.
        network: The matching network.
    """
    build = recipe(name)
    arguments: dict[str, Any] = {"network": network}
    if name in _PACKED:
        arguments["factor"] = factor
    if name in ("dc", "dsa"):
        arguments["ipc"] = ipc
    outer = settings.outer or _PUBLISHED_OUTER.get(name)
    built = build(**arguments)
    if built.objective is not None:
        inner = settings.inner or built.inner
        if name == "dm":
            # It takes one step with each network. Where there are fewer steps than published, as
            # many as the others take.
            outer, inner = outer and outer * (settings.inner or _PUBLISHED_INNER), 1
            pixels = replace(built.pixels, final=settings.pixel_final)
            if settings.pixel_lr_features is not None:
                pixels = replace(pixels, lr=settings.pixel_lr_features, normalised=False)
            built = replace(built, pixels=pixels)
        built = replace(built, outer=outer or built.outer, inner=inner)
        if settings.real_batch is not None:
            built = replace(built, sampler=_resized(built.sampler, settings.real_batch))
    if name in _LIKE_IDC:
        rate = settings.pixel_lr if name in _PACKED else settings.pixel_lr_unpacked
        built = replace(
            built,
            pixels=PixelStep(lr=rate, final=settings.pixel_final),
            update=OnReal(settings.network_images),
        )
    if isinstance(built.selection, Herding | KCenter | Forgetting):
        selection = replace(built.selection, epochs=settings.selection_epochs)
        built = replace(built, selection=selection)
    return built


def _resized(sampler: Any, batch: int) -> Uniform | Representative:
    if isinstance(sampler, Uniform | Representative):
        return replace(sampler, batch=min(sampler.batch, batch))
    raise ArgumentError(f"`sampler` is {sampler!r}, which has no batch size to set")


def network_factory(
    name: str, *, channels: int, size: tuple[int, int], width: int
) -> Callable[[int], FeatureNetwork]:
    """Find a network to train by name, for images of a size.

    Args:
        name: What it is called. A ConvNet may have a width of its own: ``convnet3:128``.
        channels: Channels of the images.
        size: Their height and width.
        width: Channels of ConvNets whose name says nothing else.

    Raises:
        ArgumentError: If there is none of that name.
    """
    if found := _CONVNET.fullmatch(name):
        depth, own = found.groups()
        return functools.partial(
            ConvNet, channels=channels, size=size, width=int(own or width), depth=int(depth)
        )
    # The published one, where a preset does not want less.
    residual = min(width, 64 if min(size) > 64 else 32)
    known: dict[str, Callable[[int], FeatureNetwork]] = {
        "resnet10": functools.partial(ResNet10, channels=channels, size=size, width=residual),
        "resnetap10": functools.partial(resnet_ap10, channels=channels, size=size, width=residual),
        "densenet121": functools.partial(DenseNet121, channels=channels),
    }
    if name not in known:
        raise ArgumentError(
            f"`network` is {name!r}, but the known ones are convnetD for a depth D, such as "
            f"convnet3, convnetD:W for a width W, such as convnet3:128, and {', '.join(known)}"
        )
    return known[name]


def matching_factory(
    name: str, *, channels: int, size: tuple[int, int], width: int
) -> Callable[[int], FeatureNetwork]:
    """The network that condenses where ``name`` is trained.

    That is itself if it has no batch normalisation, else a ConvNet of depth 3.
    """
    if not name.startswith("convnet") and name != "resnetap10":
        name = "convnet3"
    return network_factory(name, channels=channels, size=size, width=width)
