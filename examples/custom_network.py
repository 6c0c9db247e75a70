"""Condense with a network of your own, and train the same kind of network.

A matching network is any module that ends in a linear layer with one output for each class. What
condenses is given a function that builds a fresh one for a number of classes.
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from dc_replay import CondensedReplayPlugin, ImagesPerClass, dream_plus


def small_network(classes: int) -> nn.Module:
    """Two convolutions for images of 8x8 pixels; its features are what enters the last layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),  # while condensing, it uses the statistics of each batch
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, classes),
    )


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

replay = CondensedReplayPlugin(
    condenser=dream_plus(factor=1, outer=2, inner=10, network=small_network),
    budget=ImagesPerClass(5),
    progress=False,
)
torch.manual_seed(0)
model = small_network(10)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    train_mb_size=32,
    train_epochs=3,
    plugins=[replay],
    evaluator=None,
)
for experience in benchmark.train_stream:
    strategy.train(experience)

model.eval()
with torch.no_grad():
    accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
print(f"accuracy on ten digits: {accuracy:.0%}, with {len(replay.memory)} exemplars")
