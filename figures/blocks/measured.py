"""Blocks of benchmarks: speed, memory, and how the measurements themselves do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from figures.blocks.registry import Found, block
from figures.cells import table
from layerfold.checkpoint.ggml_architectures import named
from layerfold.checkpoint.outline import structures
from layerfold.report import numerals

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


@block("families", "")
def _families() -> str:
    rows = [
        [f"`{name}`", each.ffn, each.attention, each.norms, each.heads, each.refit, each.width, named(name)]
        for name, each in structures().items()
    ]
    head = ["`model_type`", "FFN", "queries, keys, values", "norms", "heads go", "refit", "FFN width", "GGUF"]
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
    rows = [[key.removesuffix(", s"), f"{value:.2f} s"] for key, value in figures.items() if "beyond" not in key]
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
