"""The tables of README and docs: each block of a page, made from the results of one or more experiments."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from figures.cells import MINUS, bounded, figure, of, study_rows, table
from figures.experiments import EXPERIMENTS, costs
from layerfold.report import numerals

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        experiments: what it shows, by name.
        write: returns the Markdown, given the results.
    """

    experiments: tuple[str, ...]
    write: Callable[..., str]

    def text(self) -> str:
        """Return the Markdown, and below it the commands that made the figures."""
        found = {name: EXPERIMENTS[name].stored() for name in self.experiments}
        absent = [name for name, result in found.items() if result is None]
        if absent:
            return f"*Not measured yet with this version: `python -m figures run {' '.join(absent)}`.*"
        stale = [name for name in self.experiments if not EXPERIMENTS[name].up_to_date()]
        if not self.experiments:
            return self.write()
        commands = ", ".join(f"`{EXPERIMENTS[name].command}`" for name in self.experiments)
        said = f"Made by {commands}."
        if stale:
            said += f" Made by an earlier version: `python -m figures run {' '.join(stale)}` makes it again."
        return f"{self.write(*found.values())}\n\n{said}"


BLOCKS: dict[str, Block] = {}
"""By the name in a page."""


def block(name: str, *experiments: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register what writes a block."""

    def register(write: Callable[..., str]) -> Callable[..., str]:
        BLOCKS[name] = Block(tuple(filter(None, experiments or (name,))), write)
        return write

    return register


PERPLEXITY = {"perplexity": "perplexity", "perplexity_ratio": "× base"}
SIZES = {"parameters": "parameters", "nonzero_parameters": "non-zero"}
SPEED = {"speedup": "speed-up"}

# README


@block("results", "demo")
def _results(demo: Found) -> str:
    labels = {
        "base": "base",
        "pruned_104M": "pruned_104M: 84.13 % of the parameters non-zero, by magnitude",
        "shared_4x8": "shared_4x8: one FFN for four blocks, deltas of rank 8",
        "repaired_drop_6": "repaired_drop_6: every second block dropped, the others repaired",
        "distilled_drop_6": "distilled_drop_6: the same, then distilled on 16,384 tokens",
        "merged_2": "merged_2: FFNs averaged in pairs",
        "compressed_2": "compressed_2: blocks averaged in pairs",
    }
    return study_rows(demo, {**SIZES, **PERPLEXITY, **SPEED}, labels, "variant of pocket")


@block("samples", "demo")
def _samples(demo: Found) -> str:
    sample = demo["samples"][0]
    rows = [
        [label, *(" ".join(texts[choice].split()).replace("|", "\\|") for choice in ("greedy", "sampled"))]
        for label, texts in sample["texts"].items()
    ]
    return f'After "{sample["prompt"]}":\n\n' + table(["", "greedy", "sampled"], rows)


@block("plot", "quality")
def _plot(found: Found) -> str:
    return "![perplexity against parameters, by method](docs/plots/quality.svg)"


# Studies


@block("published-rows", "published")
def _published_rows(found: Found) -> str:
    return study_rows(found, {**SIZES, **PERPLEXITY, **SPEED, "repeated_4grams": "repeated 4-grams"}, first="variant")


@block("published-beside", "full")
def _published_beside(full: Found) -> str:
    """The published figures beside ours, row by row."""
    published = {name: _published(name) for name in ("parameters", "perplexity", "latency", "imdb_accuracy", "rouge")}
    names = {"gpt2": "base", "distilgpt2": "distilled"}
    rows = []
    for name in dict.fromkeys(row for table_ in published.values() for row in table_):
        ours = full["rows"].get(names.get(name, name))
        if ours is None:
            continue
        theirs = {
            "parameters": published["parameters"].get(name, {}).get("parameters_millions", ""),
            "perplexity": published["perplexity"].get(name, {}).get("perplexity", ""),
            "speedup": published["latency"].get(name, {}).get("speedup_vs_gpt2", ""),
            "imdb_accuracy": published["imdb_accuracy"].get(name, {}).get("accuracy_percent", ""),
            "rougel": published["rouge"].get(name, {}).get("rougeL", ""),
        }
        cells = [f"{theirs['parameters']}M" if theirs["parameters"] else "", figure(ours, "parameters")]
        for column in ("perplexity", "speedup", "imdb_accuracy"):
            cells += [theirs[column], "" if column == "speedup" and name == "gpt2" else figure(ours, column)]
        rouge = f"{float(theirs['rougel']):.1%}" if theirs["rougel"] else ""
        rows.append([name, *cells, rouge, figure(ours, "rougel")])
    pairs = ("parameters", "perplexity", "speed-up", "accuracy, %", "ROUGE-L")
    return table(["variant", *(head for name in pairs for head in (f"{name}, published", "ours"))], rows)


def _published(name: str) -> dict[str, dict[str, str]]:
    text = files("layerfold").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    return {next(iter(row.values())): row for row in csv.DictReader(text.splitlines())}


@block("full")
def _full(full: Found) -> str:
    columns = {
        **SIZES, "perplexity_before": "perplexity before", "perplexity": "after", "latency_ms": "ms/token", **SPEED,
        "imdb_accuracy": "accuracy", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougel": "ROUGE-L",
    }  # fmt: skip
    return study_rows(full, columns, first="variant")


@block("imdb-rows", "imdb_rows")
def _imdb_rows(found: Found) -> str:
    labels = {"base": "pocket, head and body", "bag of words": "bag of words"}
    columns = {"imdb_accuracy": "accuracy", "imdb_difference": "less pocket's"}
    return study_rows(found, columns, {k: v for k, v in labels.items() if k in found["rows"]})


@block("tasks-seeds", "tasks_seeds")
def _tasks_seeds(found: Found) -> str:
    return study_rows(found, {"imdb_accuracy": "accuracy"})


# Merging and collapsing


@block("merge-averaging", "merge")
def _merge_averaging(found: Found) -> str:
    labels = (
        "base", "merged_2", "merged_2 unaligned", "merged_4", "merged_4 to the middle block",
        "merged_4 to the last block", "merged_4 unaligned", "compressed_2", "compressed_2 unaligned",
    )  # fmt: skip
    return study_rows(found, PERPLEXITY, {label: label for label in labels})


@block("merge-groups", "merge")
def _merge_groups(found: Found) -> str:
    rows = []
    for label in ("merged_2", "merged_2 searched", "compressed_2", "compressed_2 searched"):
        both = f"{label} and repaired" if "searched" in label else f"{label} repaired"
        own, repaired = found["rows"][label], found["rows"][both]
        rows.append(
            [
                label,
                figure(own, "parameters"),
                figure(own, "perplexity"),
                figure(repaired, "perplexity"),
                figure(repaired, "perplexity_ratio"),
            ]
        )
    for label in ("pairs 1-10 merged", "pairs 1-10 collapsed"):
        own = found["rows"][label]
        rows.append([label, figure(own, "parameters"), figure(own, "perplexity"), "", ""])
    base = found["rows"]["base"]
    rows.insert(0, ["base", figure(base, "parameters"), figure(base, "perplexity"), "", ""])
    return table(["", "parameters", "perplexity", "after `refit+attention`", "× base"], rows)


# Dropping


@block("drop-best", "drop-best")
def _drop_best(found: Found) -> str:
    base = found["base"]
    rows = [["none", f"{base['blocks']}", numerals.count(base["parameters"]), numerals.precise(base["perplexity"]),
             of(base["test"]["perplexity"]), ""]]  # fmt: skip
    for best in found["best"].values():
        test = best["test"]
        rows.append(
            [
                _blocks(best["removed"]),
                f"{best['blocks']}",
                numerals.count(best["parameters"]),
                numerals.precise(best["perplexity"]),
                of(test["perplexity"]),
                of(test["versus_base"], numerals.times),
            ]
        )
    head = ["removed", "blocks left", "parameters", "selection perplexity", "test perplexity", "× base"]
    return table(head, rows)


@block("plot-one-block", "drop-sets")
def _plot_one_block(found: Found) -> str:
    return "![perplexity without each block](plots/one-block.svg)"


@block("drop-single", "drop-sets")
def _drop_single(found: Found) -> str:
    theirs = _published("layer_drop_sequential")
    base = found["base"]
    rows = [["none", numerals.precise(base["perplexity"]), "", "0.000", "", *_theirs(theirs, "none")]]
    for each in sorted(found["candidates"]["1"], key=lambda each: int(each["removed"][0])):
        name = _blocks(each["removed"])
        rows.append([name, *_ours(each), "", *_theirs(theirs, name)])
    head = ["removed", "pocket: perplexity", "change", "KL, nats", "", "published: removed", "perplexity", "change"]
    return table(head, rows)


@block("drop-sets", "drop-sets")
def _drop_sets(found: Found) -> str:
    theirs = _published("layer_drop_combinatorial")
    published = [name for name in theirs if name != "none"]
    ours = [each for number in ("2", "3") for each in found["candidates"][number]]
    rows = []
    for index in range(max(len(published), len(ours))):
        own = [_blocks(ours[index]["removed"]), *_ours(ours[index])] if index < len(ours) else [""] * 4
        rows.append([*own, "", *(_theirs(theirs, published[index]) if index < len(published) else [""] * 3)])
    head = ["removed", "pocket: perplexity", "change", "KL, nats", "", "published: removed", "perplexity", "change"]
    return table(head, rows)


def _ours(each: Found) -> list[str]:
    change = numerals.change(each["perplexity_change_percent"])
    return [numerals.precise(each["perplexity"]), change, f"{each['kl']:.3f}"]


def _theirs(theirs: Mapping[str, Mapping[str, str]], name: str) -> list[str]:
    if name not in theirs:
        return ["", "", ""]
    row = theirs[name]
    change = "" if name == "none" else numerals.change(float(row["perplexity_change_percent"]))
    return [name, f"{float(row['perplexity']):,.2f}", change]


def _blocks(removed: Sequence[int]) -> str:
    return " ".join(map(str, removed))


@block("drop-parts", "drop")
def _drop_parts(found: Found) -> str:
    return study_rows(found, {"blocks": "blocks", "parameters": "parameters", **PERPLEXITY}, first="removed")


# Pruning


@block("prune-criteria", "prune")
def _prune_criteria(found: Found) -> str:
    labels = {
        "base": "base",
        "pruned_104M": "pruned_104M: 84.13 % of the parameters, magnitude",
        "pruned_104M_by_matrix": "the same, matrix by matrix",
        "pruned_104M_wanda": "the same, wanda",
        "pruned_104M_sparsegpt": "the same, sparsegpt",
        "published_51": "published_51: every `nn.Linear` at 0.51",
        "published_104M": "published_104M: every `nn.Linear`, to 84.13 % of the parameters",
        "half_magnitude": "half of the weights, magnitude",
        "half_magnitude_by_matrix": "half, magnitude, matrix by matrix",
        "half_wanda": "half, wanda",
        "half_wanda_global": "half, wanda, one threshold",
        "half_wanda_by_matrix": "half, wanda, matrix by matrix",
        "half_sparsegpt": "half, sparsegpt",
        "2:4_magnitude": "2:4, magnitude",
        "2:4_wanda": "2:4, wanda",
        "2:4_sparsegpt": "2:4, sparsegpt",
        "neurons_25_magnitude": "a quarter of the neurons, magnitude",
        "neurons_25_wanda": "a quarter, wanda",
        "neurons_25_wanda_global": "a quarter, wanda, over all FFNs together",
        "neurons_25_sparsegpt": "a quarter, sparsegpt",
    }
    return study_rows(found, {"nonzero_parameters": "non-zero", **PERPLEXITY}, labels)


@block("taylor")
def _taylor(found: Found) -> str:
    rows = []
    for removed, ranked, label in (
        ("neurons", "wanda, over all FFNs", "neurons wanda"),
        ("neurons", "effect on the loss (taylor)", "neurons taylor"),
        ("neurons and heads", "the same", "neurons+heads taylor"),
    ):
        own, repaired = (found["rows"][name] for name in (label, f"{label} repaired"))
        cells = figure(own, "perplexity"), figure(repaired, "perplexity"), figure(repaired, "perplexity_ratio")
        rows.append([removed, ranked, *cells])
    return table(["removed", "ranked by", "unrepaired", "`refit+attention`", "× base"], rows)


@block("prune-recovered", "pruned_104M")
def _prune_recovered(found: Found) -> str:
    columns = {"nonzero_parameters": "non-zero", "perplexity_before": "before", "perplexity": "after",
               "perplexity_ratio": "× base"}  # fmt: skip
    return study_rows(found, columns)


@block("speed")
def _speed(found: Found) -> str:
    return study_rows(found, {"parameters": "parameters", "latency_ms": "ms/token", **SPEED})


# Sharing


@block("windows")
def _windows(found: Found) -> str:
    rows = [
        [
            f"`{best['window']}`",
            f"{MINUS}{-best['parameters_change_percent']:.1f} %",
            numerals.precise(best["perplexity"]),
            of(best["test"]["perplexity"]),
            of(best["test"]["versus_base"], numerals.times),
        ]
        for best in sorted(found["best"].values(), key=lambda each: len(each["blocks"]))
    ]
    return table(["window", "parameters", "selection perplexity", "test perplexity", "× base"], rows)


@block("share-forms", "share_forms")
def _share_forms(found: Found) -> str:
    rows = []
    for base in ("anchor", "mean", "fitted"):
        cells = (figure(found["rows"][f"{base} {init}"], "perplexity") for init in ("zero", "svd", "data-svd"))
        rows.append([base, *cells])
    return table(["base", "zero", "svd", "data-svd"], rows)


@block("share-ranks", "share_forms")
def _share_ranks(found: Found) -> str:
    labels = {
        "rank 2": "rank 2",
        "fitted data-svd": "rank 8",
        "fitted data-svd allotted": "rank 8, allotted",
        "unaligned": "rank 8, unaligned",
        "rank 16": "rank 16",
        "rank 32": "rank 32",
        "rank 64": "rank 64",
    }
    return study_rows(found, {"parameters": "parameters", "removed_fraction": "removed", **PERPLEXITY}, labels)


@block("share-equal", "share")
def _share_equal(found: Found) -> str:
    columns = {"removed_fraction": "removed", "perplexity_before": "before", "perplexity": "after distillation",
               "perplexity_ratio": "× base"}  # fmt: skip
    return study_rows(found, columns)


@block("share-lowrank", "share_lowrank")
def _share_lowrank(found: Found) -> str:
    return study_rows(found, {"removed_fraction": "removed", **PERPLEXITY})


# Repair and recovery


@block("repair-levels", "repair")
def _repair_levels(found: Found) -> str:
    rows = []
    for title, label, levels in (
        ("every second block dropped", "drop_6", ("", "refit", "refit+attention")),
        ("blocks found by search dropped", "searched", ("", "refit+attention")),
        ("compressed_2", "compressed_2", ("", "rescale", "refit", "refit+attention")),
        ("merged_2, tied", "merged_2 tied", ("", "rescale", "refit", "refit+attention")),
        ("half of the neurons, by wanda", "half the neurons", ("", "refit", "refit+attention")),
        ("shared_4x8", "shared", ("", "refit", "refit+attention")),
    ):
        of_level = {level: found["rows"][f"{label} {level}".strip()] for level in levels}
        cells = [
            figure(of_level[level], "perplexity") if level in of_level else ""
            for level in ("", "rescale", "refit", "refit+attention")
        ]
        ratio = figure(of_level["refit+attention"], "perplexity_ratio")
        rows.append([title, figure(of_level[""], "parameters"), *cells, ratio])
    return table(["", "parameters", "unrepaired", "rescale", "refit", "refit+attention", "× base"], rows)


@block("repair-searched", "drop-repaired", "repair")
def _repair_searched(search: Found, repair: Found) -> str:
    (best,) = search["best"].values()
    rows = [
        ["1 3 5 7 9 11", "no search: every second block", figure(repair["rows"]["drop_6"], "perplexity"),
         figure(repair["rows"]["drop_6 refit+attention"], "perplexity")],
        [_blocks(best["removed"]), "perplexity after a repair", figure(repair["rows"]["searched"], "perplexity"),
         figure(repair["rows"]["searched refit+attention"], "perplexity")],
    ]  # fmt: skip
    return table(["dropped", "chosen by", "unrepaired", "repaired"], rows)


@block("recovery")
def _recovery(found: Found) -> str:
    return study_rows(found, {"parameters": "parameters", **PERPLEXITY})


# Plans and peers


@block("plan-trials", "plan")
def _plan_trials(found: Found) -> str:
    tried: dict[str, dict[str, Any]] = {}
    for trial in found["trials"]:
        row = {name: value for name, value in trial["row"].items() if name != "repair"}
        if not row or trial.get("whole"):
            continue
        entry = tried.setdefault(_change(row), {"parameters": trial["parameters"]})
        entry["repaired" if trial["row"].get("repair", "none") != "none" else "unrepaired"] = trial["perplexity"]
    ordered = sorted(tried.items(), key=lambda item: -item[1]["parameters"])
    rows = [
        [change, numerals.count(entry["parameters"]),
         *(numerals.precise(entry[name]) if name in entry else "" for name in ("unrepaired", "repaired"))]
        for change, entry in ordered
    ]  # fmt: skip
    return table(["change", "parameters", "unrepaired", "repaired"], rows)


def _change(row: Mapping[str, Any]) -> str:
    """Say in words what a candidate of a plan changes."""
    steps = row.get("steps") or [row]
    return "; ".join(_step(*next(iter(step.items()))) for step in steps)


def _step(name: str, config: Mapping[str, Any]) -> str:
    match name:
        case "drop":
            return f"blocks {config['blocks']} dropped"
        case "prune":
            return f"{100 * config['sparsity']:.0f} % of the {config['structure'].replace('+', ' and ')} removed"
        case _:
            settings = ", ".join(f"{key} {value}" for key, value in config.items())
            return f"{name}: {settings}"


@block("plan-winner", "plan")
def _plan_winner(found: Found) -> str:
    return _winner(found)


@block("plan-speed", "plan-speed")
def _plan_speed(found: Found) -> str:
    return _winner(found)


def _winner(found: Found) -> str:
    winner, base = found["winner"], found["base"]
    speed = of(winner["speedup"], numerals.times) if "speedup" in winner else ""
    rows = [
        ["the model", numerals.count(base["parameters"]), of(base["test"]["perplexity"]), "", ""],
        [_change({k: v for k, v in winner["row"].items() if k != "repair"}), numerals.count(winner["parameters"]),
         of(winner["test"]["perplexity"]), of(winner["test"]["versus_base"], numerals.times), speed],
    ]  # fmt: skip
    head = ["", "parameters", "test perplexity", "× base", "speed-up"]
    keep = len(head) if speed else len(head) - 1
    return table(head[:keep], [row[:keep] for row in rows])


@block("quality")
def _quality(found: Found) -> str:
    return _by_size(found, "perplexity")


@block("plot-quality", "quality")
def _plot_quality(found: Found) -> str:
    return "![perplexity against parameters, by method](plots/quality.svg)"


@block("plot-quality-smollm2", "quality-smollm2")
def _plot_quality_smollm2(found: Found) -> str:
    return "![perplexity against parameters, SmolLM2-135M](plots/quality-smollm2.svg)"


@block("quality-recovered", "quality")
def _quality_recovered(found: Found) -> str:
    return _by_size(found, "recovered", intervals=True)


@block("quality-smollm2")
def _quality_smollm2(found: Found) -> str:
    return _by_size(found, "perplexity")


def _by_size(found: Found, name: str, intervals: bool = False) -> str:
    """Write methods by sizes; the lowest of a size is bold, among all and among those that hold no zeros."""
    base, *rows = found["rows"]
    place = {(row["method"], row["kept"]): row for row in rows}
    sizes = [int(kept) for kept in found["sizes"] if any(name in row for row in rows if row["kept"] == int(kept))]
    bold = {
        (min(allowed, key=lambda row: row[name]["value"])["method"], kept)
        for kept in sizes
        for zeros in (False, True)
        if (allowed := [*_of_size(found, rows, kept, name, zeros)])
    }
    written = [["parameters, millions", *(f"{found['sizes'][str(kept)] / 1e6:.2f}" for kept in sizes)]]
    for method, about in found["methods"].items():
        cells = []
        for kept in sizes:
            row = place.get((method, kept), {})
            text = "" if name not in row else _size_cell(row[name], intervals)
            cells.append(f"**{text}**" if (method, kept) in bold else text or "–")
        written.append([about["title"] + (" (zeros)" if about["zeros"] else ""), *cells])
    ratios = []
    for kept in sizes:
        value, low, high = place["layerfold", kept][name]["over base"]
        ratios.append(bounded(value, low, high, numerals.times))
    written.insert(2, ["× base", *ratios])
    said = f"Base: {bounded(*(base['perplexity'][each] for each in ('value', 'low', 'high')))}."
    lines = table(["size of so many blocks", *map(str, sizes)], written)
    return f"{lines}\n\n{said} {_closest(found, rows, sizes, name)}"


def _size_cell(measured: Mapping[str, Any], intervals: bool) -> str:
    if intervals:
        return of(measured)
    return f"{measured['value']:,.1f}" if measured["value"] < 1000 else f"{measured['value']:,.0f}"


def _of_size(found: Found, rows: Sequence[Found], kept: int, name: str, zeros: bool) -> Iterator[Found]:
    for row in rows:
        if row["kept"] == kept and name in row and (zeros or not found["methods"][row["method"]]["zeros"]):
            yield row


def _closest(found: Found, rows: Sequence[Found], sizes: Sequence[int], name: str) -> str:
    """Say against which methods without zeros the plan's paired interval does not exclude equality."""
    close = []
    for kept in sizes:
        for row in _of_size(found, rows, kept, name, zeros=False):
            over = row[name].get("over plan")
            if over is not None and over[1] <= 1:
                close.append(f"{found['methods'][row['method']]['title']} at {kept}")
    if not close:
        return "Of the methods without zeros, every other one is above the plan by more than the paired 95 % interval."
    return f"Not above the plan by more than the paired 95 % interval: {', '.join(close)}."


# Speed and memory: figures of benchmarks


def _figures(found: Found, rows: Mapping[str, str], head: Sequence[str] = ("", "")) -> str:
    figures = found["figures"]
    return table(head, [[said, numerals.significant(figures[key])] for key, said in rows.items()])


@block("perplexity-speed", "perplexity")
def _perplexity_speed(found: Found) -> str:
    figures, rows = found["figures"], []
    for name in ("layerfold", "loop, batch 1", "loop, batch 4"):
        rate = numerals.significant(figures[f"{name}, fraction of the matrix-product rate"])
        faster = numerals.times(figures[f"layerfold / {name}"]) if name != "layerfold" else ""
        rows.append([name, rate, faster, f"{figures[f'{name}, extra peak MB']:,.0f} MB"])
    return table(["", "fraction of the matrix-product rate", "layerfold is faster by", "extra peak memory"], rows)


@block("alignment-speed", "alignment")
def _alignment_speed(found: Found) -> str:
    figures, rows = found["figures"], []
    for case in [key.removesuffix(": pairs") for key in figures if key.endswith(": pairs")]:
        own = {key.removeprefix(f"{case}: "): value for key, value in figures.items() if key.startswith(case)}
        rows.append(
            [
                case,
                f"{own['pairs']}",
                f"{own['layerfold, s']:.1f}",
                f"{own['published, s']:.1f}",
                numerals.times(own["times faster"]),
                numerals.times(own["published, assignment, s"] / own["layerfold, assignment, s"]),
                f"{own['equal assignment']:.0%}",
            ]
        )
    head = ["", "pairs", "layerfold, s", "published method, s", "times faster", "assignment alone", "equal assignment"]
    return table(head, rows)


@block("memory")
def _memory(found: Found) -> str:
    suffix = ", above it / weights"
    rows = [
        [key.removesuffix(suffix), numerals.times(value)]
        for key, value in found["figures"].items()
        if key.endswith(suffix)
    ]
    return table(["`compress`", "peak memory / weights"], rows)


@block("offload")
def _offload(found: Found) -> str:
    figures = found["figures"]
    rows = [
        [f"`{command}`", *(f"{figures[f'{key}, offload {mode}, above it, MB']:,.0f}" for mode in ("always", "never"))]
        for key, command in (
            ("eval perplexity", "eval --metrics perplexity"),
            ("compress prune, wanda", "compress prune --criterion wanda"),
            ("compress drop, repair refit", "compress drop --repair refit"),
        )
    ]
    return table(["", "`--offload always`, MB", "`--offload never`, MB"], rows)


@block("training")
def _training(found: Found) -> str:
    return _figures(
        found,
        {
            "bare loop, tokens/s": "bare loop, tokens/s",
            "layerfold, tokens/s": "layerfold, tokens/s",
            "layerfold / bare loop": "layerfold / bare loop",
            "layerfold with validation and checkpoints / bare loop": "with validation and checkpoints / bare loop",
        },
    )


@block("drop-speed", "drop-speed")
def _drop_speed(found: Found) -> str:
    figures = found["figures"]
    walk = [numerals.times(figures[f"pocket, walk: {each}"]) for each in ("times faster", "limit by operations")]
    race = numerals.times(figures["pocket, best of each size: times faster"])
    rows = [
        ["walk over all sets, every perplexity exact", *walk],
        ["best set of each size, `--race`", race, ""],
    ]
    return table(["on pocket", "times faster than each set from scratch", "limit by operations"], rows)


@block("drop-regret", "regret")
def _drop_regret(found: Found) -> str:
    figures, rows = found["figures"], []
    for key in figures:
        if not key.endswith(", candidates"):
            continue
        case = key.removesuffix(", candidates")
        first = max(figures[f"{case}, regret without {number}"] for number in range(1, 7))
        most = figures[f"{case}, largest regret"]
        rows.append([case, f"{figures[key]:,}", f"{first:.1%}", f"{most:.1%}"])
    seeds, lost = figures["race, seeds"], figures["race, seeds with regret at any size"]
    read = figures["race, windows scored, of all, median"]
    said = f"Races lost a best set in {lost} of {seeds} orders of the windows, and read {read:.0%} of them (median)."
    head = ["strategy", "candidates", "largest regret, 1 to 6 removed", "1 to 11 removed"]
    return f"{table(head, rows)}\n\n{said}"


@block("prune-speed", "prune-speed")
def _prune_speed(found: Found) -> str:
    figures, rows = found["figures"], []
    case = next(key.partition(": ")[0] for key in figures if key.startswith("gpt2"))
    for name in ("magnitude", "wanda", "sparsegpt"):
        share = numerals.times(figures[f"{case}: {name} / one calibration pass"])
        rows.append([name, share, f"{figures[f'{case}: {name}, extra peak MB']:,.0f} MB"])
    return table(["criterion", "time / one calibration pass", "extra peak memory"], rows)


@block("share-speed", "share-speed")
def _share_speed(found: Found) -> str:
    rows = [
        [key.removesuffix(": times faster"), numerals.times(value)]
        for key, value in found["figures"].items()
        if key.endswith(": times faster")
    ]
    return table(["search for a window", "times faster than each window from scratch"], rows)


@block("repair-speed", "repair-speed")
def _repair_speed(found: Found) -> str:
    rows = [
        [key.removesuffix(" / one calibration pass"), numerals.times(value)]
        for key, value in found["figures"].items()
        if key.endswith(" / one calibration pass")
    ]
    return table(["", "time / one pass of the text through all blocks"], rows)


@block("repair-memory", "repair-speed")
def _repair_memory(found: Found) -> str:
    suffix = ": refit+attention, extra peak MB"
    rows = [[k.removesuffix(suffix), f"{v:,.0f} MB"] for k, v in found["figures"].items() if k.endswith(suffix)]
    return table(["GPT-2 shape", "memory above the weights"], rows)


@block("startup")
def _startup(found: Found) -> str:
    figures = found["figures"]
    rows = [[f"`{key.removesuffix(', s')}`", f"{value:.2f} s"] for key, value in figures.items() if "beyond" not in key]
    return table(["command", "time"], rows)


@block("gpu")
def _gpu(found: Found) -> str:
    figures, rows = found["figures"], []
    for dtype in ("bfloat16", "float32"):
        own = figures["scoring"][dtype]
        batch, plain = max(own["plain loop, tokens/s by batch"].items(), key=lambda item: float(item[1]))
        faster = numerals.times(own["times the plain loop at its best batch"])
        said = f"{plain:,.0f} (loop, batch {batch})"
        rows.append([f"scoring in {dtype}, tokens/s", f"{own['tokens/s']:,.0f}", said, faster])
    own = figures["training"]
    bare = f"{own['bare loop, tokens/s']:,.0f} (bare loop)"
    case = f"recovery in bfloat16, tokens/s, batch {own['batch']} x {own['context']}"
    rate = f"{own['recovery, training alone, tokens/s']:,.0f}"
    rows.append([case, rate, bare, numerals.times(own["recovery / bare loop"])])
    return table([found["environment"]["device"], "layerfold", "the plain way", "ratio"], rows)


@block("gpu-decoding", "gpu")
def _gpu_decoding(found: Found) -> str:
    rows = [
        [name, numerals.significant(each["ms/token"]), numerals.significant(each["captured"]["value"])]
        for name, each in found["figures"]["decoding"].items()
    ]
    return table(["decoding in bfloat16, ms a token", "`generate`", "captured"], rows)


@block("coverage")
def _coverage(found: Found) -> str:
    figures = found["figures"]
    kinds = list(dict.fromkeys(key.split(", ")[0] for key in figures if key.endswith("documents, layerfold")))
    numbers = (4, 8, 16, 32, 64)
    rows = [
        [kind, way, *(f"{figures[f'{kind}, {n} documents, {key}']:.2f}" for n in numbers)]
        for kind in kinds
        for way, key in (("layerfold", "layerfold"), ("Student's t", "t"), ("bootstrap", "bootstrap"))
    ]
    return table(["text", "interval", *(f"{n} documents" for n in numbers)], rows)


@block("coverage-others", "coverage")
def _coverage_others(found: Found) -> str:
    texts = {key.split(", ")[0] for key in found["figures"] if key.endswith("documents, layerfold")}
    rows = [[key, f"{value:.2f}"] for key, value in found["figures"].items() if key.split(", ")[0] not in texts]
    return table(["interval", "covers the true figure"], rows)


@block("race")
def _race(found: Found) -> str:
    figures, rows = found["figures"], []
    for number in (2, 12, 66, 500):
        for said in ("equal but for chance", "spread"):
            case = f"{number} candidates, {said}, normal"
            skewed = f"{number} candidates, {said}, skewed"
            lost = [f"{figures[f'{each}: lost, of all']:.2%}" for each in (case, skewed)]
            rows.append(
                [f"{number}, {said}", f"{figures[f'{number} candidates, searches']:,}", *lost,
                 f"{figures[f'{case}: windows scored, of all']:.0%}"]
            )  # fmt: skip
    return table(["candidates", "searches", "best lost, normal noise", "skewed noise", "windows scored"], rows)


# The experiments themselves


@block("experiments", "")
def _experiments() -> str:
    """Every experiment with its command and what it took."""
    taken = costs()
    rows = []
    for each in EXPERIMENTS.values():
        cost = taken.get(each.name)
        time = "not run yet" if cost is None else f"{cost['minutes']:.0f} min ({cost['processor_minutes']:.0f})"
        if cost is not None and cost["runs"] > 1:
            time += f", the last of {cost['runs']} runs"
        kind = "time, memory" if each.timed else "quality"
        rows.append([each.name, kind, f"{each.minutes:g} min", time, f"`{each.command}`"])
    return table(["experiment", "measures", "estimate", "took (processor time)", "command"], rows)
