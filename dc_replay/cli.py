"""Look into memory files, cut them to a smaller size, and export their images.

Nothing here imports torch or Avalanche, so that every command answers at once.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated

from tyro.conf import DisallowNone, Positional, arg, create_mutex_group
from tyro.extras import SubcommandApp

from dc_replay import _files, _writing, pictures
from dc_replay._checks import whole
from dc_replay.budgets import ImagesPerClass, TotalBytes, TotalImages, shrunk
from dc_replay.errors import ArgumentError, DCReplayError, MemoryFileError

_File = Annotated[Positional[Path], arg(metavar="FILE")]
_Folder = Annotated[Positional[Path], arg(metavar="OUT")]
_SIZE = create_mutex_group(required=True, title="size")
_Size = Annotated[int | None, arg(metavar="N"), _SIZE]
_CAPS: dict[str, type[ImagesPerClass | TotalImages | TotalBytes]] = {
    "--ipc": ImagesPerClass,
    "--total-images": TotalImages,
    "--total-bytes": TotalBytes,
}

app = SubcommandApp()


@app.command
def inspect(
    file: _File,
    /,
    *,
    image: Annotated[Path | None, arg(metavar="OUT.png")] = None,
) -> None:
    """Say what a memory file holds.

    Example: dc-replay inspect memory.safetensors --image memory.png

    Args:
        file: A file that ExemplarMemory.save wrote.
        image: Also draw the first stored images of each class, one row per class; not all of them
            where they are many.
    """
    memory = _read(file)
    facts = _facts(memory, file.stat().st_size)
    if image is not None:
        facts["image"] = _draw(memory, image)
    for name, fact in facts.items():
        print(f"{name:<14} {fact}")


@app.command
def shrink(
    file: _File,
    /,
    *,
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT")],
    ipc: _Size = None,
    total_images: _Size = None,
    total_bytes: _Size = None,
) -> None:
    """Keep the first images of each class, as ExemplarMemory.shrink does.

    Example: dc-replay shrink memory.safetensors --ipc 5 -o small.safetensors

    Args:
        file: A file that ExemplarMemory.save wrote.
        output: Where to write the smaller memory; it may be FILE itself.
        ipc: The most stored images that any class keeps.
        total_images: The most stored images of all classes together, shared evenly.
        total_bytes: The most pixel bytes of all classes together, shared evenly.
    """
    memory = _read(file)
    if memory.budget is None:
        raise MemoryFileError(
            f"{file}: the file was saved with a budget that it cannot describe; in Python, pass "
            f"`budget` to ExemplarMemory.load and shrink what it returns"
        )
    values = {"--ipc": ipc, "--total-images": total_images, "--total-bytes": total_bytes}
    [(name, value)] = [(name, value) for name, value in values.items() if value is not None]
    cap = _CAPS[name](whole(name, value))
    budget = shrunk(
        memory.budget, memory.counts, image_bytes=memory.image_bytes, cap=cap, name=name
    )
    smaller = memory.cut(budget)
    _files.write(output, smaller, name="--output")
    print(f"{'images':<14} {len(memory.pixels):,} -> {len(smaller.pixels):,}")
    print(f"{'pixel bytes':<14} {memory.pixels.nbytes:,} -> {smaller.pixels.nbytes:,}")
    print(f"{'written to':<14} {_plain(str(output))}")


@app.command
def export(file: _File, out: _Folder, /) -> None:
    """Write the stored images as PNG files, in one folder per class; compressed ones decoded.

    Example: dc-replay export memory.safetensors images

    Args:
        file: A file that ExemplarMemory.save wrote.
        out: A new or empty folder; class 7 goes to OUT/7/000.png, OUT/7/001.png and on.
    """
    memory = _read(file)
    channels = memory.pixels.shape[1]
    if channels != pictures.channels_shown(channels):
        raise ArgumentError(
            f"{file}: the images have {channels} channels, but PNG files are written of 1 (grey) "
            f"or 3 (red, green, blue); `dc-replay inspect --image` draws the first of them"
        )
    _check_folder(out)
    new = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        _write_images(memory, out)
    except BaseException:
        for label in memory.counts:
            shutil.rmtree(out / str(label), ignore_errors=True)
        if new:
            with suppress(OSError):
                out.rmdir()
        raise
    images = len(memory.pixels) * memory.compression
    print(f"{'images':<14} {images:,} of {len(memory.counts):,} classes")
    print(f"{'written to':<14} {_plain(str(out))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    try:
        app.cli(
            prog="dc-replay",
            description="Look into memory files, cut them to a smaller size, export their images.",
            args=argv,
            config=(DisallowNone,),
        )
    except (DCReplayError, OSError) as error:
        print("dc-replay: error:", _plain(" ".join(str(error).splitlines())), file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> _files.MemoryFile:
    """Read a file that :meth:`ExemplarMemory.load` would take, given a budget if it has none."""
    memory = _files.read(path)
    if memory.budget is not None:
        try:
            quotas = memory.quotas(memory.budget)
        except ArgumentError:
            quotas = dict.fromkeys(memory.counts, 0)
        if any(count > quotas[label] for label, count in memory.counts.items()):
            raise MemoryFileError(
                f"{path}: the file holds more than its own budget {memory.budget} allows; it was "
                f"edited, so save the memory again"
            )
    return memory


def _facts(memory: _files.MemoryFile, file_bytes: int) -> dict[str, str]:
    images, channels, height, width = memory.pixels.shape
    decoded = memory.images_per_stored
    scale = memory.normalization
    versions = [f"{name} {_plain(version)}" for name, version in memory.versions.items()]
    return {
        "recipe": _plain(memory.recipe) or "not recorded",
        "classes": f"{len(memory.counts)}: {_runs(memory.counts)}",
        "images": f"{images:,} stored, {images * decoded:,} decoded",
        "per class": _sizes(memory.counts),
        "image shape": f"{channels} x {height} x {width} (channels, height, width)",
        "factor": f"{memory.factor}, so {decoded} decoded of each stored image"
        if memory.compression == 1
        else f"{memory.factor}, with compression {memory.compression}: {decoded} decoded of each "
        f"stored image",
        "bytes": f"{memory.pixels.nbytes:,} of pixels, {file_bytes:,} of the file",
        "normalization": "none" if scale is None else f"mean {scale[0]}, std {scale[1]}",
        "budget": "of a kind that the file cannot describe"
        if memory.budget is None
        else str(memory.budget),
        "written by": ", ".join(versions) or "not recorded",
    }


def _draw(memory: _files.MemoryFile, path: Path) -> str:
    """Write the sheet, and say how it shows the images."""
    if path.suffix.lower() != ".png":
        raise ArgumentError(f"`--image` is {path}; name a file that ends in .png")
    first = islice(memory.by_class().items(), pictures.ROWS)
    # No more than are drawn: a small file may hold thousands.
    tiles = {label: memory.layers(images, pictures.COLUMNS) for label, images in first}
    sheet = pictures.sheet(tiles)
    _writing.write_whole(path, sheet.png, name="--image")
    counts = [memory.compression * count for count in memory.counts.values()]
    said = [f"{_plain(str(path))}, a row for each class"]
    if len(counts) > sheet.rows:
        said.append(f"the first {sheet.rows} of {len(counts):,} classes")
    if max(counts[: sheet.rows]) > sheet.columns:
        images = "image" if sheet.columns == 1 else f"{sheet.columns} images"
        said.append(f"the first {images} of each")
    channels = memory.pixels.shape[1]
    shown = pictures.channels_shown(channels)
    if shown != channels:
        colours = "as grey" if shown == 1 else "as red, green and blue"
        said.append(f"the first {shown} of {channels} channels {colours}")
    return "; ".join(said)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"`OUT` is {out}, which is a file; name a new or empty folder")
    if out.exists() and any(out.iterdir()):
        raise ArgumentError(f"`OUT` is {out}, which is not empty; name a new or empty folder")
    if not out.parent.is_dir():
        raise ArgumentError(f"`OUT` is {out}, whose folder does not exist; create it first")


def _write_images(memory: _files.MemoryFile, out: Path) -> None:
    digits = max(3, len(str(max(memory.counts.values()) * memory.compression - 1)))
    for label, images in memory.by_class().items():
        folder = out / str(label)
        folder.mkdir()
        each = (layer for place in range(len(images)) for layer in memory.layers(images[[place]]))
        for place, image in enumerate(each):
            (folder / f"{place:0{digits}}.png").write_bytes(pictures.png(image))


def _sizes(counts: Mapping[int, int]) -> str:
    """The images of each class, said once for all classes that have as many."""
    classes: dict[int, list[int]] = {}
    for label, count in counts.items():
        classes.setdefault(count, []).append(label)
    if len(classes) == 1:
        return f"{next(iter(classes))} each"
    return "; ".join(f"{count} of {_runs(labels)}" for count, labels in classes.items())


def _runs(labels: Iterable[int]) -> str:
    """Labels in their order, ``3 to 7`` for those that follow one another."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def _plain(text: str) -> str:
    """Text without what a terminal would obey, or could not show."""
    return text if text.isprintable() else repr(text)


if __name__ == "__main__":
    sys.exit(main())
