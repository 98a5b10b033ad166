"""Blocks of the methods: merge, collapse, drop, prune, share, repair and recover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from figures.blocks.registry import PERPLEXITY, SPEED, Found, block
from figures.cells import MINUS, chosen_blocks, figure, of, published, study_rows, table
from layerfold.report import numerals

# Merging and collapsing


@block("merge-averaging", "merge")
def _merge_averaging(found: Found) -> str:
    labels = (
        "base", "merged_2", "merged_2 unaligned", "merged_4", "merged_4 to the middle block",
        "merged_4 to the last block", "merged_4 unaligned", "compressed_2", "compressed_2 unaligned",
    )  # fmt: skip
    return study_rows(found, PERPLEXITY, {label: label for label in labels})


@block("merge-fitted", "merge_fitted")
def _merge_fitted(found: Found) -> str:
    rows = [["base", figure(found["rows"]["base"], "perplexity"), "", "", ""]]
    for label in ("merged_2", "merged_4", "compressed_2", "compressed_4"):
        both = label, f"{label} fitted"
        repaired = f"{label} repaired", f"{label} fitted and repaired"
        rows.append([label, *(figure(found["rows"][each], "perplexity") for each in (*both, *repaired))])
    return table(["", "mean", "fitted", "mean, repaired", "fitted, repaired"], rows)


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
    theirs = published("layer_drop_sequential")
    base = found["base"]
    rows = [["none", numerals.precise(base["perplexity"]), "", "0.000", "", *_theirs(theirs, "none")]]
    for each in sorted(found["candidates"]["1"], key=lambda each: int(each["removed"][0])):
        name = _blocks(each["removed"])
        rows.append([name, *_ours(each), "", *_theirs(theirs, name)])
    head = ["removed", "pocket: perplexity", "change", "KL, nats", "", "published: removed", "perplexity", "change"]
    return table(head, rows)


@block("drop-sets", "drop-sets")
def _drop_sets(found: Found) -> str:
    theirs = published("layer_drop_combinatorial")
    sets = [name for name in theirs if name != "none"]
    ours = [each for number in ("2", "3") for each in found["candidates"][number]]
    rows = []
    for index in range(max(len(sets), len(ours))):
        own = [_blocks(ours[index]["removed"]), *_ours(ours[index])] if index < len(ours) else [""] * 4
        rows.append([*own, "", *(_theirs(theirs, sets[index]) if index < len(sets) else [""] * 3)])
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


@block("share-equal", "share", "drop-best", "windows")
def _share_equal(found: Found, drops: Found, windows: Found) -> str:
    columns = {"removed_fraction": "removed", "perplexity_before": "before", "perplexity": "after distillation",
               "perplexity_ratio": "× base"}  # fmt: skip
    chosen = chosen_blocks("share")
    searched = {
        "five blocks share, rank 30": windows["best"]["5"]["blocks"],
        "eight blocks share, rank 18": windows["best"]["8"]["blocks"],
        "two blocks dropped": drops["best"]["2"]["removed"],
        "four blocks dropped": drops["best"]["4"]["removed"],
    }
    return study_rows(found, columns) + _disagreement("share", chosen, searched)


@block("share-lowrank", "share_lowrank")
def _share_lowrank(found: Found) -> str:
    return study_rows(found, {"removed_fraction": "removed", **PERPLEXITY})


# Repair and recovery


@block("repair-levels", "repair")
def _repair_levels(found: Found) -> str:
    rows = []
    for title, label, levels in (
        ("every second block dropped", "drop_6", ("", "refit", "refit+attention")),
        ("the best six blocks unrepaired dropped", "best unrepaired", ("", "refit+attention")),
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


@block("repair-searched", "drop-repaired", "drop-best", "repair")
def _repair_searched(search: Found, drops: Found, repair: Found) -> str:
    chosen = chosen_blocks("repair")
    rows = [
        [_blocks(chosen[label]), said, *(figure(repair["rows"][each], "perplexity") for each in (label, repaired))]
        for label, repaired, said in (
            ("best unrepaired", "best unrepaired refit+attention", "perplexity without a repair"),
            ("drop_6", "drop_6 refit+attention", "perplexity after a repair"),
        )
    ]
    found = {"best unrepaired": drops["best"]["6"]["removed"], "drop_6": search["best"]["6"]["removed"]}
    lines = table(["dropped", "chosen by", "unrepaired", "repaired"], rows)
    return lines + _disagreement("repair", chosen, found)


@block("recovery")
def _recovery(found: Found) -> str:
    return study_rows(found, {"parameters": "parameters", **PERPLEXITY})


def _disagreement(recipe: str, chosen: Mapping[str, list[int]], searched: Mapping[str, Sequence[int]]) -> str:
    """Say where a recipe names other blocks than the search found that they are said to be from."""
    wrong = [
        f'"{label}" has blocks {_blocks(chosen[label])} in `recipes/{recipe}.yaml`; the search found {_blocks(found)}'
        for label, found in searched.items()
        if chosen[label] != list(found)
    ]
    return f"\n\n**{'; '.join(wrong)}.**" if wrong else ""
