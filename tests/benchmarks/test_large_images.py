"""Photographs of 64 and 224 pixels, from a folder to a memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.class_incremental import Arguments, main
from benchmarks.results import ResultStore
from dc_replay import ExemplarMemory, Formation

pytestmark = pytest.mark.slow


def crops(folder: Path, side: int) -> None:
    """Four classes: the left and the right half of each of scikit-learn's two photographs."""
    sample = load_sample_images()
    halves = [half for image in sample.images for half in (image[:, :320], image[:, 320:])]
    for label, half in enumerate(halves):
        height, width = half.shape[0] - side, half.shape[1] - side
        for part, count in (("train", 6), ("test", 2)):
            into = folder / part / f"class{label}"
            into.mkdir(parents=True)
            for number in range(count):
                top, left = (37 * number) % (height + 1), (53 * number) % (width + 1)
                crop = half[top : top + side, left : left + side]
                Image.fromarray(crop).save(into / f"{number}.png")


@pytest.mark.parametrize(
    ("side", "network", "factor"), [(64, "convnet4", 2), (224, "resnetap10", 3)]
)
def test_photographs_are_condensed_and_replayed(
    side: int, network: str, factor: int, tmp_path: Path
) -> None:
    crops(tmp_path / "images", side)
    arguments = Arguments(
        data=f"folder:{tmp_path / 'images'}",
        network=network,
        factor=factor,
        preset="smoke",
        methods="herding,dream_plus",
        protocol="replay",
        ipc=1,
        steps=2,
        outer=1,
        inner=1,
        epochs=1,
        compile="never",
        quiet=True,
        out=tmp_path / "out",
    )
    main(arguments, "x")
    rows = ResultStore(tmp_path / "out").rows()
    assert [row["stored_bytes"] for row in rows] == [2 * 3 * side**2, 4 * 3 * side**2] * 2
    memory = ExemplarMemory.load(tmp_path / "out" / "memories" / "dream_plus.safetensors")
    assert memory.image_shape == (3, side, side) and memory.formation == Formation(factor)
    images, _ = memory.decoded(normalised=False)
    assert images.shape == (4 * factor**2, 3, side, side)
    assert torch.isfinite(images).all() and images.std() > 0.05
