"""Damaged and dishonest files: refused in the package's own words, or harmless."""

import contextlib
import errno
import io
import json
import math
import os
import pickle
import sys
import tracemalloc
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_replay import _writing, checkpoints, cli, pictures, recipes
from dc_replay.budgets import ImagesPerClass, Smallest, TotalBytes
from dc_replay.checkpoints import Checkpoint, Snapshot
from dc_replay.errors import ArgumentError, DCReplayError, MemoryFileError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.networks import convnet_for
from dc_replay.pixels import Normalization

COUNTS = {3: 2, -1: 1}
SHAPE = (1, 2, 3)
PACKED = Formation(2)
CAMPAIGN, SLOW = settings.get_profile("campaign"), settings.get_profile("slow campaign")


# A file, and ways to damage it


def make_memory(counts=COUNTS, formation=PACKED, **options):
    options = {"budget": Smallest((ImagesPerClass(2), TotalBytes(99))), **options}
    pixels = torch.arange(sum(counts.values()) * 6, dtype=torch.uint8).view(-1, *SHAPE)
    memory = ExemplarMemory(
        formation=formation,
        normalization=Normalization((0.5,), (0.25,)),
        recipe="idc",
        **options,
    )
    each = torch.tensor(list(counts.values()))
    memory.add(Exemplars(pixels, torch.tensor(list(counts)).repeat_interleave(each)))
    return memory


@pytest.fixture(scope="module", params=[PACKED, Formation(2, compression=2)], ids=str)
def whole(request, tmp_path_factory):
    """The bytes of a memory file, of either version."""
    path = tmp_path_factory.mktemp("whole") / "memory.safetensors"
    make_memory(formation=request.param).save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.safetensors"


def apart(data):
    """The header and what follows it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def together(header, payload):
    return len(header).to_bytes(8, "little") + header + payload


def edited(data, change):
    """The file with another header: ``change`` is given its fields."""
    header, payload = apart(data)
    fields = json.loads(header)
    change(fields)
    return together(json.dumps(fields).encode("utf-8", "surrogatepass"), payload)


def with_metadata(data, **changes):
    """The file with other metadata; None leaves a field out."""

    def change(fields):
        fields["__metadata__"].update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del fields["__metadata__"][name]

    return edited(data, change)


def with_tensor(data, name, **changes):
    return edited(data, lambda fields: fields[name].update(changes))


def with_field(data, name, value):
    return edited(data, lambda fields: fields.update({name: value}))


def without_field(data, name):
    return edited(data, lambda fields: fields.pop(name, None))


def flipped(data, position, mask):
    changed = bytearray(data)
    changed[position] ^= mask
    return bytes(changed)


def nested(depth):
    return "[" * depth + "]" * depth


huge = st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30])
anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 99),
        huge,
        huge.map(int.__neg__),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from(["ImagesPerClass", "TotalImages", "TotalBytes", "Smallest", "U8", "I64"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["kind", "images", "bytes", "budgets", "mean", "std", "other"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=6,
)
simple_budgets = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(
            ["ImagesPerClass", "TotalImages", "TotalBytes", "Smallest", "Budget"]
        )
    },
    optional={"images": anything, "bytes": anything, "budgets": anything},
)
budgets = st.one_of(
    simple_budgets,
    st.fixed_dictionaries(
        {"kind": st.just("Smallest"), "budgets": st.lists(simple_budgets, max_size=3)}
    ),
)
scales = st.fixed_dictionaries(
    {"mean": st.lists(st.floats() | anything, max_size=3)},
    optional={"std": st.lists(st.floats() | anything, max_size=3), "other": anything},
)
texts = st.one_of(
    st.text(max_size=9), anything.map(json.dumps), st.integers(1, 5000).map(lambda n: "9" * n)
)
METADATA = {
    "format": texts,
    "format_version": texts,
    "factor": texts | st.integers(-2, 9).map(str),
    "classes": texts | st.lists(st.integers(-2, 4) | huge, max_size=4).map(json.dumps),
    "counts": texts | st.lists(st.integers(-2, 4) | huge, max_size=4).map(json.dumps),
    "normalization": texts | scales.map(json.dumps),
    "recipe": texts,
    "budget": texts | budgets.map(json.dumps),
    "created_by": texts,
    "torch_version": texts,
    "other": texts,
}
sides = st.lists(st.integers(-1, 9) | huge, max_size=6)
TENSOR = {
    "dtype": anything
    | st.sampled_from(["U8", "I8", "BOOL", "I64", "U64", "F64", "F16", "BF16", "F8_E4M3", "F4"]),
    "shape": anything | sides,
    "data_offsets": anything | sides,
    "other": anything,
}


@st.composite
def damaged(draw, whole):
    """The file with one damage of any kind, or two."""
    for _ in range(draw(st.integers(1, 2), label="damages")):
        kind = draw(st.sampled_from(["flip", "cut", "more", "tensor", "metadata", "type", "drop"]))
        try:
            header = json.loads(apart(whole)[0])
            names = sorted(set(header) - {"__metadata__"})
            known = {name for name in names if isinstance(header[name], dict)}
            whole_metadata = isinstance(header.get("__metadata__"), dict)
        except (ValueError, TypeError):
            kind, known, whole_metadata = "flip", set(), False
        if kind == "cut":
            whole = whole[: draw(st.integers(0, len(whole)))]
        elif kind == "more":
            whole += draw(st.binary(min_size=1, max_size=40))
        elif kind == "tensor" and known:
            name, key = draw(st.sampled_from(sorted(known))), draw(st.sampled_from(sorted(TENSOR)))
            whole = with_tensor(whole, name, **{key: draw(TENSOR[key])})
        elif kind == "metadata" and whole_metadata:
            key = draw(st.sampled_from(sorted(METADATA)))
            whole = with_metadata(whole, **{key: draw(METADATA[key])})
        elif kind == "type":
            key = draw(st.sampled_from([*sorted(known), "__metadata__"]))
            whole = with_field(whole, key, draw(anything))
        elif kind == "drop" and known:
            key = draw(st.sampled_from([*sorted(known), "__metadata__"]))
            whole = without_field(whole, key)
        elif whole:
            position = draw(st.integers(0, len(whole) - 1))
            whole = flipped(whole, position, draw(st.integers(1, 255)))
    return whole


@pytest.fixture
def load(tried, path):
    """Loads a file of these bytes; gives the memory, or None where it is refused."""

    def run(data):
        path.write_bytes(data)
        tracemalloc.start()
        try:
            memory, error = tried(ExemplarMemory.load, path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 12 * len(data) + 200_000, "more was allocated than the file accounts for"
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
        if error is not None:
            assert type(error) is MemoryFileError
            assert str(error).startswith(f"{path}: ")
            return None
        check(memory, data)
        return memory

    return run


def check(memory, data):
    """That a memory is sound, whatever file it comes from."""
    channels, *_ = memory.image_shape
    assert memory.nbytes + 8 * len(memory) <= len(data)
    assert all(1 <= memory.counts[label] <= most for label, most in memory.quotas_with([]).items())
    memory.formation.check(*memory.image_shape)
    assert type(memory.recipe) is str
    if memory.normalization is not None:
        assert memory.normalization.channels == channels
        values = [*memory.normalization.mean, *memory.normalization.std]
        assert all(type(value) is float and math.isfinite(value) for value in values)
        assert min(memory.normalization.std) > 0
    images, _ = memory.decoded(normalised=False)
    assert images.isfinite().all() and len(repr(memory)) > 0


# Memory files


def test_a_bit_flipped_anywhere_is_refused_or_changes_one_thing(whole, load, long):
    header = 8 + len(apart(whole)[0])
    for position in range(len(whole)):
        for bit in range(8) if long else [position % 7]:
            memory = load(flipped(whole, position, 1 << bit))
            if position >= header and memory is not None:
                expected = np.frombuffer(apart(whole)[1], np.uint8)
                found = memory.exemplars.pixels.flatten().numpy()
                assert (expected[-found.size :] != found).sum() == 1, "a label was changed"


def test_a_file_cut_or_extended_anywhere_is_refused(whole, load, long):
    for size in range(0, len(whole), 1 if long else 3):
        assert load(whole[:size]) is None
        assert load(whole[size:]) is None or size == 0
    for more in (b"\0", b"{}", bytes(8), bytes(4096), whole):
        assert load(whole + more) is None
        assert load(more + whole) is None


@CAMPAIGN
@given(st.data())
def test_damage_of_any_kind_is_refused_or_leaves_a_sound_memory(whole, load, data):
    for _ in range(10):
        load(data.draw(damaged(whole)))


LABELS, PIXELS = 8 * 3, 6 * 3


def dishonest(name, **changes):
    return lambda data: with_tensor(data, name, **changes)


def with_names_exchanged(fields):
    fields["pixels"], fields["labels"] = fields["labels"], fields["pixels"]


def without_offsets(fields):
    del fields["pixels"]["data_offsets"]


def raw(change):
    """A header that no library would write: ``change`` is given its bytes."""
    return lambda data: together(change(apart(data)[0]), apart(data)[1])


HEADERS = {
    "a huge shape": dishonest("pixels", shape=[2**62, 1, 2, 3]),
    "a shape that overflows": dishonest("pixels", shape=[2**33, 2**33, 2**33, 2**33]),
    "a shape that overflows to the right size": dishonest("pixels", shape=[2**63, 2, 1, 1]),
    "a shape beyond 64 bits": dishonest("pixels", shape=[2**64, 1, 2, 3]),
    "a negative shape": dishonest("pixels", shape=[-3, 1, 2, -3]),
    "a fractional shape": dishonest("pixels", shape=[3.0, 1, 2, 3]),
    "no dimension": dishonest("pixels", shape=[]),
    "a hundred dimensions": dishonest("pixels", shape=[3, 2, 3] + [1] * 97),
    "a side of 0": dishonest("pixels", shape=[3, 0, 2, 3]),
    "another order": dishonest("pixels", shape=[2, 3, 1, 3]),
    "one image more": dishonest("pixels", shape=[4, 1, 2, 3]),
    "labels in rows": dishonest("labels", shape=[3, 1]),
    "labels of 0": dishonest("labels", shape=[0]),
    "offsets beyond the file": dishonest("pixels", data_offsets=[LABELS, 2**40]),
    "offsets that overflow": dishonest("pixels", data_offsets=[2**64 - 1, PIXELS - 1]),
    "offsets beyond 64 bits": dishonest("pixels", data_offsets=[LABELS, 2**64 + LABELS]),
    "offsets the wrong way round": dishonest("pixels", data_offsets=[LABELS + PIXELS, LABELS]),
    "negative offsets": dishonest("pixels", data_offsets=[-PIXELS, 0]),
    "overlapping offsets": dishonest("pixels", data_offsets=[LABELS - 1, LABELS + PIXELS - 1]),
    "the same offsets": dishonest("pixels", data_offsets=[0, PIXELS]),
    "a hole": dishonest("pixels", data_offsets=[LABELS + 1, LABELS + PIXELS]),
    "one offset": dishonest("pixels", data_offsets=[LABELS]),
    "floats for pixels": dishonest("pixels", dtype="F32"),
    "signed pixels": dishonest("pixels", dtype="I8"),
    "truths for pixels": dishonest("pixels", dtype="BOOL"),
    "half bytes for pixels": dishonest("pixels", dtype="F4", shape=[3, 1, 4, 3]),
    "unsigned labels": dishonest("labels", dtype="U64"),
    "floats for labels": dishonest("labels", dtype="F64"),
    "pairs for labels": dishonest("labels", dtype="C64"),
    "an unknown dtype": dishonest("labels", dtype="object"),
    "another tensor": lambda data: with_field(
        data, "more", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    ),
    "names exchanged": lambda data: edited(data, with_names_exchanged),
    "no offsets": lambda data: edited(data, without_offsets),
    "no tensors": lambda data: without_field(without_field(data, "pixels"), "labels"),
    "no metadata": lambda data: without_field(data, "__metadata__"),
    "metadata that is no text": lambda data: with_metadata(data, factor=2),
    "metadata in a list": lambda data: with_field(data, "__metadata__", [1]),
    "a tensor twice": raw(
        lambda header: (
            header.rstrip()[:-1]
            + b',"pixels":{"dtype":"U8","shape":[1,1,6,7],"data_offsets":[0,42]}}'
        )
    ),
    "a field twice": raw(
        lambda header: header.replace(b'"dtype":"U8"', b'"dtype":"U8","dtype":"U8"')
    ),
    "bytes that are no text": raw(lambda header: header.replace(b"idc", b"\xff\xfe\xfd")),
    "half a surrogate pair": raw(lambda header: header.replace(b"idc", rb"\ud83d")),
    "a byte order mark": raw(lambda header: b"\xef\xbb\xbf" + header),
    "UTF-16": raw(lambda header: header.decode().encode("utf-16")),
    "a list": raw(lambda header: b"[" + header + b"]"),
    "nothing": raw(lambda header: b""),
    "an empty object": raw(lambda header: b"{}"),
    "null": raw(lambda header: b"null"),
    "no end": raw(lambda header: header.rstrip()[:-1]),
    "two objects": raw(lambda header: header.rstrip() + header),
    "a comment": raw(lambda header: b"{/**/" + header[1:]),
    "lists in lists": raw(lambda header: b'{"a":' + nested(100_000).encode() + b"," + header[1:]),
    "objects in objects": raw(lambda header: b'{"a":' * 100_000),
    "no number": raw(lambda header: header.replace(b"[3,1,2,3]", b"[NaN,1,2,3]")),
    "a number without end": raw(lambda header: header.replace(b"[3,1,2,3]", b"[1e999,1,2,3]")),
    "a length beyond the file": lambda data: (2**40).to_bytes(8, "little") + data[8:],
    "a length of 2**64 - 1": lambda data: b"\xff" * 8 + data[8:],
    "a length in the other order": lambda data: data[:8][::-1] + data[8:],
    "a length that ends in the payload": lambda data: together(
        apart(data)[0] + apart(data)[1][:8], apart(data)[1][8:]
    ),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused(whole, load, change):
    data = change(whole)
    assert data != whole and load(data) is None


def test_spaces_in_a_header_do_no_harm(whole, load):
    for spaces in range(1, 9):
        assert load(together(apart(whole)[0] + b" " * spaces, apart(whole)[1])) is not None


def json_of(**fields):
    return json.dumps(fields)


LIES = {
    "format": ["", "DC-REPLAY-MEMORY", "dc-replay-memory ", "dc-replay-condensation"],
    "format_version": ["", "0", "1.0", "01", "-1", "999", "1\0", "[1]"],
    "factor": [
        *("", "0", "-1", "1.0", "2.5", "1e0", "nan", "inf", "0x2", "two", "[2]", "null", "true"),
        *("3", "9" * 30, "9" * 4300, "9" * 4301, "-" + "9" * 4301),
    ],
    "classes": [
        *("", "null", "true", "3", '"3,-1"', "{}", "[]", "[[3], [-1]]", "[3.0, -1]", '["3", "-1"]'),
        *("[3]", "[3, 3]", "[-1, 3]", "[3, -1, 4]", "[3, null]", "[3, NaN]", "[3, Infinity]"),
        *(f"[3, {2**63}]", f"[3, {-(2**63)}]", f"[3, {10**4000}]", f"[3, {'9' * 5000}]"),
    ],
    "counts": [
        *(
            "",
            "null",
            "[]",
            "[2]",
            "[2, 0, 1]",
            "[3, 0]",
            "[4, -1]",
            "[1, 2]",
            "[2, 2]",
            "[2.0, 1]",
        ),
        *("[true, 2]", '["2", "1"]', f"[{2**62}, {2**62}]", f"[{2**63 - 1}, 4]"),
        f"[{10**4000}, {-(10**4000) + 3}]",
    ],
    "normalization": [
        *("", "false", "0", "[]", "{}", "[[0.5], [0.25]]", '"none"', '{"mean": [0.5]}'),
        json_of(mean=0.5, std=0.25),
        json_of(mean=None, std=None),
        json_of(mean=[], std=[]),
        json_of(mean=[None], std=[None]),
        json_of(mean=[[0.5]], std=[[0.25]]),
        json_of(mean=[0.5], std=[0]),
        json_of(mean=[0.5], std=[-0.25]),
        json_of(mean=[0.5], std=[math.nan]),
        json_of(mean=[math.nan], std=[0.25]),
        json_of(mean=[math.inf], std=[0.25]),
        json_of(mean=[0.5], std=[math.inf]),
        json_of(mean=[1e39], std=[0.25]),
        json_of(mean=[10**400], std=[0.25]),
        json_of(mean=["x"], std=[0.25]),
        json_of(mean=[0.5, 0.5], std=[0.25]),
        json_of(mean=[0.5] * 3, std=[0.25] * 3),
        json_of(mean=[0.5], std=[0.25], other=1),
        '{"mean": [1e999], "std": [1]}',
    ],
    "budget": [
        *("", "false", "0", "2", "[]", "{}", '"ImagesPerClass"', '["ImagesPerClass", 2]'),
        json_of(images=2),
        json_of(kind=None, images=2),
        json_of(kind="Budget", images=2),
        json_of(kind="object"),
        json_of(kind={"ImagesPerClass": 2}),
        json_of(kind="ImagesPerClass"),
        json_of(kind="ImagesPerClass", bytes=2),
        json_of(kind="ImagesPerClass", images=2, bytes=2),
        *(json_of(kind="ImagesPerClass", images=value) for value in (0, -1, 1, 2.0, True, None)),
        *(json_of(kind="TotalImages", images=value) for value in (2, math.nan, "3", [3], {})),
        *(json_of(kind="TotalBytes", bytes=value) for value in (17, math.inf, -(10**400), 1e999)),
        json_of(kind="Smallest"),
        json_of(kind="Smallest", budgets=None),
        json_of(kind="Smallest", budgets={}),
        json_of(kind="Smallest", budgets=[None]),
        json_of(kind="Smallest", budgets=[[]]),
        json_of(kind="Smallest", budgets=[{"kind": "ImagesPerClass", "images": 2}, 3]),
        json_of(kind="Smallest", budgets=[{"kind": "Smallest", "budgets": []}]),
        '{"kind": "ImagesPerClass", "images": 9, "images": 1}',
        '{"kind": "ImagesPerClass", "images": 9, "kind": "Budget"}',
    ],
}


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lies_is_refused(whole, load, name):
    for text in LIES[name]:
        assert load(with_metadata(whole, **{name: text})) is None, text


NO_NUMBERS = {
    "digits of a text": json_of(mean="5", std=[1]),
    "texts": json_of(mean=["0.5"], std=["0.25"]),
    "names": json_of(mean={"0.5": 1}, std=[1]),
    "truths": json_of(mean=[True], std=[True]),
    "rounds to 0": json_of(mean=[0.5], std=[1e-60]),
}


@pytest.mark.parametrize("text", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_a_normalization_that_is_no_numbers_is_refused(whole, load, text):
    assert load(with_metadata(whole, normalization=text)) is None


@pytest.mark.parametrize("name", ["recipe", "created_by", "torch_version", "other"])
@pytest.mark.parametrize("text", ["", "\0", "\x1b[2J", "é" * 3000, "x" * 1_000_000, nested(9)])
def test_what_only_informs_may_be_any_text(whole, load, name, text):
    memory = load(with_metadata(whole, **{name: text}))
    assert memory.recipe == (text if name == "recipe" else "idc")


NESTS = {
    "classes": "{}",
    "counts": "[{}]",
    "normalization": '{{"mean": {}, "std": [1]}}',
    "budget": '{{"kind": "ImagesPerClass", "images": {}}}',
    "kind": '{{"kind": {}}}',
    "budgets": '{{"kind": "Smallest", "budgets": [{{"kind": "TotalBytes", "bytes": {}}}]}}',
}


@pytest.mark.parametrize("name", NESTS)
def test_nested_lists_are_refused_however_deep_they_are(whole, load, name):
    """Near the depth at which Python gives up, whatever looks at them may be one level deeper."""
    limit = sys.getrecursionlimit()
    key = {"kind": "budget", "budgets": "budget"}.get(name, name)
    for depth in [*range(limit - 150, limit + 5), 10_000, 100_000]:
        text = NESTS[name].format(nested(depth))
        assert load(with_metadata(whole, **{key: text})) is None


def test_the_lowest_class_label_comes_back(load, path):
    memory = make_memory({-(2**63): 1})
    memory.save(path)
    assert load(path.read_bytes()) is not None


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def torch_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def numpy_file(thing):
    file = io.BytesIO()
    np.save(file, np.array([thing], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("dump", [pickle.dumps, torch_file, numpy_file])
@pytest.mark.parametrize("into", ["alone", "payload", "recipe"])
def test_nothing_in_a_file_is_executed(whole, tried, path, dump, into):
    made = path.parent / "made"
    data = payload = dump(Intruder(made))
    if into == "payload":
        data = together(apart(whole)[0], payload)
    elif into == "recipe":
        data = with_metadata(whole, recipe=payload.decode("latin-1"))
    path.write_bytes(data)
    _, error = tried(ExemplarMemory.load, path)
    assert (error is None) == (into == "recipe")
    tried(Checkpoint(path, "fingerprint").load, torch.device("cpu"))
    assert command_line("inspect", path)[0] == (0 if into == "recipe" else 2)
    assert not made.exists()
    pickle.loads(pickle.dumps(Intruder(made)))
    assert made.exists(), "it would have been seen"


# The command line


def command_line(*argv):
    """The exit code and what is printed, encoded as Python does it by default."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, newline="")
        for errors in ("strict", "backslashreplace")
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([os.fspath(part) for part in argv])
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return code, *texts


COMMANDS = [
    ("inspect", "memory.safetensors"),
    ("inspect", "memory.safetensors", "--image", "new.png"),
    ("shrink", "memory.safetensors", "--ipc", "1", "-o", "new.safetensors"),
    ("export", "memory.safetensors", "new"),
]


def is_one_line(text):
    return text.startswith("dc-replay: error: ") and text[-1] == "\n" and text[:-1].isprintable()


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
@SLOW
@given(data=st.data())
def test_every_command_refuses_what_cannot_be_loaded_in_one_line(
    whole, tried, tmp_path_factory, monkeypatch, argv, data
):
    folder = tmp_path_factory.mktemp("command")
    monkeypatch.chdir(folder)
    Path("memory.safetensors").write_bytes(data.draw(damaged(whole)))
    _, refused = tried(ExemplarMemory.load, "memory.safetensors")
    code, out, err = command_line(*argv)
    budget = refused is not None and "a budget that it cannot describe" in str(refused)
    if code == 0:
        assert out and not err and (refused is None or (budget and argv[0] != "shrink"))
        return
    assert code == 2 and out == "" and is_one_line(err)
    assert refused is not None
    assert [entry.name for entry in folder.iterdir()] == ["memory.safetensors"]


CONTROL = "\x1b[2J\x07"
AS_IT_IS = {
    "format": lambda data: with_metadata(data, format=CONTROL),
    "format_version": lambda data: with_metadata(data, format_version=CONTROL),
    "factor": lambda data: with_metadata(data, factor=CONTROL),
    "kind": lambda data: with_metadata(data, budget=json_of(kind=CONTROL)),
    "images": lambda data: with_metadata(data, budget=json_of(kind="TotalImages", images=CONTROL)),
    "tensor": lambda data: tensor_renamed("labels", CONTROL)(data),
    "classes": lambda data: with_metadata(data, classes=json.dumps(CONTROL)),
    "budget": lambda data: with_metadata(
        data, budget=json.dumps({"kind": "TotalImages", CONTROL: 1})
    ),
    "normalization": lambda data: with_metadata(
        data, normalization=json.dumps({"mean": [0], "std": [1], CONTROL: 1})
    ),
    "dtype": lambda data: with_tensor(data, "pixels", dtype=CONTROL),
}


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("change", AS_IT_IS.values(), ids=AS_IT_IS)
def test_a_file_cannot_command_the_terminal(whole, tried, tmp_path, monkeypatch, argv, change):
    monkeypatch.chdir(tmp_path)
    Path("memory.safetensors").write_bytes(change(whole))
    outcome = tried(command_line, *argv)
    code, out, err = outcome.value
    assert code == 2 and out == "" and is_one_line(err)


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
@pytest.mark.parametrize("argv", COMMANDS[1:], ids=" ".join)
def test_a_file_name_that_is_no_text_can_be_written(whole, tried, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    Path("memory.safetensors").write_bytes(whole)
    argv = [part.replace("new", "\udcff") for part in argv]
    assert tried(command_line, *argv).value[0] == 0


def test_a_sheet_costs_what_the_file_accounts_for(tried, monkeypatch):
    monkeypatch.setattr(pictures, "_encode", lambda picture: b"")
    classes = {label: np.zeros((1, 1, 1, 1), np.uint8) for label in range(1000)}
    classes[0] = np.zeros((20, 1, 1, 1), np.uint8)
    tracemalloc.start()
    try:
        tried(pictures.sheet, classes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


# Saving that fails


class HalfWritten:
    """A file that takes half of what it is given."""

    def __init__(self, *args):
        self.file = open(*args)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def cannot_write(monkeypatch):
    monkeypatch.setattr(_writing, "open", HalfWritten, raising=False)


def is_interrupted(monkeypatch):
    def fail(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(_writing.os, "fsync", fail)


SAVES = {
    "memory": lambda: make_memory().save("new"),
    "checkpoint": lambda: Checkpoint("new", "x").save(Snapshot({"t": torch.zeros(99)}, {"v": 1})),
    "shrink": lambda: cli.shrink(Path("memory.safetensors"), output=Path("new"), ipc=1),
    "sheet": lambda: cli.inspect(Path("memory.safetensors"), image=Path("new.png")),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("fail", [cannot_write, is_interrupted])
def test_a_save_that_fails_leaves_the_folder_as_it_was(
    whole, tried, tmp_path, monkeypatch, save, there, fail
):
    monkeypatch.chdir(tmp_path)
    Path("memory.safetensors").write_bytes(whole)
    if there:
        Path("new").write_bytes(b"old")
        Path("new.png").write_bytes(b"old")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        fail(patched)
        try:
            assert type(tried(save).error) is DCReplayError
        except KeyboardInterrupt:
            assert fail is is_interrupted
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


PATHS = {
    "empty": "",
    "a folder": ".",
    "in no folder": "missing/new",
    "in a file": "memory.safetensors/new",
    "in a folder of 300 letters": "x" * 300 + "/new",
    "250 letters": "x" * 250,
    "300 letters": "x" * 300,
    "5000 letters": "x" * 5000,
    "a null": "a\0b",
    "half a surrogate pair": "a\ud800b",
}


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("save", ["memory", "checkpoint"])
def test_a_path_that_cannot_be_written_is_refused(whole, tried, tmp_path, monkeypatch, name, save):
    monkeypatch.chdir(tmp_path)
    Path("memory.safetensors").write_bytes(whole)
    if save == "memory":
        outcome = tried(make_memory().save, name)
    else:
        outcome = tried(lambda: Checkpoint(name, "x").save(Snapshot({"t": torch.zeros(1)})))
    assert outcome.error is not None
    assert [entry.name for entry in tmp_path.iterdir()] == ["memory.safetensors"]


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)
def test_a_path_that_cannot_be_read_is_refused(tried, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert tried(ExemplarMemory.load, name).error is not None


# States of interrupted condensations


IMAGES = torch.arange(6 * 32, dtype=torch.uint8).view(6, 2, 4, 4)
CLASSES = torch.arange(6) % 2


class EndlessError(Exception):
    """A loop that should have ended."""


@dataclass(frozen=True)
class Bounded:
    """A network learns nothing between pixel steps, of which there must be an end."""

    calls: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, apprentice, pixels):
        self.calls.append(None)
        if len(self.calls) > 20:
            raise EndlessError


UPDATE = Bounded()
CONDENSER = replace(
    recipes.idc(network=convnet_for((2, 4, 4), width=2), outer=3, inner=2),
    update=UPDATE,
    precision="float32",
    warm_up=0,
)


def condense(path):
    UPDATE.calls.clear()
    generator = torch.Generator().manual_seed(3)
    found = CONDENSER.condense(IMAGES, CLASSES, quotas=2, generator=generator, checkpoint=path)
    return found.exemplars.pixels.numpy().tobytes()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The bytes of the state after the first of three networks, and the result in the end."""
    path, states = tmp_path_factory.mktemp("state") / "state", []
    save = Checkpoint.save

    def note(checkpoint, snapshot):
        save(checkpoint, snapshot)
        states.append(path.read_bytes())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "SHARE", math.inf)
        patched.setattr(Checkpoint, "save", note)
        result = condense(path)
    assert len(states) == 3
    return states[0], result


@pytest.fixture
def read_state(interrupted, tried, path):
    """Reads a state of these bytes, without going on from it; gives it, or None if refused."""
    fingerprint = json.loads(apart(interrupted[0])[0])["__metadata__"]["fingerprint"]

    def run(data):
        path.write_bytes(data)
        snapshot, error = tried(Checkpoint(path, fingerprint).load, torch.device("cpu"))
        if error is not None:
            assert type(error) is ArgumentError and "`checkpoint` is " in str(error)
            return None
        assert sum(tensor.nbytes for tensor in snapshot.tensors.values()) <= len(data)
        assert type(snapshot.values) is dict
        return snapshot

    return run


def test_a_state_that_is_whole_is_gone_on_from(interrupted, path, tried):
    path.write_bytes(interrupted[0])
    assert tried(condense, path).value == interrupted[1]
    assert len(UPDATE.calls) == 4  # of 6, two were done


def test_a_state_cut_or_extended_anywhere_is_refused(interrupted, read_state, long):
    data = interrupted[0]
    assert read_state(data) is not None
    for size in range(0, len(data), 7 if long else 31):
        assert read_state(data[:size]) is None
        assert read_state(data[size:]) is None or size == 0
    for more in (b"\0", bytes(8), data):
        assert read_state(data + more) is None


def test_a_state_with_a_bit_flipped_in_its_header_can_be_read_or_is_refused(
    interrupted, read_state, long
):
    header = 8 + len(apart(interrupted[0])[0])
    for position in range(0, header, 1 if long else 5):
        read_state(flipped(interrupted[0], position, 1 << position % 7))


@CAMPAIGN
@given(st.data())
def test_a_state_with_damage_of_any_kind_can_be_read_or_is_refused(interrupted, read_state, data):
    for _ in range(3):
        read_state(data.draw(damaged(interrupted[0])))


def with_values(change):
    """A state with other values; ``change`` is given them."""

    def changed(data):
        values = json.loads(json.loads(apart(data)[0])["__metadata__"]["values"])
        change(values)
        return with_metadata(data, values=json.dumps(values))

    return changed


STATES = {
    "no values": lambda data: with_metadata(data, values=None),
    "values that are no JSON": lambda data: with_metadata(data, values="{"),
    "values in a list": lambda data: with_metadata(data, values="[]"),
    "a number too long": lambda data: with_metadata(
        data, values='{"own.outer": ' + "9" * 5000 + "}"
    ),
    "no fingerprint": lambda data: with_metadata(data, fingerprint=None),
    "another version": lambda data: with_metadata(data, version="0"),
    "another format": lambda data: with_metadata(data, format="dc-replay-memory"),
    "a header that lies": lambda data: with_tensor(data, "own.pixels.0", shape=[2**62, 2, 4, 4]),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_state_that_lies_is_refused(interrupted, read_state, change):
    assert read_state(change(interrupted[0])) is None


def test_values_nested_too_deep_are_refused(interrupted, read_state):
    assert read_state(with_metadata(interrupted[0], values=nested(100_000))) is None


def test_tensors_of_a_state_may_be_at_odd_places(interrupted, read_state):
    for spaces in range(1, 9):
        read_state(together(apart(interrupted[0])[0] + b" " * spaces, apart(interrupted[0])[1]))


def value_of(name, value):
    return with_values(lambda values: values.update({name: value}))


def without_value(name):
    return with_values(lambda values: values.pop(name))


def tensor_renamed(old, new):
    return lambda data: edited(data, lambda fields: fields.update({new: fields.pop(old)}))


RESUMED = {
    "no number of steps": without_value("pace.done"),
    "steps that are no number": value_of("pace.done", "x"),
    "steps that are not a number": value_of("pace.done", math.nan),
    "steps below 0": value_of("pace.done", -(10**9)),
    "steps without end": value_of("pace.done", math.inf),
    "no number of networks": without_value("own.outer"),
    "networks that are no number": value_of("own.outer", None),
    "no generator": tensor_renamed("own.generator", "own.other"),
    "no pixels": tensor_renamed("own.pixels.0", "own.other"),
    "pixels of another class": tensor_renamed("own.pixels.1", "own.pixels.2"),
    "no distances": tensor_renamed("own.distances", "own.other"),
    "pixels of another shape": dishonest("own.pixels.0", shape=[4, 2, 4, 2]),
    "pixels of another type": dishonest("own.pixels.0", dtype="I32"),
    "a generator of another type": dishonest("own.generator", dtype="I8"),
    "momentum of another shape": dishonest("own.momentum.0", shape=[4, 2, 4, 2]),
}


@pytest.mark.parametrize("change", RESUMED.values(), ids=RESUMED)
def test_going_on_from_a_state_that_lies_is_refused(interrupted, path, tried, change):
    path.write_bytes(change(interrupted[0]))
    assert type(tried(condense, path).error) is ArgumentError


def test_going_on_from_a_damaged_state_is_refused_or_ends_with_the_same_bytes(
    interrupted, path, tried, long
):
    data, result = interrupted
    header = 8 + len(apart(data)[0])
    steps = (1, 13) if long else (41, 499)
    for position in [*range(8, header, steps[0]), *range(header, len(data), steps[1])]:
        path.write_bytes(flipped(data, position, 1 << position % 7))
        found, error = tried(condense, path)
        assert error is not None or found == result, f"byte {position} was changed without notice"
