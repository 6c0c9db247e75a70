"""Put a condensed buffer into Avalanche's own ReplayPlugin.

Whatever takes a storage policy takes a CondensedBuffer: here it holds fifty images in all, and
older digits make room as new ones arrive. Avalanche draws them with its own data loader.
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from dc_replay import CondensedBuffer, TotalImages, idc
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

buffer = CondensedBuffer(
    condenser=idc(factor=1, outer=2, inner=10, network=convnet_for((1, 8, 8), width=32)),
    budget=TotalImages(50),
)
torch.manual_seed(0)
model = ConvNet(10, channels=1, size=(8, 8), width=32, depth=1)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    train_mb_size=32,
    train_epochs=3,
    plugins=[ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)],
    evaluator=None,
)
for experience in benchmark.train_stream:
    strategy.train(experience)
    print(f"stored images of each digit: {buffer.memory.counts}")

with torch.no_grad():
    accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
print(f"accuracy on ten digits: {accuracy:.0%}, with {len(buffer.buffer)} images to replay")
