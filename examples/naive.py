"""Attach a condensed memory to Avalanche's Naive, and see what it keeps.

Ten handwritten digits arrive two at a time. Without replay the network knows the last two in the
end; a memory of five condensed images of each digit keeps the others, too.
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from dc_replay import CondensedReplayPlugin, ImagesPerClass, dream_plus
from dc_replay.networks import ConvNet, convnet_for

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
train, test = slice(0, 1500), slice(1500, None)
benchmark = nc_benchmark(
    TensorDataset(images[train], labels[train]),
    TensorDataset(images[test], labels[test]),
    n_experiences=5,
    task_labels=False,
    seed=0,
)


def accuracy_with(plugins: list) -> float:
    """Train on one experience after the other, then test on all digits."""
    torch.manual_seed(0)
    model = ConvNet(10, channels=1, size=(8, 8), width=32, depth=1)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=32,
        train_epochs=3,
        plugins=plugins,
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    with torch.no_grad():
        return (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()


# Images of 8x8 pixels are too small to pack, hence factor=1. So few steps are for a try.
replay = CondensedReplayPlugin(
    condenser=dream_plus(factor=1, outer=2, inner=10, network=convnet_for((1, 8, 8), width=32)),
    budget=ImagesPerClass(5),
    progress=False,
)
without, with_replay = accuracy_with([]), accuracy_with([replay])
replay.memory.save("memory.safetensors")
print(f"accuracy on ten digits: {without:.0%} without replay, {with_replay:.0%} with it")
print(f"memory.safetensors holds {replay.memory}")
