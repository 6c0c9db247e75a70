from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from benchmarks.methods import MODIFIERS, method
from benchmarks.presets import PRESETS, matching_factory, network_factory
from dc_replay import RECIPES, ArgumentError, Formation, Multisize, PixelStep, SubsetMatching
from dc_replay.networks import ConvNet, DenseNet121, ResNet10
from dc_replay.objectives import BidirectionalMatching
from dc_replay.optimisation import OnReal
from dc_replay.sampling import Representative
from dc_replay.selection import ClusterCentres

FACTORY = network_factory("convnet1", channels=1, size=(8, 8), width=4)


def build(name: str, preset: str = "paper"):
    return method(name).condenser(PRESETS[preset], factor=2, ipc=10, network=FACTORY)


def test_a_recipe_alone_is_itself() -> None:
    built = build("dream_plus")
    assert built.name == "dream_plus" and built.subsets is None and built.multisize is None


def test_what_is_added_is_there_and_in_the_name() -> None:
    built = build("dream_plus+sm+mdc")
    assert built.name == "dream_plus+sm+mdc"
    assert built.subsets == SubsetMatching(weight=PRESETS["paper"].subset_weight)
    assert built.multisize == Multisize(period=100)
    valued = build("idc+sm=0.25+mdc=7")
    assert valued.subsets == SubsetMatching(weight=0.25)
    assert valued.multisize == Multisize(period=7)


def test_all_of_its_components_make_idc_dream_plus() -> None:
    built, whole = build("idc+representative+init+bidirectional"), build("dream_plus")
    assert built.objective == whole.objective == BidirectionalMatching()
    assert built.sampler == whole.sampler == Representative(128)
    assert built.selection == whole.selection == ClusterCentres()
    assert built.warm_up == whole.warm_up == build("idc+bidirectional").warm_up == 1
    assert build("idc+init").warm_up == 0 and built.pixels == whole.pixels
    assert build("idc+representative", "fast").sampler == Representative(64)
    assert build("idc+representative=256", "fast").sampler == Representative(256)


def test_what_is_stored_can_be_changed_for_every_recipe() -> None:
    assert build("herding+compress").formation == Formation(1, compression=10)
    assert build("dream_plus+compress=4").formation == Formation(2, compression=4)
    assert build("dream_plus+factor+compress=8").formation == Formation(1, compression=8)
    assert build("representative+factor=3").formation == Formation(3)


def test_the_pixels_rate_can_be_set() -> None:
    preset = build("idc_i", "fast").pixels
    assert preset.lr != 0.7
    assert build("idc_i+lr=0.7", "fast").pixels == replace(preset, lr=0.7)
    assert build("dm+lr=3+final=0.25", "fast").pixels == PixelStep(3.0, reference=None, final=0.25)


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_the_number_of_matching_networks_can_be_set(preset: str) -> None:
    usual, few = build("dream_plus", preset), build("dream_plus+outer=3", preset)
    assert usual.outer != 3
    assert few == replace(usual, outer=3, name="dream_plus+outer=3")
    longer = build("dream_plus+outer=3+inner=7", preset)
    assert usual.inner != 7
    assert longer == replace(usual, outer=3, inner=7, name="dream_plus+outer=3+inner=7")
    assert (build("dm+outer=70", preset).outer, build("dm+outer=70", preset).inner) == (70, 1)


def test_a_name_without_one_of_its_modifiers() -> None:
    assert method("idc+sm=2+outer=4+mdc").without("outer") == "idc+sm=2+mdc"
    assert method("idc+sm+mdc").without("sm") == "idc+mdc"
    assert method("herding").without("outer") == "herding"
    assert method("idc+sm+outer=4+inner=2").without("outer", "inner") == "idc+sm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "`methods` names 'best', but the known recipes are random, .*dream_plus"),
        ("idc+", "nothing is called ''"),
        ("idc+kd", f"nothing is called 'kd'; add .*{list(MODIFIERS)[-1]}"),
        ("idc+sm=x", "'sm' takes a number, not 'x'"),
        ("idc+mdc=nan", "'mdc' takes a number, not 'nan'"),
        ("idc+mdc=2.5", "its value is 2.5, but must be a whole number"),
        ("idc+mdc=0", "`period` is 0"),
        ("idc+sm=-1", "`weight` is -1.0"),
        ("idc+init=2", "'init' takes no value"),
        ("herding+mdc", "herding optimises nothing"),
        ("herding+compress=0", "`compression` must be a whole number from 1 to 256, but is 0"),
        ("idc+lr", "'idc.lr': it needs a value"),
        ("idc+lr=0", "`lr` is 0.0; pass a finite number above 0"),
        ("idc+outer", "'idc.outer': it needs a value"),
        ("idc+outer=0", "`outer` is 0"),
        ("idc+outer=1.5", "its value is 1.5, but must be a whole number"),
        ("idc+inner=1.5", "its value is 1.5, but must be a whole number"),
        ("idc+inner=0", "`inner` is 0"),
        ("random+outer=2", "random optimises nothing that 'outer' could be added to"),
        ("idc+final=2", "`final` is 2.0; pass a number from 0 to 1"),
        ("herding+compress=2.5", "its value is 2.5, but must be a whole number"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        method(name)


def test_few_steps_have_rates_of_their_own() -> None:
    fast, published = PRESETS["fast"], PixelStep()
    for name, lr in (("idc", fast.pixel_lr), ("idc_i", fast.pixel_lr_unpacked)):
        assert build(name, "fast").pixels == PixelStep(lr, final=fast.pixel_final)
        assert build(name).pixels == published
    assert build("dm").pixels == PixelStep(1.0, reference=None, normalised=True)
    dm = PixelStep(fast.pixel_lr_features, reference=None, final=fast.pixel_final)
    assert build("dm", "fast").pixels == dm


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_methods_get_their_loops_from_the_preset(preset: str) -> None:
    settings = PRESETS[preset]
    for name in ("idc", "idc_i", "dream", "dream_plus"):
        built = build(name, preset)
        outer, inner = settings.outer or {"idc": 2000, "idc_i": 2000}.get(name, 1200), 100
        assert (built.outer, built.inner) == (outer, settings.inner or inner)
        rate = settings.pixel_lr_unpacked if name == "idc_i" else settings.pixel_lr
        assert built.pixels == PixelStep(rate, final=settings.pixel_final)
        assert built.update == OnReal(settings.network_images)
        assert built.formation.factor == (1 if name == "idc_i" else 2)
    for name in ("herding", "k_center", "forgetting"):
        assert build(name, preset).selection.epochs == settings.selection_epochs
    three = {
        name: method(name).condenser(settings, factor=3, ipc=10, network=FACTORY)
        for name in RECIPES
    }
    packed = {name for name, built in three.items() if built.formation.factor == 3}
    assert packed == {"representative", "idc", "dream", "dream_plus"}


@pytest.mark.parametrize("name", ["dc", "dsa"])
def test_published_loops_of_dc_follow_the_images_per_class(name: str) -> None:
    for ipc, inner in ((1, 1), (10, 10), (50, 50)):
        settings = PRESETS["paper"]
        built = method(name).condenser(settings, factor=2, ipc=ipc, network=FACTORY)
        assert (built.outer, built.inner) == (1000, inner)


def test_prefixes_weigh_what_the_preset_says() -> None:
    for preset in PRESETS:
        proportional = PRESETS[preset].multisize_proportional
        assert build("idc+mdc", preset).multisize.proportional == proportional
    assert PRESETS["fast"].multisize_proportional


def test_a_given_rate_is_one_of_pixels_in_0_to_1() -> None:
    assert build("dm", "paper").pixels.normalised
    assert not build("dm+lr=0.3", "paper").pixels.normalised


def test_a_convnet_may_name_its_width() -> None:
    options = {"channels": 3, "size": (32, 32), "width": 16}
    for build_network in (network_factory, matching_factory):
        for name, width in (("convnet2", 16), ("convnet2:24", 24)):
            layers = build_network(name, **options)(4).modules()
            assert [m.out_channels for m in layers if isinstance(m, nn.Conv2d)] == [width, width]
    for wrong in ("convnet3:", "convnet3:0", "convnet3:-8", "convnet3:wide", "resnet10:64"):
        with pytest.raises(ArgumentError, match="such as convnet3:128"):
            network_factory(wrong, **options)


@pytest.mark.parametrize(
    ("trained", "kind", "matched"),
    [
        ("convnet3", ConvNet, ConvNet),
        ("resnet10", ResNet10, ConvNet),
        ("densenet121", DenseNet121, ConvNet),
        ("resnetap10", ResNet10, ResNet10),
    ],
)
def test_networks_with_batch_normalisation_do_not_condense(
    trained: str, kind: type, matched: type
) -> None:
    options = {"channels": 3, "size": (32, 32), "width": 128}
    large = {**options, "size": (224, 224)}
    network = network_factory(trained, **options)(4)
    assert type(network) is kind and type(matching_factory(trained, **options)(4)) is matched
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert first.out_channels == {"convnet3": 128, "densenet121": 64}.get(trained, 32)
    if kind is ResNet10:
        stem = network_factory(trained, **large)(4).layers[0]
        assert stem.out_channels == 64 and stem.kernel_size == (7, 7)
