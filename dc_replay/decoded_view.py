"""The decoded images of a memory as an Avalanche dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.classification_dataset import (
    ClassificationDataset,
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from torch import Tensor
from torch.utils.data import Dataset

from dc_replay.exemplars import Exemplars
from dc_replay.experiences import Items
from dc_replay.formation import Formation
from dc_replay.pixels import Normalization, in_type


@dataclass(frozen=True, eq=False)
class ClassGroup:
    """One class's part of a buffer, the way Avalanche's grouped buffers present it.

    Attributes:
        buffer: The decoded images of the class.
    """

    buffer: AvalancheDataset[Any]


@dataclass(frozen=True, eq=False)
class DecodedView:
    """What a memory holds at a moment, for those who read datasets.

    Attributes:
        exemplars: What is stored; None if there is nothing.
        dataset: Its decoded images, class by class.
        groups: The part of each class.
    """

    exemplars: Exemplars | None = None
    dataset: AvalancheDataset[Any] = field(default_factory=lambda: AvalancheDataset([]))
    groups: dict[int, ClassGroup] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        exemplars: Exemplars,
        formation: Formation,
        normalization: Normalization | None,
        *,
        items: Items,
        tasks: Callable[[Tensor], Tensor] | None,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> DecodedView:
        """The view of a memory that holds something.

        Args:
            exemplars: What is stored.
            formation: How it becomes images.
            normalization: What they are normalised with; None leaves them as they are.
            items: The form of the dataset's items, but for task labels.
            tasks: Gives the task labels of class labels; None if items are to have none.
            transform: What an image is changed by when it is trained on; None leaves it.
        """
        decoded = _DecodedImages(exemplars.to("cpu"), formation, normalization, items=items)
        attributes: list[Any] = [DataAttribute(decoded.labels.tolist(), "targets")]
        make: Any = ClassificationDataset
        if tasks is not None:
            listed = tasks(decoded.labels).tolist()
            attributes.append(DataAttribute(listed, "targets_task_labels", use_in_getitem=True))
            make = TaskAwareSupervisedClassificationDataset
        transforms = {"train": (transform, None), "eval": (None, None)}
        dataset = make([decoded], data_attributes=attributes, transform_groups=transforms)
        groups, start = {}, 0
        for label, count in exemplars.counts.items():
            end = start + count * formation.images_per_stored
            groups[label] = ClassGroup(dataset.subset(list(range(start, end))))
            start = end
        return cls(exemplars, dataset, groups)


class _DecodedImages(Dataset[tuple[Tensor, "int | Tensor"]]):
    """Decodes one image at a time, so that nothing but the stored bytes is held."""

    def __init__(
        self,
        exemplars: Exemplars,
        formation: Formation,
        normalization: Normalization | None,
        *,
        items: Items,
    ) -> None:
        self.pixels = exemplars.pixels
        self.labels = exemplars.labels.repeat_interleave(formation.images_per_stored)
        self.formation = formation
        self.normalization = normalization
        self.items = items

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        place, crop = divmod(index, self.formation.images_per_stored)
        # One stored image, because a factor that does not divide it pads all that it is given.
        stored = self.pixels[place : place + 1]
        decoded = self.formation.decode_at(stored, torch.tensor([crop]))
        if self.normalization is not None:
            decoded = self.normalization.apply(decoded)
        label = self.labels[index]
        image = in_type(decoded[0], self.items.dtype)
        return image, label.clone() if self.items.tensor_labels else int(label)
