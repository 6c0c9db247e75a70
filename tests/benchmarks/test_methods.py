from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.methods import MODIFIERS, method
from benchmarks.presets import PRESETS, network_factory
from dc_replay import ArgumentError, Formation, Multisize, PixelStep, SubsetMatching
from dc_replay.objectives import BidirectionalMatching
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
