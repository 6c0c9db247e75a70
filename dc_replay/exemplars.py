"""The plain value that condensing yields and a memory stores."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_replay._checks import integer
from dc_replay.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Exemplars:
    """Stored images of some classes, in an order that matters.

    Images of one class stand together, and the first ``n`` of them are that class's exemplar set
    of size ``n``.

    Attributes:
        pixels: uint8 ``[images, channels, height, width]``; 0 is black, 255 white, unless they are
            compressed (:class:`~dc_replay.formation.Formation`).
        labels: int64 ``[images]``, on the same device.

    Raises:
        ArgumentError: If a shape, dtype or device is another, or a class is scattered.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name, value in (("pixels", self.pixels), ("labels", self.labels)):
            if not isinstance(value, Tensor):
                raise ArgumentError(f"`{name}` is a {type(value).__name__}; pass a tensor")
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise ArgumentError(
                f"`pixels` must be uint8 of shape [images, channels, height, width], but is "
                f"{self.pixels.dtype} of shape {list(self.pixels.shape)}; "
                f"see dc_replay.pixels.quantise"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ArgumentError(
                f"`labels` must be int64 of shape [{len(self.pixels)}], one for each image, but is "
                f"{self.labels.dtype} of shape {list(self.labels.shape)}"
            )
        if self.labels.device != self.pixels.device:
            raise ArgumentError(
                f"`labels` is on {self.labels.device} and `pixels` on {self.pixels.device}; "
                f"move one of them"
            )
        runs = torch.unique_consecutive(self.labels).tolist()
        if len(set(runs)) != len(runs):
            raise ArgumentError(
                "`labels` must hold each class's images in one run, but a class appears in "
                "several; sort the images by class, keeping their order within each"
            )

    @property
    def counts(self) -> dict[int, int]:
        """Stored images of each class, in order of appearance."""
        classes, counts = torch.unique_consecutive(self.labels, return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist(), strict=True))

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes in order of appearance."""
        return tuple(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored pixels. Labels follow from each class's count and are not counted."""
        return self.pixels.nbytes

    def __len__(self) -> int:
        return len(self.pixels)

    def of_class(self, label: int) -> Tensor:
        """The stored images of one class, uint8 ``[count, channels, height, width]``.

        Raises:
            ArgumentError: If there are none.
        """
        try:
            number = operator.index(label)
        except TypeError:
            number = None
        if number not in self.classes:
            raise ArgumentError(f"`label` is {label}, but the classes held are {self.classes}")
        return self.pixels[self.labels == number]

    def prefix(self, quotas: Mapping[int, int]) -> Exemplars:
        """The first images of each class, at most its quota, in a new allocation.

        Classes that ``quotas`` does not name are dropped.

        Raises:
            ArgumentError: If a quota is below 0 or no whole number.
        """
        if not isinstance(quotas, Mapping):
            raise ArgumentError(f"`quotas` is {quotas!r}; pass a number for each class")
        start, rows = 0, []
        for label, count in self.counts.items():
            quota = integer(quotas.get(label, 0))
            if quota < 0:
                raise ArgumentError(
                    f"`quotas[{label}]` is {quotas[label]!r}; pass a whole number of at least 0"
                )
            rows.append(torch.arange(start, start + min(count, quota)))
            start += count
        index = torch.cat(rows).to(self.pixels.device) if rows else self.labels[:0]
        return Exemplars(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str) -> Exemplars:
        """The same exemplars on another device."""
        return Exemplars(self.pixels.to(device), self.labels.to(device))
