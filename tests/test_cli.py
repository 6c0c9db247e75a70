import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dc_replay import pictures
from dc_replay.budgets import ImagesPerClass, Smallest, TotalBytes, TotalImages
from dc_replay.cli import main
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.pixels import Normalization

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {8: 5, 2: 3, 3: 5}
SHAPE = (3, 4, 6)


def make_memory(counts=COUNTS, *, shape=SHAPE, budget=None, factor=2, recipe="idc", scale=True):
    generator = torch.Generator().manual_seed(0)
    size = (sum(counts.values()), *shape)
    pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    labels = [label for label, count in counts.items() for _ in range(count)]
    memory = ExemplarMemory(
        budget=budget or ImagesPerClass(max(counts.values())),
        formation=Formation(factor),
        normalization=Normalization.identity(shape[0]) if scale else None,
        recipe=recipe,
    )
    memory.add(Exemplars(pixels, torch.tensor(labels)))
    return memory


def edit(path, **changes):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {key: v for key, v in metadata.items() if v is not None})


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a memory as memory.safetensors in the working folder, which has nothing else."""
    monkeypatch.chdir(tmp_path)

    def save(*args, **options):
        memory = make_memory(*args, **options)
        memory.save("memory.safetensors")
        return memory

    return save


@pytest.fixture
def run(capsys):
    """Runs a command that works; gives what it prints, by the name of the line."""

    def command(*argv):
        assert main([str(part) for part in argv]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        lines = printed.out.splitlines()
        return {line[:14].strip(): line[15:] for line in lines}

    return command


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that fails with one line, and leaves the folder as it was; gives the line."""

    def command(*argv):
        def everything():
            return {
                entry: entry.read_bytes() if entry.is_file() else None
                for entry in tmp_path.rglob("*")
            }

        before = everything()
        assert main([str(part) for part in argv]) == 2
        assert everything() == before
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("dc-replay: error: ")
        assert printed.err.endswith("\n") and printed.err.count("\n") == 1
        return printed.err

    return command


# Inspect


def test_inspect_says_what_the_file_holds(saved, run):
    saved()
    assert run("inspect", "memory.safetensors") == {
        "recipe": "idc",
        "classes": "3: 8, 2, 3",
        "images": "13 stored, 52 decoded",
        "per class": "5 of 8, 3; 3 of 2",
        "image shape": "3 x 4 x 6 (channels, height, width)",
        "factor": "2, so 4 decoded of each stored image",
        "bytes": f"936 of pixels, {Path('memory.safetensors').stat().st_size:,} of the file",
        "normalization": "mean (0.0, 0.0, 0.0), std (1.0, 1.0, 1.0)",
        "budget": "ImagesPerClass(images=5)",
        "written by": f"dc-replay {metadata_of('memory.safetensors')['dc_replay_version']}, "
        f"torch {torch.__version__}, safetensors {safetensors.__version__}",
    }


class Two:
    """A user's own budget."""

    def quotas(self, classes, *, image_bytes):
        return dict.fromkeys(classes, 2)


def test_inspect_says_what_is_not_there(saved, run):
    saved({0: 2}, budget=Two(), recipe="", scale=False, factor=1)
    edit("memory.safetensors", torch_version=None, dc_replay_version=None, safetensors_version=None)
    found = run("inspect", "memory.safetensors")
    assert (found["recipe"], found["written by"]) == ("not recorded", "not recorded")
    assert found["normalization"] == "none"
    assert found["budget"] == "of a kind that the file cannot describe"
    assert found["images"] == "2 stored, 2 decoded"


@pytest.mark.parametrize(
    ("counts", "classes", "per_class"),
    [
        ({0: 2}, "1: 0", "2 each"),
        (dict.fromkeys([0, 1, 2, 5, 6], 1), "5: 0 to 2, 5, 6", "1 each"),
        (dict.fromkeys([-1, 0, 1, 9, 8, 7], 2), "6: -1 to 1, 9, 8, 7", "2 each"),
        ({0: 2, 1: 2, 2: 2, 3: 1, 5: 1}, "5: 0 to 3, 5", "2 of 0 to 2; 1 of 3, 5"),
    ],
)
def test_inspect_is_brief_about_classes(saved, run, counts, classes, per_class):
    saved(counts)
    found = run("inspect", "memory.safetensors")
    assert (found["classes"], found["per class"]) == (classes, per_class)


def test_a_recipe_cannot_command_the_terminal(saved, run):
    saved(recipe="idc\x1b[2J\nbudget")
    assert run("inspect", "memory.safetensors")["recipe"] == r"'idc\x1b[2J\nbudget'"


def place_of(tile, picture):
    """Where a tile is on the picture, as (top, left); None where it is not."""
    height, width = tile.shape[:2]
    for top, left in np.argwhere((picture == tile[0, 0]).all(axis=-1)):
        if np.array_equal(picture[top : top + height, left : left + width], tile):
            return int(top), int(left)
    return None


@pytest.mark.parametrize(
    ("shape", "scale", "shown"),
    [
        ((1, 8, 8), 6, [0, 0, 0]),
        ((3, 4, 6), 8, [0, 1, 2]),
        ((2, 9, 3), 6, [0, 0, 0]),
        ((5, 30, 50), 1, [0, 1, 2]),
        ((1, 1, 64), 1, [0, 0, 0]),
    ],
)
def test_the_sheet_has_a_row_for_each_class(saved, run, shape, scale, shown):
    memory = saved(shape=shape, factor=1)
    said = run("inspect", "memory.safetensors", "--image", "sheet.png")["image"]
    with Image.open("sheet.png") as file:
        assert (file.format, file.mode) == ("PNG", "RGB")
        picture = np.asarray(file)
    places = {}
    for label in memory.classes:
        images = memory.of_class(label).numpy()[:, shown].transpose(0, 2, 3, 1)
        tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
        places[label] = [place_of(tile, picture) for tile in tiles]
    assert all(None not in row for row in places.values())
    tops = [{top for top, _ in row} for row in places.values()]
    assert [len(top) for top in tops] == [1, 1, 1]
    first, second, third = (top.pop() for top in tops)
    assert first < second < third
    lefts = [[left for _, left in row] for row in places.values()]
    assert lefts[0] == lefts[2] == sorted(set(lefts[0])) and lefts[1] == lefts[0][:3]
    height = max(shape[1] * scale, 8)
    for top in (first, second, third):
        row = picture[max(0, top + shape[1] * scale // 2 - height // 2) :][:height]
        assert (row[:, : lefts[0][0]] < 100).any(), "the label is drawn beside its row"
    assert said.startswith("sheet.png, a row for each class")
    assert ("the first 1 of 2 channels as grey" in said) == (shape[0] == 2)
    assert ("the first 3 of 5 channels as red, green and blue" in said) == (shape[0] == 5)


def test_each_row_of_a_sheet_has_the_label_of_its_class():
    images = np.zeros((1, 3, 32, 32), np.uint8)

    def labels(*classes):
        """The strip beside the images, row by row."""
        found = pictures.sheet(dict.fromkeys(classes, images)).png
        strip = np.asarray(Image.open(io.BytesIO(found)).convert("L"))[:, :16]
        inked = np.flatnonzero((strip < 128).any(axis=1))
        rows = np.split(inked, np.flatnonzero(np.diff(inked) > 8) + 1)
        assert len(rows) == len(classes)
        return [strip[row[0] : row[-1] + 1].tobytes() for row in rows]

    (three,), (eight,) = labels(3), labels(8)
    assert three != eight
    assert labels(3, 8) == [three, eight] and labels(8, 3) == [eight, three]


def test_the_sheet_is_no_wider_than_it_says(saved, run):
    memory = saved({0: pictures.COLUMNS + 1, 1: 1}, shape=(1, 8, 8), factor=1)
    said = run("inspect", "memory.safetensors", "--image", "sheet.png")["image"]
    assert said == "sheet.png, a row for each class; the first 20 images of each"
    with Image.open("sheet.png") as file:
        picture = np.asarray(file)
    images = memory.of_class(0).numpy()[:, [0, 0, 0]].transpose(0, 2, 3, 1)
    last, over = images.repeat(6, axis=1).repeat(6, axis=2)[-2:]
    assert place_of(last, picture) is not None
    assert place_of(over, picture) is None


@pytest.mark.parametrize(
    ("counts", "pixels", "left_out"),
    [
        ({0: 2, 1: 1}, 16_000, ""),
        ({0: 2, 1: 1}, 12_000, "; the first image of each"),
        ({0: 1, 1: 2}, 8_000, "; the first 1 of 2 classes"),
        ({0: 2, 1: 1}, 8_000, "; the first 1 of 2 classes; the first image of each"),
        (dict.fromkeys(range(1001), 1), pictures.PIXELS, "; the first 100 of 1,001 classes"),
    ],
)
def test_the_sheet_is_no_larger_than_a_bound(saved, run, monkeypatch, counts, pixels, left_out):
    monkeypatch.setattr(pictures, "PIXELS", pixels)
    memory = saved(counts, shape=(1, 8, 8), factor=1)
    said = run("inspect", "memory.safetensors", "--image", "sheet.png")["image"]
    assert said == f"sheet.png, a row for each class{left_out}"
    with Image.open("sheet.png") as file:
        assert file.width * file.height <= pixels
        picture = np.asarray(file)
    first = memory.of_class(0).numpy()[0, [0, 0, 0]].transpose(1, 2, 0)
    assert place_of(first.repeat(6, axis=0).repeat(6, axis=1), picture) is not None


# Shrink


BOTH = Smallest((TotalBytes(1100), ImagesPerClass(5)))


@pytest.mark.parametrize("budget", [ImagesPerClass(9), TotalImages(15), BOTH])
@pytest.mark.parametrize(
    ("option", "argument", "value"),
    [
        ("--ipc", "images_per_class", 1),
        ("--ipc", "images_per_class", 4),
        ("--ipc", "images_per_class", 5),
        ("--total-images", "total_images", 3),
        ("--total-images", "total_images", 11),
        ("--total-images", "total_images", 13),
        ("--total-bytes", "total_bytes", 3 * 72),
        ("--total-bytes", "total_bytes", 10 * 72 + 71),
    ],
)
def test_shrink_writes_what_the_memory_would(saved, run, budget, option, argument, value):
    memory = saved(budget=budget)
    before = Path("memory.safetensors").read_bytes()
    said = run("shrink", "memory.safetensors", option, value, "-o", "small.safetensors")
    memory.shrink(**{argument: value})
    memory.save("expected.safetensors")
    assert Path("small.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert Path("memory.safetensors").read_bytes() == before
    assert said == {
        "images": f"13 -> {len(memory)}",
        "pixel bytes": f"936 -> {memory.nbytes}",
        "written to": "small.safetensors",
    }


def test_shrink_can_replace_the_file(saved, run, tmp_path):
    memory = saved()
    run("shrink", "memory.safetensors", "--ipc", "2", "--output", "memory.safetensors")
    loaded = ExemplarMemory.load("memory.safetensors")
    assert loaded.counts == {8: 2, 2: 2, 3: 2}
    assert torch.equal(loaded.of_class(3), memory.of_class(3)[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["memory.safetensors"]


def test_shrink_keeps_the_torch_version_and_renews_the_others(saved, run):
    saved()
    renewed = metadata_of("memory.safetensors")["dc_replay_version"]
    edit(
        "memory.safetensors",
        torch_version="9.9",
        dc_replay_version="9.8",
        safetensors_version="9.7",
    )
    run("shrink", "memory.safetensors", "--ipc", "2", "-o", "small.safetensors")
    found = metadata_of("small.safetensors")
    assert found["torch_version"] == "9.9"
    assert found["dc_replay_version"] == renewed
    assert found["safetensors_version"] == safetensors.__version__


# Export


@pytest.mark.parametrize("shape", [(1, 5, 3), (3, 4, 6)])
@pytest.mark.parametrize("there", [False, True])
def test_export_writes_a_folder_of_images_for_each_class(saved, run, shape, there):
    memory = saved({7: 2, -1: 1}, shape=shape)
    if there:
        Path("out").mkdir()
    said = run("export", "memory.safetensors", "out")
    files = sorted(str(path) for path in Path("out").rglob("*") if path.is_file())
    assert files == ["out/-1/000.png", "out/7/000.png", "out/7/001.png"]
    for label in memory.classes:
        for place, image in enumerate(memory.of_class(label).numpy()):
            with Image.open(f"out/{label}/{place:03}.png") as file:
                assert file.mode == {1: "L", 3: "RGB"}[shape[0]]
                found = np.asarray(file).reshape(*shape[1:], shape[0])
            assert np.array_equal(found.transpose(2, 0, 1), image)
    assert said == {"images": "3 of 2 classes", "written to": "out"}


def test_exported_names_sort_beyond_a_thousand(saved, run):
    saved({0: 1001, 1: 1}, shape=(1, 1, 1), factor=1)
    run("export", "memory.safetensors", "out")
    names = sorted(path.name for path in Path("out/0").iterdir())
    assert (len(names), names[0], names[-1]) == (1001, "0000.png", "1000.png")
    assert Path("out/1/0000.png").is_file()


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_export_leaves_nothing(saved, refused, monkeypatch, there):
    saved()
    if there:
        Path("out").mkdir()
    whole, calls = pictures.png, []

    def fail(image):
        calls.append(image)
        if len(calls) == 7:
            raise OSError("no space\nleft")
        return whole(image)

    monkeypatch.setattr(pictures, "png", fail)
    assert "error: no space left" in refused("export", "memory.safetensors", "out")
    assert len(calls) == 7


def test_an_export_that_is_interrupted_leaves_nothing(saved, monkeypatch):
    saved()
    whole, calls = pictures.png, []

    def stop(image):
        calls.append(image)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return whole(image)

    monkeypatch.setattr(pictures, "png", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["export", "memory.safetensors", "out"])
    assert len(calls) == 7 and not Path("out").exists()


# What is refused


COMMANDS = [
    ("inspect", "memory.safetensors"),
    ("inspect", "memory.safetensors", "--image", "sheet.png"),
    ("shrink", "memory.safetensors", "--ipc", "1", "-o", "small.safetensors"),
    ("export", "memory.safetensors", "out"),
]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def another_kind(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))


def a_folder(path):
    path.unlink()
    path.mkdir()


def without_format(path):
    edit(path, format=None)


def of_another_version(path):
    edit(path, format_version="3")


def with_other_labels(path):
    edit(path, classes="[8, 3, 2]")


def over_its_budget(path):
    edit(path, budget='{"kind": "ImagesPerClass", "images": 4}')


def below_an_image_per_class(path):
    edit(path, budget='{"kind": "TotalImages", "images": 2}')


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "memory.safetensors: there is no such file; check the path"),
        (cut_short, "memory.safetensors: this is not a whole safetensors file"),
        (emptied, "memory.safetensors: this is not a whole safetensors file"),
        (another_kind, "memory.safetensors: this is not a whole safetensors file"),
        (a_folder, "memory.safetensors: this is a folder; name the file"),
        (without_format, "but not one that ExemplarMemory.save wrote"),
        (
            of_another_version,
            "`format_version` is '3', but this release reads '1' and '2'; ",
        ),
        (with_other_labels, "`labels` disagrees with the metadata `classes` and `counts`"),
        (over_its_budget, "holds more than its own budget ImagesPerClass(images=4) allows"),
        (below_an_image_per_class, "more than its own budget TotalImages(images=2) allows"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(saved, refused, command, damage, message):
    saved({8: 5, 2: 3, 3: 3})
    damage(Path("memory.safetensors"))
    assert message in refused(*command)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (("--ipc", "0"), "`--ipc` is 0; pass a whole number of at least 1"),
        (("--ipc", "-3"), "`--ipc` is -3; pass a whole number of at least 1"),
        (("--ipc", "6"), "`--ipc` is 6, but only 5 are stored and a memory cannot grow; pass at"),
        (("--total-images", "0"), "`--total-images` is 0; pass a whole number of at least 1"),
        (("--total-images", "2"), "`--total-images` is 2, which is below one image for each of 3"),
        (("--total-images", "14"), "`--total-images` is 14, but only 13 are stored and a memory"),
        (("--total-bytes", "215"), "`--total-bytes` is 215, which is below one image for each"),
        (("--total-bytes", "937"), "`--total-bytes` is 937, but only 936 are stored and a memory"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(saved, refused, size, message):
    saved()
    assert message in refused("shrink", "memory.safetensors", *size, "-o", "small.safetensors")


def test_a_budget_of_the_users_own_is_not_shrunk(saved, refused):
    saved({0: 2}, budget=Two())
    line = refused("shrink", "memory.safetensors", "--ipc", "1", "-o", "small.safetensors")
    assert "memory.safetensors: the file was saved with a budget that it cannot describe; " in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("shrink", "--ipc", "1", "-o", "no/small.safetensors"),
            "`--output` is no/small.safetensors, whose folder does not exist; create it first",
        ),
        (("shrink", "--ipc", "1", "-o", "full"), "`--output` is full, which is a folder; name a"),
        (("inspect", "--image", "no/sheet.png"), "`--image` is no/sheet.png, whose folder does no"),
        (("inspect", "--image", "sheet.jpg"), "`--image` is sheet.jpg; name a file that ends in"),
        (("export", "full"), "`OUT` is full, which is not empty; name a new or empty folder"),
        (("export", "full/file"), "`OUT` is full/file, which is a file; name a new or empty"),
        (("export", "no/out"), "`OUT` is no/out, whose folder does not exist; create it first"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(saved, refused, command, message):
    saved()
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    name, *rest = command
    assert message in refused(name, "memory.safetensors", *rest)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_are_no_pictures_are_not_exported(saved, refused, channels):
    saved(shape=(channels, 4, 4))
    line = refused("export", "memory.safetensors", "out")
    assert f"memory.safetensors: the images have {channels} channels, but PNG files are" in line


def test_a_failed_write_is_one_line(saved, refused, monkeypatch):
    saved()

    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    for command in COMMANDS[1:3]:
        assert "could not be written: no space; what it held before is" in refused(*command)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("condense", "memory.safetensors"),
        ("inspect",),
        ("inspect", "memory.safetensors", "--loud"),
        ("shrink", "memory.safetensors", "--ipc", "1"),
        ("shrink", "memory.safetensors", "-o", "small.safetensors"),
        ("shrink", "memory.safetensors", "-o", "small.safetensors", "--ipc", "None"),
        ("shrink", "memory.safetensors", "-o", "small.safetensors", "--ipc", "1.5"),
        (*COMMANDS[2], "--total-images", "3"),
    ],
)
def test_usage_errors_exit_with_2(saved, capsys, tmp_path, argv):
    saved()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == "" and "dc-replay" in printed.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["memory.safetensors"]


# Help and start-up


@pytest.mark.parametrize("command", ["inspect", "shrink", "export"])
def test_help_gives_an_example(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"Example: dc-replay {command} memory.safetensors" in capsys.readouterr().out


def test_shells_can_complete_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-print-completion", "bash"])
    assert not stopped.value.code
    script = capsys.readouterr().out
    assert "dc-replay" in script and "--total-bytes" in script


def test_every_command_starts_at_once_and_without_torch(saved):
    saved()
    code = (
        "import os, sys\n"
        "from dc_replay.cli import main\n"
        f"codes = [main(command) for command in {COMMANDS!r}]\n"
        "loaded = {'torch', 'torchvision', 'avalanche', 'matplotlib'} & set(sys.modules)\n"
        "print(codes, sorted(loaded), os.times().user)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    report, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
    assert report == "[0, 0, 0, 0] []"
    assert float(seconds) < 1


def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dc_replay.cli", "inspect", tmp_path / "no.safetensors"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dc-replay: error: ") and done.stderr.count("\n") == 1


def test_all_images_in_the_bytes_of_one_are_exported(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    formation = Formation(1, compression=2)
    memory = ExemplarMemory(budget=ImagesPerClass(2), formation=formation)
    pixels = torch.randint(256, (3, 3, 6, 5), dtype=torch.uint8)
    memory.add(Exemplars(pixels, torch.tensor([4, 4, 9])))
    memory.save("memory.safetensors")
    said = run("inspect", "memory.safetensors", "--image", "sheet.png")
    assert said["images"] == "3 stored, 6 decoded"
    assert said["factor"] == "1, with compression 2: 2 decoded of each stored image"
    assert run("export", "memory.safetensors", "out")["images"] == "6 of 2 classes"
    decoded = memory.decoded()[0]
    paths = ["4/000.png", "4/001.png", "4/002.png", "4/003.png", "9/000.png", "9/001.png"]
    for path, expected in zip(paths, decoded, strict=True):
        with Image.open(tmp_path / "out" / path) as file:
            shown = np.asarray(file).transpose(2, 0, 1)
        assert np.abs(shown - (expected * 255).numpy()).max() <= 0.51  # by another implementation
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6
    run("shrink", "memory.safetensors", "--ipc", "1", "-o", "small.safetensors")
    assert ExemplarMemory.load("small.safetensors").formation == formation
