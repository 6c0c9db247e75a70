"""How many images of each class a memory may store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dc_replay._checks import whole
from dc_replay.errors import ArgumentError


@runtime_checkable
class Budget(Protocol):
    """A bound on a memory, stated as one quota per class.

    Quotas count *stored* images; under multi-formation a network sees several for each.
    An implementation must never raise a class's quota when further classes are appended, because
    images that were dropped cannot come back.
    """

    def quotas(self, classes: Sequence[int], *, image_bytes: int) -> dict[int, int]:
        """The most images that each class may have.

        Args:
            classes: Distinct class labels in the order in which they arrived.
            image_bytes: Bytes of one stored image: channels * height * width.

        Returns:
            At least 1 for each class, in the order of ``classes``.

        Raises:
            ArgumentError: If the budget is below one image per class, a class is named twice, or
                ``image_bytes`` is below 1.
        """
        ...


@dataclass(frozen=True)
class ImagesPerClass:
    """The same number of images for every class; the memory grows with the number of classes.

    Attributes:
        images: Stored images per class, at least 1.
    """

    images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", whole("images", self.images))

    def quotas(self, classes: Sequence[int], *, image_bytes: int) -> dict[int, int]:
        """See :meth:`Budget.quotas`; ``image_bytes`` makes no difference here."""
        _check(classes, image_bytes)
        return dict.fromkeys(classes, self.images)


@dataclass(frozen=True)
class TotalImages:
    """A fixed number of images, shared evenly by the classes seen so far.

    Where the total does not divide evenly, the classes that arrived first have one image more.

    Attributes:
        images: Stored images of all classes together, at least 1.
    """

    images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", whole("images", self.images))

    def quotas(self, classes: Sequence[int], *, image_bytes: int) -> dict[int, int]:
        """See :meth:`Budget.quotas`; ``image_bytes`` makes no difference here."""
        _check(classes, image_bytes)
        if self.images < len(classes):
            raise ArgumentError(
                f"`images` of TotalImages is {self.images}, which is below one image for each of "
                f"{len(classes)} classes; make it at least {len(classes)}"
            )
        return _shares(self.images, classes)


@dataclass(frozen=True)
class TotalBytes:
    """A fixed number of pixel bytes, shared evenly by the classes seen so far.

    It holds as many whole images as fit, shared as by :class:`TotalImages`. Only pixels count, one
    byte per channel and pixel: labels follow from each class's count.

    Attributes:
        bytes: Pixel bytes of all classes together, at least 1.
    """

    bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", whole("bytes", self.bytes))

    def quotas(self, classes: Sequence[int], *, image_bytes: int) -> dict[int, int]:
        """See :meth:`Budget.quotas`."""
        _check(classes, image_bytes)
        images = self.bytes // image_bytes
        if images < len(classes):
            raise ArgumentError(
                f"`bytes` of TotalBytes is {self.bytes}, which is below one image of {image_bytes} "
                f"bytes for each of {len(classes)} classes; make it at least "
                f"{image_bytes * len(classes)}"
            )
        return _shares(images, classes)


@dataclass(frozen=True)
class Smallest:
    """Several budgets at once: each class gets the smallest quota that any of them gives.

    ``Smallest((ImagesPerClass(20), TotalBytes(1_000_000)))`` keeps 20 images per class until a
    megabyte is full, and shares the megabyte from then on.

    Attributes:
        budgets: One budget or more; those that are several themselves are taken apart.
    """

    budgets: tuple[Budget, ...]

    def __post_init__(self) -> None:
        parts: list[Budget] = []
        try:
            given = tuple(self.budgets)
        except TypeError:
            raise ArgumentError(f"`budgets` is {self.budgets!r}; pass a tuple of budgets") from None
        for budget in given:
            check_budget(budget)
            parts += budget.budgets if isinstance(budget, Smallest) else (budget,)
        if not parts:
            raise ArgumentError("`budgets` of Smallest is empty; pass at least one budget")
        object.__setattr__(self, "budgets", tuple(parts))

    def quotas(self, classes: Sequence[int], *, image_bytes: int) -> dict[int, int]:
        """See :meth:`Budget.quotas`."""
        every = [budget.quotas(classes, image_bytes=image_bytes) for budget in self.budgets]
        return {label: min(quotas[label] for quotas in every) for label in classes}


def lowered(budget: Budget, cap: ImagesPerClass | TotalImages | TotalBytes) -> Budget:
    """The budget of a memory that obeyed ``budget`` and has now been cut to ``cap``.

    Both go on holding as classes arrive. A bound that the cap implies is left out: a total that is
    no larger than what is stored implies any per-class number and any total that held before.

    Args:
        budget: What held until now.
        cap: A bound no larger than what the memory stores.
    """
    implied: tuple[type, ...] = (ImagesPerClass,)
    if not isinstance(cap, ImagesPerClass):
        implied = (ImagesPerClass, TotalImages, TotalBytes)
    parts = budget.budgets if isinstance(budget, Smallest) else (budget,)
    kept = tuple(part for part in parts if not isinstance(part, implied))
    return Smallest((*kept, cap)) if kept else cap


def shrunk(
    budget: Budget,
    counts: Mapping[int, int],
    *,
    image_bytes: int,
    cap: ImagesPerClass | TotalImages | TotalBytes,
    name: str,
) -> Budget:
    """The budget of a stored memory that is cut to ``cap``; its quotas are what is kept.

    Args:
        budget: What holds until now.
        counts: Stored images of each class, in order of arrival.
        image_bytes: Bytes of one stored image.
        cap: The new bound.
        name: What the message calls the bound.

    Raises:
        ArgumentError: If the bound is below one image per class, or above what is stored.
    """
    classes, images = len(counts), sum(counts.values())
    match cap:
        case ImagesPerClass(value):
            least, most = 1, max(counts.values())
        case TotalImages(value):
            least, most = classes, images
        case TotalBytes(value):
            least, most = classes * image_bytes, images * image_bytes
    if value < least:
        raise ArgumentError(
            f"`{name}` is {value}, which is below one image for each of {classes} classes; "
            f"pass at least {least}"
        )
    if value > most:
        raise ArgumentError(
            f"`{name}` is {value}, but only {most} are stored and a memory cannot grow; pass "
            f"at most {most}, or condense anew for a larger memory"
        )
    return lowered(budget, cap)


def check_budget(budget: object) -> None:
    """Raise an ArgumentError unless ``budget`` is one."""
    if isinstance(budget, type) or not isinstance(budget, Budget):
        raise ArgumentError(
            f"`budget` is {budget!r}, which is not a budget; pass ImagesPerClass(n), "
            f"TotalImages(n) or TotalBytes(n)"
        )


def _check(classes: Sequence[int], image_bytes: int) -> None:
    whole("image_bytes", image_bytes)
    try:
        distinct = len(set(classes)) == len(classes)
    except TypeError:
        raise ArgumentError(f"`classes` is {classes!r}; pass a sequence of class labels") from None
    if not distinct:
        raise ArgumentError(f"`classes` is {list(classes)}; name each class once")


def _shares(images: int, classes: Sequence[int]) -> dict[int, int]:
    if not classes:
        return {}
    share, rest = divmod(images, len(classes))
    return {label: share + (place < rest) for place, label in enumerate(classes)}
