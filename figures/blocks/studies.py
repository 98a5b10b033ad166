"""Blocks of whole studies: the demo, the published study and its tasks; and the list of experiments."""

from __future__ import annotations

from figures.blocks.registry import PERPLEXITY, SIZES, SPEED, Found, block
from figures.cells import figure, plain, published, study_rows, table
from figures.experiments import EXPERIMENTS, costs

# README


@block("results", "demo")
def _results(demo: Found) -> str:
    labels = {
        "base": "base",
        "pruned_104M": "pruned_104M: 84.13 % of the parameters non-zero, by magnitude",
        "shared_4x8": "shared_4x8: one FFN for four blocks, deltas of rank 8",
        "merged_2": "merged_2: FFNs averaged in pairs",
        "compressed_2": "compressed_2: blocks averaged in pairs",
        "repaired_drop_6": "repaired_drop_6: every second block dropped, the others repaired",
        "distilled_drop_6": "distilled_drop_6: the same, then distilled on 12,288 tokens",
    }
    return study_rows(demo, {**SIZES, **PERPLEXITY, **SPEED}, labels, "variant of pocket")


@block("samples", "demo")
def _samples(demo: Found) -> str:
    sample = demo["samples"][0]
    rows = [
        [label, *(plain(texts[choice]) for choice in ("greedy", "sampled"))] for label, texts in sample["texts"].items()
    ]
    return f'After "{sample["prompt"]}":\n\n' + table(["", "greedy", "sampled"], rows)


@block("plot", "quality")
def _plot(found: Found) -> str:
    return "![perplexity against parameters, by method](docs/plots/quality.svg)"


# Studies


@block("published-beside", "full")
def _published_beside(full: Found) -> str:
    """The published figures beside ours, row by row."""
    theirs_of = {name: published(name) for name in ("parameters", "perplexity", "latency", "imdb_accuracy", "rouge")}
    names = {"gpt2": "base", "distilgpt2": "distilled"}
    rows = []
    for name in dict.fromkeys(row for rows_of in theirs_of.values() for row in rows_of):
        ours = full["rows"].get(names.get(name, name))
        if ours is None:
            continue
        theirs = {
            "parameters": theirs_of["parameters"].get(name, {}).get("parameters_millions", ""),
            "perplexity": theirs_of["perplexity"].get(name, {}).get("perplexity", ""),
            "speedup": theirs_of["latency"].get(name, {}).get("speedup_vs_gpt2", ""),
            "imdb_accuracy": theirs_of["imdb_accuracy"].get(name, {}).get("accuracy_percent", ""),
            "rougel": theirs_of["rouge"].get(name, {}).get("rougeL", ""),
        }
        cells = [f"{theirs['parameters']}M" if theirs["parameters"] else "", figure(ours, "parameters")]
        for column in ("perplexity", "speedup", "imdb_accuracy"):
            cells += [theirs[column], "" if column == "speedup" and name == "gpt2" else figure(ours, column)]
        rouge = f"{float(theirs['rougel']):.1%}" if theirs["rougel"] else ""
        rows.append([name, *cells, rouge, figure(ours, "rougel")])
    pairs = ("parameters", "perplexity", "speed-up", "accuracy, %", "ROUGE-L")
    return table(["variant", *(head for name in pairs for head in (f"{name}, published", "ours"))], rows)


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
    return study_rows(found, {"imdb_accuracy": "accuracy"}, {k: v for k, v in labels.items() if k in found["rows"]})


@block("tasks-seeds", "tasks_seeds")
def _tasks_seeds(found: Found) -> str:
    return study_rows(found, {"imdb_accuracy": "accuracy"})


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
