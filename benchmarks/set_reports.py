"""Reports of the benchmarks that train on one condensed set: cut to sizes, or by method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import Method
from benchmarks.methods import method as named_method
from benchmarks.pictures import line_plot, seconds_plot, step_plot
from benchmarks.results import ResultStore, Row
from benchmarks.summary import accuracy_on
from benchmarks.tables import environment_table, markdown_table, measured_on, percent, text_table
from dc_replay.errors import ArgumentError


def write_set_report(out_dir: str | Path) -> str:
    """Make the plots and ``report.md`` of whichever benchmark wrote a folder.

    Raises:
        ArgumentError: If the folder has no results.
    """
    if "size" in _accuracies(ResultStore(out_dir))[0]:
        return write_shrink_report(out_dir)
    return write_training_report(out_dir)


def write_shrink_report(out_dir: str | Path) -> str:
    """Make ``shrink.png``, ``prefixes.png`` and ``report.md``; return the terminal table.

    Raises:
        ArgumentError: If the folder has no results.
    """
    store = ResultStore(out_dir)
    rows = _accuracies(store)
    lines = _by_size(rows)
    settings, last = store.settings(), rows[-1]
    line_plot(
        lines,
        store.out_dir / "shrink.png",
        title=f"{last['data']}, {settings['classes'] or 'all'} classes: {settings['recipe']} "
        f"at {settings['ipc']} images per class, cut to smaller sizes",
        subtitle=f"{last['network']}, preset {last['preset']}, {_seeds(rows)}",
        xlabel="stored images per class",
        ylabel=accuracy_on(last["data"]),
    )
    chosen = {
        f"seed {row['seed']}": row["prefix_sizes"]
        for row in store.rows()
        if row["kind"] == "set" and row["prefix_sizes"]
    }
    parts = ["# One condensation, cut to smaller sizes", "![Accuracy by size](shrink.png)"]
    header, body = shrink_table(rows)
    parts += [_shrink_explanation(rows, settings), markdown_table(header, body)]
    if chosen:
        step_plot(
            chosen,
            store.out_dir / "prefixes.png",
            xlabel="period",
            ylabel="stored images in the matched prefix",
        )
        parts += [
            "## Which prefix was matched besides the whole\n\n"
            "![The prefix of each period](prefixes.png)"
        ]
    return _write(store, parts, header, body)


def _by_size(rows: Sequence[Row]) -> dict[str, dict[int, list[float]]]:
    lines: dict[str, dict[int, list[float]]] = {row["method"]: {} for row in rows}
    for row in sorted(rows, key=lambda row: (row["size"], row["seed"])):
        lines[row["method"]].setdefault(row["size"], []).append(row["accuracy"])
    return lines


def shrink_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines of accuracy by method and size, with the mean over sizes up to 5."""
    sizes = sorted({row["size"] for row in rows})
    small = [size for size in sizes if size <= 5]
    header = (
        "method",
        *(f"{size} per class" for size in sizes),
        f"mean of {', '.join(map(str, small))}",
    )
    body = []
    for name, line in _by_size(rows).items():
        seeds = {row["seed"] for row in rows if row["method"] == name}
        own = {(r["seed"], r["size"]): r["accuracy"] for r in rows if r["method"] == name}
        means = [
            statistics.fmean(own[seed, size] for size in small)
            for seed in sorted(seeds)
            if small and all((seed, size) in own for size in small)
        ]
        cells = [percent(line.get(size, ())) for size in sizes]
        body.append((name, *cells, percent(means)))
    return header, body


_KINDS = {
    "mdc": "`mdc` keeps the first images of a set condensed with multisize condensation",
    "prefix": "`prefix` keeps those of a set condensed without it",
    "k-means": "`k-means` chooses among the images of that set",
    "separate": "`separate` condenses anew at each size",
}


def _shrink_explanation(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    sizes = sorted({row["size"] for row in rows})
    kinds = [_KINDS[name] for name in dict.fromkeys(row["method"] for row in rows)]
    return (
        f"{rows[-1]['data']}, {settings['classes'] or 'all'} classes: accuracy in percent of a "
        f"fresh network trained on what is stored, {', '.join(map(str, sizes))} images per class "
        f"of {settings['recipe']} condensed at {settings['ipc']}; {_seeds(rows)}. "
        f"{'; '.join(kinds)}. Every network is trained for {settings['set_steps']:,} gradient "
        f"steps with the same augmentation."
    )


def write_training_report(out_dir: str | Path) -> str:
    """Make ``report.md`` of methods side by side; return the terminal table.

    Where methods have several numbers of matching networks (``+outer=1``, ``+outer=2`` and so on)
    or of steps with each (``+inner``) makes ``seconds.png``, too: accuracy over the seconds of
    condensing, for the largest set and the first of the networks that are trained.

    Raises:
        ArgumentError: If the folder has no results.
    """
    store = ResultStore(out_dir)
    rows = _accuracies(store)
    header, body = training_table(rows)
    title = f"{rows[-1]['data']}: fresh networks trained on condensed sets"
    parts = [
        f"# {title}",
        _training_explanation(rows, store.settings()),
        markdown_table(header, body),
    ]
    drawn = _of_one_set(rows)
    lines = seconds_lines(drawn)
    if lines:
        seconds_plot(
            lines,
            store.out_dir / "seconds.png",
            title=title,
            subtitle=f"{store.settings()['classes'] or 'all'} classes, {drawn[0]['ipc']} stored of "
            f"each, {drawn[0]['network']}, preset {drawn[0]['preset']}, {_seeds(drawn)}",
            xlabel="seconds to condense",
            ylabel="accuracy of a fresh network",
        )
        parts.append("![Accuracy over the seconds to condense](seconds.png)")
    return _write(store, parts, header, body)


def _of_one_set(rows: Sequence[Row]) -> list[Row]:
    """Those of the largest set and of the first of the networks that are trained."""
    largest, network = max(row["ipc"] for row in rows), rows[0]["network"]
    return [row for row in rows if (row["ipc"], row["network"]) == (largest, network)]


def seconds_lines(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Accuracies by method and seconds of condensing, where some differ in how long they are.

    Args:
        rows: Accuracies of sets of one size and of one network.

    Returns:
        For each method without its ``+outer`` and ``+inner``, and without its ``+lr`` where no two
        rates have the same steps, by the least seconds that one of the seeds took and in their
        order, the accuracies of all seeds. Empty if these tell no two apart.
    """
    names = _lines_of(list(dict.fromkeys(row["method"] for row in rows)))
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(names[row["method"]], {}).setdefault(row["method"], []).append(row)
    if all(len(lengths) == 1 for lengths in found.values()):
        return {}
    lines: dict[str, dict[float, list[float]]] = {}
    for name, lengths in found.items():
        line = lines[name] = {}
        seconds = {m: min(row["condense_seconds"] for row in own) for m, own in lengths.items()}
        for method in sorted(lengths, key=seconds.__getitem__):
            values = line.setdefault(seconds[method], [])
            values += [row["accuracy"] for row in lengths[method]]
    return lines


_LENGTH = ("outer", "inner")


def _lines_of(names: Sequence[str]) -> dict[str, str]:
    """The line that each method belongs to: the same recipe, for longer or shorter."""
    recipes: dict[str, list[Method]] = {}
    for method in map(named_method, names):
        recipes.setdefault(method.without(*_LENGTH, "lr"), []).append(method)
    lines: dict[str, str] = {}
    for recipe, own in recipes.items():
        lengths = [{m: value for m, value in one.modifiers if m in _LENGTH} for one in own]
        # More steps want a smaller rate; rates for the same steps are compared with each other.
        alone = all(lengths.count(length) == 1 for length in lengths)
        lines |= {one.name: recipe if alone else one.without(*_LENGTH) for one in own}
    return lines


def _training_explanation(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    runs = len({row["run"] for row in rows})
    return (
        f"{rows[-1]['data']}, {settings['classes'] or 'all'} classes: accuracy in percent of fresh "
        f"networks trained on condensed sets; {_seeds(rows)} and "
        f"{'one network' if runs == 1 else f'{runs} networks'} for each. Every "
        f"network is trained for {settings['set_steps']:,} gradient steps with the same "
        f"augmentation. Seconds to condense are the least that were measured."
    )


def training_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines of accuracy by method and network, one column for each size."""
    ipcs = sorted({row["ipc"] for row in rows})
    keys = dict.fromkeys((row["method"], row["network"]) for row in rows)
    largest = ipcs[-1]
    header = (
        "method",
        "network",
        *(f"{ipc} per class" for ipc in ipcs),
        f"condense s at {largest}",
    )
    body = []
    for name, network in keys:
        own = [row for row in rows if (row["method"], row["network"]) == (name, network)]
        cells = [percent([row["accuracy"] for row in own if row["ipc"] == ipc]) for ipc in ipcs]
        seconds = [row["condense_seconds"] for row in own if row["ipc"] == largest]
        body.append((name, network, *cells, f"{min(seconds):,.0f}" if seconds else ""))
    return header, body


def set_section(store: ResultStore) -> str:
    """Write the table of a run for a longer page: what was measured, the figures, the command.

    Raises:
        ArgumentError: If the folder has no results.
    """
    rows = _accuracies(store)
    if "size" in rows[0]:
        explanation, table = _shrink_explanation(rows, store.settings()), shrink_table(rows)
    else:
        explanation, table = _training_explanation(rows, store.settings()), training_table(rows)
    command = "\n".join(store.commands())
    return "\n\n".join(
        (
            explanation,
            markdown_table(*table),
            measured_on(rows),
            f"```sh\n{command}\n```",
        )
    )


def _accuracies(store: ResultStore) -> list[Row]:
    rows = [row for row in store.rows() if row["kind"] == "accuracy"]
    if not rows:
        raise ArgumentError(
            f"{str(store.path)!r} holds no results; name the folder that a benchmark was told to "
            f"write to"
        )
    return rows


def _seeds(rows: Sequence[Row]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    if len(seeds) == 1:
        return f"one seed ({seeds[0]})"
    return f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"


def _write(
    store: ResultStore, parts: Sequence[str], header: Sequence[str], body: Sequence[Sequence[str]]
) -> str:
    command = "\n".join(store.commands()) or "unknown"
    settings: Mapping[str, Any] = store.settings()
    cells = [(f"`{name}`", f"`{value}`") for name, value in settings.items()]
    text = [
        *parts,
        f"## Command\n\n```sh\n{command}\n```",
        "## Settings\n\n" + markdown_table(("setting", "value"), cells),
        "## Environment\n\n" + environment_table(_accuracies(store)),
    ]
    (store.out_dir / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return text_table(header, body)
