"""Inputs that are no photographs: made-up spectrograms of 40 bands and 98 frames, in decibels.

Three parts are chosen for them: the range of the values, which no Normalize says; a network that
fits inputs that are not square; and an augmentation that leaves time and pitch where they are.
"""

from dataclasses import replace

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.supervised import Naive
from torch.utils.data import TensorDataset

from dc_replay import CondensedReplayPlugin, ImagesPerClass, Normalization, idc
from dc_replay.augment import augmentation
from dc_replay.networks import ConvNet, convnet_for

CLASSES, SHAPE = 6, (1, 40, 98)
generator = torch.Generator().manual_seed(0)


def sounds(of_each: int) -> TensorDataset:
    """Noise at -60 dB with a tone of each class's own that glides up and down."""
    labels = torch.arange(CLASSES).repeat_interleave(of_each)
    phase = torch.rand(len(labels), 1, generator=generator)
    glide = 2 * torch.sin(2 * torch.pi * (torch.linspace(0, 2, SHAPE[2]) + phase))
    centre = 4 + 6 * labels[:, None] + glide  # [sounds, frames]
    distance = torch.arange(SHAPE[1])[:, None] - centre[:, None]
    noise = 6 * torch.randn(len(labels), *SHAPE[1:], generator=generator)
    levels = (-60 + 50 * torch.exp(-distance.square() / 4) + noise).clamp(-80, 0)
    return TensorDataset(levels[:, None], labels)


train, test = sounds(60), sounds(20)
benchmark = nc_benchmark(train, test, n_experiences=3, task_labels=False, seed=0)

condenser = idc(factor=2, outer=1, inner=10, network=convnet_for(SHAPE, width=16))
replay = CondensedReplayPlugin(
    condenser=replace(condenser, augment=augmentation("cutout")),
    budget=ImagesPerClass(3),
    normalization=Normalization.from_range([-80.0], [0.0]),
    progress=False,
)
torch.manual_seed(0)
model = ConvNet(CLASSES, channels=1, size=SHAPE[1:], width=16, depth=3)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    train_mb_size=32,
    train_epochs=3,
    plugins=[replay],
    evaluator=None,
)
for experience in benchmark.train_stream:
    strategy.train(experience)

levels, labels = test.tensors
with torch.no_grad():
    accuracy = (model(levels).argmax(dim=1) == labels).float().mean().item()
drawn, _ = replay.memory.sample(100, generator=generator)
shape, low, high = replay.memory.image_shape, drawn.min().item(), drawn.max().item()
print(f"exemplars of shape {shape}, from {low:.0f} to {high:.0f} dB")
print(f"accuracy on {CLASSES} sounds: {accuracy:.0%}, with {replay.memory.nbytes} bytes")
