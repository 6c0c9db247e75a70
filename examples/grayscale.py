"""Grey images with torchvision transforms: one channel, normalised, packed four to one.

The plugin finds the Normalize of the evaluation transforms, stores exemplars as plain bytes, and
normalises what it replays. The digits are enlarged to 28x28 pixels, like MNIST's.
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import Normalize

from dc_replay import CondensedReplayPlugin, ImagesPerClass, idc
from dc_replay.networks import ConvNet, convnet_for

SHAPE = (1, 28, 28)
normalize = Normalize((0.13,), (0.31,))

digits = load_digits()
small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
chosen = torch.tensor(digits.target) < 6  # fewer classes take less time
images = interpolate(small[chosen], size=SHAPE[1:], mode="bilinear").clamp(0, 1)
labels = torch.tensor(digits.target)[chosen]
train, test = slice(0, 800), slice(800, None)
benchmark = nc_benchmark(
    TensorDataset(images[train], labels[train]),
    TensorDataset(images[test], labels[test]),
    n_experiences=3,
    task_labels=False,
    seed=0,
    train_transform=normalize,
    eval_transform=normalize,
)

replay = CondensedReplayPlugin(
    condenser=idc(factor=2, outer=1, inner=10, network=convnet_for(SHAPE, width=16)),
    budget=ImagesPerClass(3),
    progress=False,
)
torch.manual_seed(0)
model = ConvNet(6, channels=1, size=SHAPE[1:], width=16, depth=3)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    train_mb_size=32,
    train_epochs=3,
    plugins=[replay],
    evaluator=None,
)
for experience in benchmark.train_stream:
    strategy.train(experience)

with torch.no_grad():
    accuracy = (model(normalize(images[test])).argmax(1) == labels[test]).float().mean().item()
memory = replay.memory
print(f"found {memory.normalization}")
print(f"{len(memory)} stored images are {memory.decoded_len} to a network")
print(f"accuracy on six digits: {accuracy:.0%}, with {memory.nbytes} bytes")
