"""Keep a memory at the same number of bytes while classes keep arriving.

Multisize condensation makes the first images of each digit good by themselves, so that older
digits can be cut to them: 10 images of each of two digits at first, 2 of each of ten at the end.
"""

from dataclasses import replace

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from dc_replay import CondensedReplayPlugin, Multisize, TotalBytes, dream_plus
from dc_replay.networks import ConvNet, convnet_for

BYTES = 20 * 1 * 8 * 8  # images, channels, height, width

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

condenser = dream_plus(factor=1, outer=4, inner=5, network=convnet_for((1, 8, 8), width=32))
replay = CondensedReplayPlugin(
    condenser=replace(condenser, multisize=Multisize(period=1)),
    budget=TotalBytes(BYTES),
    progress=False,
)
torch.manual_seed(0)
model = ConvNet(10, channels=1, size=(8, 8), width=32, depth=1)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    train_mb_size=32,
    train_epochs=3,
    plugins=[replay],
    evaluator=None,
)
sizes = []
for experience in benchmark.train_stream:
    strategy.train(experience)
    sizes.append(replay.memory.nbytes)
    print(f"{replay.memory.nbytes} bytes, images of each digit: {replay.memory.counts}")

with torch.no_grad():
    accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
print(f"accuracy on ten digits: {accuracy:.0%}, never more than {BYTES} bytes")
