"""The methods of the literature as condensers, ready to use or to change with ``replace``.

Every recipe takes ``factor`` (crops along each side of a stored image; ``idc_i`` is IDC without it)
and ``compression`` (images that share the bytes of one), and returns a
:class:`~dc_replay.condense.Condenser`. Recipes that optimise also take

* ``network``: builds a matching network for a number of classes; a ConvNet of width 128 where None,
* ``outer``: matching networks, one after the other,
* ``inner``: pixel steps with each,
* ``seconds``: time to spend on an experience in place of ``outer``; see
  :class:`~dc_replay.condense.Condenser`.

The published counts of iterations were chosen for a GPU and hours. Where they are out of reach, the
defaults here are fewer, and the docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dc_replay._checks import integer
from dc_replay.augment import Augmentation, Color, Crop, Cutout, Flip, Rotate, Scale
from dc_replay.condense import Condenser
from dc_replay.errors import ArgumentError
from dc_replay.formation import Formation
from dc_replay.networks import NetworkFactory
from dc_replay.objectives import (
    BidirectionalMatching,
    FeatureMatching,
    GradientMatching,
    cosine_distance,
)
from dc_replay.optimisation import OnReal, OnSynthetic, PixelStep
from dc_replay.sampling import Representative, Uniform
from dc_replay.selection import (
    ClusterCentres,
    Forgetting,
    Herding,
    KCenter,
    RandomImages,
    Selection,
)
from dc_replay.training import NetworkTraining

# Unlike the strategies of IDC, DSA draws one of all its augmentations in each step.
_ONE_OF_SIX = Augmentation(one_of=(Flip(), Color(), Crop(), Scale(), Rotate(), Cutout()))


def _selecting(
    name: str, selection: Selection, factor: int, compression: int, network: NetworkFactory | None
) -> Condenser:
    return Condenser(
        name=name, formation=Formation(factor, compression), selection=selection, network=network
    )


def random(
    *, factor: int = 1, compression: int = 1, network: NetworkFactory | None = None
) -> Condenser:
    """Random images of each class. With the defaults these are unmodified raw images."""
    return _selecting("random", RandomImages(), factor, compression, network)


def herding(
    *,
    factor: int = 1,
    compression: int = 1,
    network: NetworkFactory | None = None,
    epochs: int = 10,
) -> Condenser:
    """Images whose running mean of features follows the class's (iCaRL, CVPR 2017).

    With the defaults these are unmodified raw images. ``epochs`` is how long the network that
    yields the features trains on the experience.
    """
    return _selecting("herding", Herding(epochs), factor, compression, network)


def k_center(
    *,
    factor: int = 1,
    compression: int = 1,
    network: NetworkFactory | None = None,
    epochs: int = 10,
) -> Condenser:
    """Images that cover the class's features greedily (Sener and Savarese, ICLR 2018).

    With the defaults these are unmodified raw images. ``epochs`` as for :func:`herding`.
    """
    return _selecting("k_center", KCenter(epochs), factor, compression, network)


def forgetting(
    *,
    factor: int = 1,
    compression: int = 1,
    network: NetworkFactory | None = None,
    epochs: int = 10,
) -> Condenser:
    """Images that are forgotten most often in training (Toneva et al., ICLR 2019).

    With the defaults these are unmodified raw images. ``epochs`` is how long forgetting is counted.
    """
    return _selecting("forgetting", Forgetting(epochs), factor, compression, network)


def representative(
    *,
    factor: int = 2,
    compression: int = 1,
    network: NetworkFactory | None = None,
    epochs: int = 1,
) -> Condenser:
    """Images nearest to the centres of k-means clusters, packed, and not optimised.

    This is where DREAM starts from, and so what its optimisation must beat. ``epochs`` as for
    :func:`herding`; 1 is DREAM's.
    """
    return _selecting("representative", ClusterCentres(epochs), factor, compression, network)


def _published_loops(ipc: int) -> tuple[int, int]:
    """DC's pixel steps per network and epochs on the synthetic images after each."""
    loops = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    if integer(ipc) < 1:
        raise ArgumentError(f"`ipc` is {ipc}, but must be at least 1 stored image per class")
    return loops[max(known for known in loops if known <= ipc)]


def _dc_like(
    name: str,
    matching: Augmentation,
    network: NetworkFactory | None,
    factor: int,
    compression: int,
    ipc: int,
    outer: int,
    inner: int | None,
    seconds: float | None,
) -> Condenser:
    steps, epochs = _published_loops(ipc)
    return Condenser(
        name=name,
        formation=Formation(factor, compression),
        objective=GradientMatching(error=cosine_distance, convolutions_only=False),
        sampler=Uniform(256),
        augment=matching,
        network=network,
        training=NetworkTraining(
            momentum=0.0, weight_decay=0.0, batch=256, augment=matching, cutmix=0.0
        ),
        update=OnSynthetic(epochs),
        pixels=PixelStep(lr=0.1, momentum=0.5, reference=None, normalised=True),
        outer=outer,
        inner=steps if inner is None else inner,
        seconds=seconds,
    )


def dc(
    *,
    factor: int = 1,
    compression: int = 1,
    network: NetworkFactory | None = None,
    ipc: int = 20,
    outer: int = 1000,
    inner: int | None = None,
    seconds: float | None = None,
) -> Condenser:
    """Dataset condensation with gradient matching (Zhao, Mopuri and Bilen, ICLR 2021).

    Starts from real images. ``ipc`` picks the published numbers of pixel steps per network and of
    epochs on the synthetic images after each: (1, 1) at 1 image per class, (10, 50) at 10,
    (20, 25) at 20, (30, 20) at 30, (40, 15) at 40 and (50, 10) at 50; in between, those of the
    next smaller number. ``outer=1000`` is the published number. Other than in the published code,
    pixels are held to ``[0, 1]``, as bytes are.
    """
    return _dc_like("dc", Augmentation(), network, factor, compression, ipc, outer, inner, seconds)


def dsa(
    *,
    factor: int = 1,
    compression: int = 1,
    network: NetworkFactory | None = None,
    ipc: int = 20,
    outer: int = 1000,
    inner: int | None = None,
    seconds: float | None = None,
) -> Condenser:
    """DC with differentiable Siamese augmentation (Zhao and Bilen, ICML 2021).

    One of its six augmentations is drawn in each step. Arguments as for :func:`dc`.
    """
    return _dc_like("dsa", _ONE_OF_SIX, network, factor, compression, ipc, outer, inner, seconds)


def dm(
    *,
    factor: int = 1,
    compression: int = 1,
    network: NetworkFactory | None = None,
    outer: int = 20_000,
    inner: int = 1,
    seconds: float | None = None,
) -> Condenser:
    """Dataset condensation with distribution matching (Zhao and Bilen, WACV 2023).

    Matches mean features on untrained networks. ``outer=20000`` is the published number. Other
    than in the published code, pixels are held to ``[0, 1]``, as bytes are.
    """
    return Condenser(
        name="dm",
        formation=Formation(factor, compression),
        objective=FeatureMatching(),
        sampler=Uniform(256),
        augment=_ONE_OF_SIX,
        network=network,
        update=None,
        pixels=PixelStep(lr=1.0, momentum=0.5, reference=None, normalised=True),
        most_decoded=4096,
        outer=outer,
        inner=inner,
        seconds=seconds,
    )


def idc(
    *,
    factor: int = 2,
    compression: int = 1,
    network: NetworkFactory | None = None,
    outer: int = 60,
    inner: int = 100,
    seconds: float | None = None,
) -> Condenser:
    """IDC: multi-formation and regularised gradient matching (Kim et al., ICML 2022).

    Matches gradients of convolution weights in networks that learn from real images meanwhile.
    Published with ``outer=2000``.
    """
    return Condenser(
        name="idc",
        formation=Formation(factor, compression),
        objective=GradientMatching(),
        network=network,
        update=OnReal(2048),
        outer=outer,
        inner=inner,
        seconds=seconds,
    )


def idc_i(
    *,
    compression: int = 1,
    network: NetworkFactory | None = None,
    outer: int = 60,
    inner: int = 100,
    seconds: float | None = None,
) -> Condenser:
    """IDC-I: IDC without multi-formation. Arguments as for :func:`idc`."""
    return replace(
        idc(
            factor=1,
            compression=compression,
            network=network,
            outer=outer,
            inner=inner,
            seconds=seconds,
        ),
        name="idc_i",
    )


def dream(
    *,
    factor: int = 2,
    compression: int = 1,
    network: NetworkFactory | None = None,
    outer: int = 60,
    inner: int = 100,
    seconds: float | None = None,
) -> Condenser:
    """DREAM: IDC that starts from and matches representative images (Liu et al., ICCV 2023).

    Published with ``outer=1200``; IDC's accuracy is claimed after 60 to 100.
    """
    return Condenser(
        name="dream",
        formation=Formation(factor, compression),
        selection=ClusterCentres(),
        objective=GradientMatching(),
        sampler=Representative(128),
        network=network,
        warm_up=1,
        update=OnReal(2048),
        outer=outer,
        inner=inner,
        seconds=seconds,
    )


def dream_plus(
    *,
    factor: int = 2,
    compression: int = 1,
    network: NetworkFactory | None = None,
    outer: int = 60,
    inner: int = 100,
    seconds: float | None = None,
) -> Condenser:
    """DREAM+: DREAM that matches gradients and mean features together (Liu et al., 2023).

    Published with ``outer=1200``; IDC's accuracy is claimed after 60.
    """
    base = dream(
        factor=factor,
        compression=compression,
        network=network,
        outer=outer,
        inner=inner,
        seconds=seconds,
    )
    return replace(base, name="dream_plus", objective=BidirectionalMatching())


RECIPES: dict[str, Callable[..., Condenser]] = {
    recipe.__name__: recipe
    for recipe in (
        random,
        herding,
        k_center,
        forgetting,
        representative,
        dc,
        dsa,
        dm,
        idc_i,
        idc,
        dream,
        dream_plus,
    )
}
"""Every recipe by name."""


def recipe(name: str) -> Callable[..., Condenser]:
    """Find a recipe by name.

    Raises:
        ArgumentError: If there is none of that name.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ArgumentError(f"`name` is {name!r}, but the known recipes are {sorted(RECIPES)}")
    return RECIPES[name]
