"""Where images stay that may be more than a device's memory holds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dc_replay.errors import ArgumentError

Resident = bool | Literal["auto"]
"""Whether images stay on the device that computes; ``"auto"`` if they are few enough."""

SHARE = 0.25
"""What images may take of a GPU's free memory, and what the pixel steps of classes at once may.

A CUDA graph keeps the memory that it was recorded with, also when the strategy trains again.
"""

_HOST = torch.device("cpu")


def home(resident: Resident, count: int, *, device: torch.device, held: int = 0) -> torch.device:
    """Where so many bytes of images stay.

    Args:
        resident: Whether that is the device.
        count: Bytes.
        device: What computes.
        held: How many of them are there already.

    Returns:
        The device, or the CPU.
    """
    if resident == "auto":
        resident = device.type != "cuda" or count <= SHARE * (free_bytes(device) + held)
    return device if resident else _HOST


def free_bytes(device: torch.device) -> int:
    """What a GPU has room for, with what torch has taken of it and does not use."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + cached


def check_resident(resident: object) -> None:
    """Raise an ArgumentError unless it says where images stay."""
    if not isinstance(resident, bool) and resident != "auto":
        raise ArgumentError(
            f"`resident` is {resident!r}; pass True to keep images on the device, False to keep "
            f"them in the host's memory, or 'auto' to keep there what the device has no room for"
        )


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the CPU does not wait for a GPU to have it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostImages:
    """Images in the host's memory, of which those that are asked for come to a device.

    Args:
        pixels: ``[count, channels, height, width]`` on the CPU.
        device: Where they are needed.

    Attributes:
        device: As above.
    """

    def __init__(self, pixels: Tensor, device: torch.device) -> None:
        self.pixels = pixels
        self.device = device

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> torch.Size:
        """Of all of them."""
        return self.pixels.shape

    def __getitem__(self, index: Tensor) -> Tensor:
        """The images at these positions, on the device."""
        return brought(self.pixels.index_select(0, index.to(self.pixels.device)), self.device)
