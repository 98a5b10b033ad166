"""What the product does, recorded: figures, checkpoints, documents for programs, refusals and help.

    python tests/characterisation/characterise.py            compare with what is kept
    python tests/characterisation/characterise.py --write    keep what is found

`quick` is the part that the suite compares; `full` the whole. On the machine that a record was made on, by the same
versions, every figure must be the same to the digit and every checkpoint to the bit. Elsewhere sums are rounded in
another order: figures may differ in the fifth digit, and hashes are not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")  # one thread: sums in one order

import torch
import yaml

from layerfold import cli

HERE = Path(__file__).parent
KEPT = {"quick": HERE / "quick.json", "full": HERE / "full.json"}
VOLATILE = {"seconds", "environment", "path", "machine", "threads", "network"}
"""Names in documents whose values are the machine's or the moment's."""
TOLERANCE = 1e-5

CALIBRATION = {"tokens": 1024, "repair_tokens": 1024}
PERPLEXITY = {"perplexity": {"limit_tokens": 512, "context": 128}}
GENERATION = {"generation": {"new_tokens": 8, "prompts": ["The film was", "I have seen"]}}
METHODS = [
    {"label": "merged_2", "merge": {"n": 2}},
    {"label": "merged_10", "merge": {"n": 10, "align": "none"}},
    {"label": "merged_tied", "merge": {"groups": "1-4,5-8", "tie": True, "anchor": "middle"}, "repair": "rescale"},
    {"label": "compressed_4", "collapse": {"n": 4}},
    {"label": "compressed_refit", "collapse": {"n": 2, "anchor": "last"}, "repair": "refit"},
    {"label": "pruned_104M", "prune": {"nonzero": "84.1289%"}},
    {"label": "pruned_published", "prune": {"sparsity": 0.51, "criterion": "published"}},
    {"label": "half_wanda", "prune": {"sparsity": 0.5, "criterion": "wanda"}},
    {"label": "half_sparsegpt", "prune": {"sparsity": 0.5, "criterion": "sparsegpt"}},
    {"label": "two_of_four", "prune": {"structure": "2:4", "criterion": "sparsegpt"}},
    {"label": "neurons", "prune": {"structure": "neurons", "sparsity": 0.25, "criterion": "wanda", "scope": "global"}},
    {"label": "neurons_sparsegpt", "prune": {"structure": "neurons", "sparsity": 0.25, "criterion": "sparsegpt"}},
    {
        "label": "heads_refit",
        "prune": {"structure": "neurons+heads", "nonzero": "80%", "criterion": "taylor"},
        "repair": "refit+attention",
    },
    {"label": "shared_4x8", "share": {"window": "1:4", "rank": 8}},
    {
        "label": "shared_svd",
        "share": {"window": "2:3", "rank": 4, "base": "mean", "init": "svd", "ranks": "allotted", "align": "none"},
    },
    {"label": "dropped", "drop": {"blocks": "3,7"}},
    {"label": "dropped_drawn", "drop": {"random": 3, "seed": 2, "part": "attention"}},
    {"label": "dropped_ffn", "drop": {"every": 3, "part": "ffn"}, "repair": "refit"},
    {"label": "halved", "drop": {"every": 2}, "repair": "refit+attention"},
    {
        "label": "steps",
        "steps": [{"drop": {"blocks": "10"}}, {"prune": {"structure": "neurons", "sparsity": 0.2}}],
        "repair": "refit",
    },
]
QUICK = {"merged_10", "compressed_4", "pruned_104M", "half_wanda", "shared_svd", "dropped", "steps"}
"""Rows that the quick part compares."""
SEARCHED = [
    {"label": "merged_auto", "merge": {"groups": "auto", "n": 2}},
    {"label": "collapsed_auto", "collapse": {"groups": "auto", "n": 2}},
    {"label": "shared_auto", "share": {"window": "auto", "k": 3, "rank": 4}},
]
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "methods": {
            "base": "pocket",
            "variants": [each for each in METHODS if each["label"] in QUICK],
            "evaluate": ["size", PERPLEXITY],
            "calibration": {"tokens": 256, "repair_tokens": 512},
        },
    },
    "full": {
        "methods": {
            "base": "pocket",
            "variants": METHODS,
            "evaluate": ["size", PERPLEXITY, GENERATION],
            "calibration": CALIBRATION,
        },
        "searched": {
            "base": "pocket",
            "variants": SEARCHED,
            "evaluate": ["size", PERPLEXITY],
            "calibration": CALIBRATION,
        },
        "planned": {
            "base": "pocket",
            "variants": [{"label": "planned", "plan": {"parameters": "80%"}}],
            "evaluate": ["size", PERPLEXITY],
            "calibration": {"tokens": 1024, "repair_tokens": 2048},
        },
        **{
            f"recovery_{name}": {
                "base": "pocket",
                "variants": [
                    METHODS[0],
                    METHODS[7],
                    METHODS[13],
                    {"label": "student", "student": {"every": 3, "tokens": 2048, "learning_rate": 1e-3}},
                ][: 3 if name == "lowrank" else 4],
                "evaluate": ["size", PERPLEXITY],
                "calibration": CALIBRATION,
                "recovery": {name: {"tokens": 2048, "learning_rate": 1e-3, "batch_size": 1, "validation_tokens": 1024}},
            }
            for name in ("finetune", "distill", "lowrank")
        },
        "tasks": {
            "base": "pocket",
            "variants": METHODS[:1],
            "evaluate": [
                {"imdb": {"train_rows": 24, "test_rows": 24, "context": 64}},
                {"rouge": {"limit": 3, "new_tokens": 8}},
            ],
            "calibration": CALIBRATION,
            "seeds": [0, 1],
        },
    },
}
"""Studies of each part, by name."""

COMPRESS = {
    "quick": {
        "dropped": "drop --blocks 3,7",
        "merged_tied": "merge --groups 1-4 --align none --tie --format compact",
    },
    "full": {
        "pruned": "prune --sparsity 0.5 --format compact",
        "merged": "merge --n 4 --tokens 1024",
        "merged_tied_dense": "merge --groups 1-4,5-8 --tie --anchor middle --tokens 1024",
        "merged_tied_compact": "merge --groups 1-4,5-8 --tie --anchor middle --tokens 1024 --format compact",
        "collapsed": "collapse --n 2 --tokens 1024 --repair refit --repair-tokens 1024 --format compact",
        "pruned_dense": "prune --nonzero 84.13%",
        "pruned_compact": "prune --sparsity 0.5 --criterion wanda --tokens 1024 --format compact",
        "sparsegpt": "prune --structure 2:4 --criterion sparsegpt --tokens 1024 --save-dtype bfloat16",
        "neurons": "prune --structure neurons --sparsity 0.25 --criterion sparsegpt --tokens 1024",
        "heads": "prune --structure neurons+heads --nonzero 66% --criterion taylor --tokens 1024 --format compact",
        "shared": "share --window 1:4 --tokens 1024",
        "shared_dense": "share --window 2:3 --rank 4 --init zero --base anchor --tokens 1024 --format dense",
        "halved": "drop --every 2 --repair refit+attention --repair-tokens 1024",
        "attention": "drop --random 2 --seed 1 --part attention --format compact",
    },
}
"""`layerfold compress`, by name; every file of the folder is hashed."""

DOCUMENTS = {
    "quick": {
        "eval": "eval pocket --metrics perplexity,size --limit-tokens 512 --json",
    },
    "full": {
        "search_drop": "search drop --tokens 512 --test-tokens 512 --context 128 --rounds 0 --output-dir {folder} "
        "--json",
        "eval_generation": "eval pocket --metrics generation --json",
        "eval_published": "eval pocket --metrics perplexity --protocol published --json",
        "search_beam": "search drop --remove 1..3 --strategy beam --width 2 --race --objective kl --tokens 2048 "
        "--test-tokens 512 --context 128 --rounds 0 --output-dir {folder} --json",
        "search_repaired": "search drop --remove 2 --strategy greedy --objective repaired --finalists 2 --tokens 1024 "
        "--calibration-tokens 2048 --test-tokens 512 --context 128 --rounds 0 --output-dir {folder} --json",
        "search_ffn": "search drop --part ffn --tokens 512 --test-tokens 512 --context 128 --rounds 0 "
        "--output-dir {folder} --json",
        "search_window": "search window --k 3..4 --rank 4 --calibration-tokens 1024 --tokens 512 --test-tokens 512 "
        "--context 128 --output-dir {folder} --json",
        "plan": "plan --parameters 85% --points 0 --finalists 1 --calibration-tokens 1024 --repair-tokens 2048 "
        "--tokens 1024 --test-tokens 512 --rounds 0 --output-dir {folder} --json",
        "generate": "generate {study} --prompt Hello --new-tokens 4 --output-dir {folder} --json",
        "report": "report {folder} --against published --json",
    },
}
"""Commands that print one JSON document, and what they read and write in place of {folder} and {study}."""
SMALL_STUDY = {
    "base": "pocket",
    "variants": METHODS[5:6],
    "evaluate": ["size", PERPLEXITY],
    "calibration": CALIBRATION,
}

REFUSED = [
    "",
    "--version --no",
    "compres",
    "compress",
    "compress merg",
    "compress merge",
    "compress merge --output-dir out --n 1",
    "compress merge --output-dir out --n 13",
    "compress merge --output-dir out --n two",
    "compress merge --output-dir out --n 2 --groups 1-4",
    "compress merge --output-dir out --groups 4-1",
    "compress merge --output-dir out --groups 1-4,4-5",
    "compress merge --output-dir out --n 2 --align hungarain",
    "compress merge --output-dir out --n 2 --anchor frist",
    "compress merge --output-dir out --n 2 --repair refits",
    "compress merge --output-dir out --n 2 --tokens 0",
    "compress merge --output-dir out --n 2 --corpus nowhere.txt",
    "compress collapse --output-dir out --n 2 --tie",
    "compress collapse --output-dir out --n 2 --repair rescale --corpus nowhere",
    "compress drop --output-dir out",
    "compress drop --output-dir out --blocks 12",
    "compress drop --output-dir out --blocks 0-11",
    "compress drop --output-dir out --blocks 1 --random 2",
    "compress drop --output-dir out --layers 1",
    "compress drop --output-dir out --from-search nowhere.json",
    "compress drop --output-dir out --from-search nowhere.json --blocks 1",
    "compress drop --output-dir out --blocks 3 --remove 1",
    "compress drop --output-dir out --part ffns --blocks 1",
    "compress prune --output-dir out",
    "compress prune --output-dir out --nonzero 200%",
    "compress prune --output-dir out --nonzero few",
    "compress prune --output-dir out --sparsity 1.5",
    "compress prune --output-dir out --sparsity 0.5 --nonzero 50%",
    "compress prune --output-dir out --sparsity 0.5 --criterion wandb",
    "compress prune --output-dir out --sparsity 0.5 --parts attention,fn",
    "compress prune --output-dir out --sparsity 0.5 --structure 2:4",
    "compress prune --output-dir out --sparsity 0.5 --scope rows",
    "compress share --output-dir out --window 1",
    "compress share --output-dir out --window 10:4",
    "compress share --output-dir out --window 1:4 --k 4",
    "compress share --output-dir out --window 1:4 --rank -1",
    "compress share --output-dir out --window 1:4 --rank 100000",
    "compress merge --output-dir out --n 2 --model nowhere",
    "compress merge --output-dir out --n 2 --format compcat",
    "compress merge --output-dir out --n 2 --save-dtype float8",
    "search drop --remove 0",
    "search drop --remove 12",
    "search drop --remove 1 --all",
    "search drop --remove many",
    "search drop --strategy bean",
    "search drop --width 0 --strategy beam",
    "search window --k 1",
    "search window --k 20",
    "plan",
    "plan --parameters 66% --speedup 2",
    "plan --parameters 200%",
    "plan --perplexity 10",
    "plan --speedup 0.5",
    "recover nowhere --output-dir out --tokens 100",
    "recover pocket --output-dir out",
    "recover pocket --output-dir out --tokens 0",
    "recover pocket --output-dir out --tokens 100 --method distil",
    "recover pocket --output-dir out --tokens 100 --set batchsize=2",
    "recover pocket --output-dir out --tokens 100 --set batch_size",
    "recover pocket --output-dir out --tokens 100 --method lowrank",
    "export nowhere --to dense --output-dir out",
    "export nowhere --to dens --output-dir out",
    "eval pocket --metrics perplexty",
    "eval pocket --split tests",
    "eval pocket --limit-tokens 0",
    "eval pocket --protocol sounds",
    "eval nowhere",
    "study nowhere.yaml",
    "study --preset defalt",
    "study nowhere.yaml --preset full",
    "study {bad_method}",
    "study {bad_key}",
    "study {bad_value}",
    "study {bad_evaluator}",
    "study {bad_recovery}",
    "study {bad_label}",
    "study {bad_repair}",
    "report nowhere",
    "report nowhere --against publishd",
    "generate --new-tokens 0",
]
RECIPES = {
    "bad_method": {"variants": [{"label": "a", "merg": {"n": 2}}]},
    "bad_key": {"variants": [{"label": "a", "merge": {"m": 2}}]},
    "bad_value": {"variants": [{"label": "a", "merge": {"n": "two"}}]},
    "bad_evaluator": {"variants": [], "evaluate": ["perplexty"]},
    "bad_recovery": {"variants": [], "recovery": {"distil": {"tokens": 100}}},
    "bad_label": {"variants": [{"label": "base", "merge": {"n": 2}}]},
    "bad_repair": {"variants": [{"label": "a", "prune": {"sparsity": 0.5}, "repair": "rescale"}]},
}
"""Recipes that commands refuse."""

HELP = [
    "",
    "compress",
    *(f"compress {method}" for method in ("merge", "collapse", "drop", "prune", "share")),
    "search",
    "search drop",
    "search window",
    "plan",
    "recover",
    "export",
    "eval",
    "study",
    "generate",
    "report",
    "doctor",
]


def run(words: str) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, and what it printed on both streams."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["layerfold", *words.split()]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = before
    # Usage begins with the name that this process was started by.
    return code or 0, *(re.sub(r"(?<=Usage: ).*?layerfold", "layerfold", each.getvalue()) for each in (out, err))


def figures(value: Any, folder: Path) -> Any:
    """A document without what differs between two runs on one machine."""
    if isinstance(value, dict):
        return {name: figures(item, folder) for name, item in value.items() if name not in VOLATILE}
    if isinstance(value, list):
        return [figures(item, folder) for item in value]
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) else value


def must_run(words: str) -> str:
    code, out, err = run(words)
    assert code == 0, f"{words}: {code}: {err}"
    return out


def write_recipe(name: str, recipe: dict[str, Any]) -> Path:
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def of_study(name: str, recipe: dict[str, Any]) -> Any:
    """A study's document, and the names of its records, which hold the hashes of all that determines them."""
    folder = Path(name)
    document = json.loads(must_run(f"study {write_recipe(name, recipe)} --output-dir {folder} --json"))
    return {
        "document": figures(document, folder),
        "records": sorted(path.name for path in (folder / "records").iterdir()),
    }


def of_checkpoint(name: str, words: str) -> Any:
    """The hashes of a checkpoint's files; of the manifest only what names no moment."""
    said = must_run(f"compress {words} --output-dir {name}")
    folder = Path(name)
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix == ".safetensors" or path.name == "config.json"
    }
    manifest = json.loads((folder / "layerfold.json").read_text())
    return {"said": said, "sha256": hashes, "manifest": figures(manifest, folder)}


def of_document(name: str, words: str) -> Any:
    recipe = write_recipe("small", SMALL_STUDY)
    folder = Path(f"{name}_run")
    if name == "report":
        must_run(f"study {recipe} --output-dir {folder}")
    document = json.loads(must_run(words.format(folder=folder, study=recipe)))
    return figures(document, folder)


def characterise(part: str) -> dict[str, Any]:
    """Return what one part of the product does, in a folder that is gone afterwards."""
    found: dict[str, Any] = {}
    before, threads = Path.cwd(), torch.get_num_threads()
    columns = {name: os.environ.get(name) for name in ("COLUMNS", "TERM")}
    os.environ.update(COLUMNS="100", TERM="dumb")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            found["fingerprint"] = fingerprint()
            found["study"] = {name: of_study(name, recipe) for name, recipe in STUDIES[part].items()}
            found["checkpoint"] = {name: of_checkpoint(name, words) for name, words in COMPRESS[part].items()}
            found["document"] = {name: of_document(name, words) for name, words in DOCUMENTS[part].items()}
            if part == "quick":
                paths = {name: str(write_recipe(name, recipe)) for name, recipe in RECIPES.items()}
                found["refused"] = {words: refusal(words.format(**paths)) for words in REFUSED}
                found["help"] = {words: must_run(f"{words} --help").splitlines() for words in HELP}
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
            for name, value in columns.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed


def refusal(words: str) -> list[Any]:
    code, out, err = run(words)
    return [code, out.splitlines() if code and not err else "", err.splitlines()]


def fingerprint() -> dict[str, Any]:
    """The machine and the versions on which figures are the same to the digit."""
    from layerfold.environment import environment

    found = environment()
    return {name: found[name] for name in ("processor", "versions", "threads")}


def differences(kept: Any, found: Any, exact: bool, place: str = "") -> Iterator[str]:
    """Yield each place where two records differ."""
    if isinstance(kept, dict) and isinstance(found, dict):
        for name in {**kept, **found}:
            if name not in kept or name not in found:
                yield f"{place}/{name}: {'new' if name in found else 'gone'}"
            elif exact or name != "sha256" or not place.startswith("/checkpoint"):
                yield from differences(kept[name], found[name], exact, f"{place}/{name}")
    elif isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        for index, (one, other) in enumerate(zip(kept, found, strict=True)):
            yield from differences(one, other, exact, f"{place}/{index}")
    elif not same(kept, found, exact):
        yield f"{place}: {kept!r} -> {found!r}"


def same(kept: Any, found: Any, exact: bool) -> bool:
    if isinstance(kept, float) and isinstance(found, float) and not exact:
        return math.isclose(kept, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(kept, str) and isinstance(found, str) and not exact:
        return re.sub(r"\d+\.\d+", "#", kept) == re.sub(r"\d+\.\d+", "#", found)
    return type(kept) is type(found) and bool(kept == found)


def compare(part: str, found: dict[str, Any]) -> list[str]:
    """Return where a record differs from the kept one."""
    kept = json.loads(KEPT[part].read_text(encoding="utf-8"))
    exact = kept.pop("fingerprint") == found.pop("fingerprint")
    return list(differences(kept, found, exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*KEPT], action="append", help="by default both")
    parser.add_argument("--write", action="store_true", help="keep what is found")
    arguments = parser.parse_args()
    status = 0
    for part in arguments.part or KEPT:
        found = characterise(part)
        if arguments.write:
            KEPT[part].write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            continue
        for line in compare(part, found):
            print(f"{part}{line}")
            status = 1
    raise SystemExit(status)


if __name__ == "__main__":
    main()
