"""Recipes: what they say, and one clear line for each way of getting them wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from layerfold.errors import RecipeError
from layerfold.methods import Collapse, Drop, Merge, Prune, Share, Steps
from layerfold.recovery import Distill, Finetune, LowRank
from layerfold.repair.repair import LEVELS
from layerfold.study.recipe import build_recovery, default_recipe, read_recipe
from layerfold.study.rows import Budgeted, Load, Student


@pytest.mark.parametrize(
    ("settings", "admitted"),
    [
        ({"n_layer": 4}, True),
        ({"n_layer": 3}, False),
        ({"n_layer": 4, "n_embd": 8}, True),
        ({"n_layer": 4, "n_embd": 4}, False),
        ({"n_layer": 4, "n_inner": 7}, False),
    ],
    ids=str,
)
def test_the_default_shares_where_there_are_blocks_and_ranks_enough(settings: dict[str, int], admitted: bool) -> None:
    labels = [variant.label for variant in default_recipe("small", tiny("gpt2", **settings).decoder).variants]
    assert ("shared_4x8" in labels) == admitted


VARIANT: dict[str, Any] = {"label": "a", "merge": {"n": 2}}
HEADS: dict[str, Any] = {"criterion": "taylor", "structure": "neurons+heads"}
SHARED: dict[str, Any] = {"window": "1:2", "rank": 2, "base": "mean", "init": "svd", "ranks": "allotted"}
HALF: dict[str, Any] = {"sparsity": 0.5}
STEPS = [{"drop": {"blocks": "1"}}, {"prune": {"sparsity": 0.25, "structure": "neurons"}}]


def of(**row: Any) -> dict[str, Any]:
    """A recipe of one row."""
    return {"variants": [{"label": "a", **row}]}


# What rows are


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"merge": {"groups": "1-4", "tie": True}}, Merge(groups="1-4", tie=True)),
        ({"collapse": {"n": 2}, "repair": "rescale"}, Collapse(n=2)),
        ({"drop": {"blocks": "1,3"}}, Drop(blocks="1,3")),
        ({"drop": {"blocks": 3}}, Drop(blocks=3)),
        ({"drop": {"blocks": [1, 3]}}, Drop(blocks=(1, 3))),
        ({"drop": {"random": 1, "seed": 2}}, Drop(random=1, seed=2)),
        ({"drop": {"fraction": 0.5, "part": "ffn"}}, Drop(fraction=0.5, part="ffn")),
        ({"prune": {"nonzero": "84.13%"}}, Prune(nonzero="84.13%")),
        ({"prune": {"nonzero": 50_000, "scope": "row"}}, Prune(nonzero=50_000, scope="row")),
        ({"prune": HALF | {"criterion": "wanda", "parts": "ffn"}}, Prune(**HALF, criterion="wanda", parts="ffn")),
        ({"prune": {"structure": "2:4", "criterion": "sparsegpt"}}, Prune(structure="2:4", criterion="sparsegpt")),
        ({"prune": HALF | HEADS}, Prune(**HALF, **HEADS)),
        ({"share": {"window": "1:2", "rank": 2}}, Share(window="1:2", rank=2)),
        ({"share": {"window": "auto", "k": 2}}, Share(window="auto", k=2)),
        ({"share": None}, Share()),
        ({"share": SHARED | {"align": "none", "anchor": "last"}}, Share(**SHARED, align="none", anchor="last")),
        ({"steps": STEPS, "repair": "refit"}, Steps((Drop(blocks="1"), Prune(sparsity=0.25, structure="neurons")))),
        ({"load": "distilgpt2"}, Load("distilgpt2")),
        ({"load": {"model": "./folder", "revision": "main"}}, Load("./folder", "main")),
        ({"student": None}, Student()),
        ({"student": {"every": 3, "tokens": 512, "published": {"gpt2": "a"}}}, Student(3, 512, None, {"gpt2": "a"})),
        ({"plan": {"perplexity": "+10%"}}, Budgeted(perplexity="+10%")),
    ],
    ids=str,
)
def test_a_row_is_what_the_recipe_says_and_reads_back_as_itself(row: dict[str, Any], made: Any) -> None:
    recipe = read_recipe(of(**row))
    (variant,) = recipe.variants
    assert (variant.method, variant.repair) == (made, row.get("repair", "none"))
    assert read_recipe(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_resolved_recipe_spells_every_default_out() -> None:
    (row,) = read_recipe(of(share={"window": "1:2", "rank": 2})).to_json()["variants"]
    assert row["label"] == "a"
    assert row["share"].items() >= {"window": "1:2", "k": None, "rank": 2, "base": "fitted"}.items()
    (row,) = read_recipe(of(student={"tokens": 9})).to_json()["variants"]
    assert row == {"label": "a", "student": {"every": 2, "tokens": 9, "learning_rate": None, "published": {}}}


# What is refused


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"variant": []}, ["unknown key 'variant'", "did you mean 'variants'?", "accepted: base, calibration"]),
        ({}, ["variants", "Field required"]),
        ({"variants": "all"}, ["variants", "valid list", "'all'"]),
        ({"variants": [VARIANT, VARIANT]}, ["duplicate label 'a'"]),
        ({"variants": [VARIANT | {"label": "base"}]}, ["'base' is the base row's"]),
        ({"variants": [VARIANT | {"label": ""}]}, ["variants[0].label", "at least 1"]),
        ({"variants": [VARIANT | {"label": 3}]}, ["variants[0].label", "valid string", "3"]),
        ({"variants": [{"merge": {"n": 2}}]}, ["variants[0].label", "Field required"]),
        (of(), ["variants[0]", "one of collapse, drop, load, merge"]),
        (of(merg={"n": 2}), ["unknown key or method 'merg'", "did you mean 'merge'?"]),
        (of(merge={"n": 2}, collapse={"n": 2}), ["accepted: label, repair, recovery and one of"]),
        (of(merge={"size": 2}), ["merge: unknown key 'size'", "accepted: align, anchor"]),
        (of(collapse={"n": 2, "tie": True}), ["collapse: unknown key 'tie'"]),
        (of(merge={"n": "two"}), ["merge.n", "valid integer", "'two'"]),
        (of(merge={"n": 2.5}), ["merge.n", "2.5"]),
        (of(merge={"n": True}), ["merge.n", "True"]),
        (of(merge={"n": 1}), ["n 1; accepted: a whole number from 2"]),
        (of(merge={"n": 2, "align": "best"}), ["merge.align", "'best'", "'hungarian'"]),
        (of(merge=4), ["merge: 4", "settings"]),
        (of(share={"windw": "1:2"}), ["unknown key 'windw'; did you mean 'window'?"]),
        (of(share={"name": "x"}), ["share: unknown key 'name'"]),
        (of(shares={}), ["did you mean 'share'?"]),
        (of(share={"window": 62}), ["share.window", "62"]),
        (of(share={"window": "3:1"}), ["window '3:1'; accepted: auto, or START:K"]),
        (of(share={"rank": 2.0}), ["share.rank", "2.0"]),
        (of(share={"base": "best"}), ["share.base", "'best'", "'fitted'"]),
        (of(share={"init": "data_svd"}), ["share.init", "'data-svd'"]),
        (of(drop={"blocks": "4-2"}), ["drop: block '4-2'; accepted: an index"]),
        (of(drop={"blocks": 2.5}), ["drop.blocks"]),
        (of(drop={"random": 2.0}), ["drop.random"]),
        (of(drop={"fraction": "0.5"}), ["drop.fraction"]),
        (of(drop={"part": "mlp", "blocks": 1}), ["drop.part: Input should be 'block', 'attention' or 'ffn' (received"]),
        (of(drop={"block": 1}), ["drop: unknown key 'block'; did you mean 'blocks'?"]),
        (of(prune={"sparsty": 0.5}), ["prune: unknown key 'sparsty'; did you mean 'sparsity'?"]),
        (of(prune={"nonzero": True}), ["prune", "nonzero"]),
        (of(prune={"nonzero": 0.8413}), ["prune", "nonzero"]),
        (of(prune={"nonzero": "12X"}), ["nonzero '12X'; accepted: a count"]),
        (of(prune={"sparsity": "half"}), ["prune", "sparsity", "'half'"]),
        (of(prune={"sparsity": float("nan")}), ["accepted: one of the two"]),
        (of(prune={"sparsity": 1.5}), ["sparsity 1.5; accepted: from 0 to below 1"]),
        (of(prune=HALF | {"criterion": "wnda"}), ["wanda", "'wnda'"]),
        (of(prune=HALF | {"structure": 24}), ["structure", "24"]),
        (of(prune=None), ["accepted: one of the two"]),
        (of(prune=HALF | {"structure": "neurons+heads"}), ["accepted: taylor with neurons"]),
        (of(steps=[]), ["the recipe", "0 steps; accepted: 2 ... 8"]),
        (of(steps=STEPS[:1]), ["1 steps; accepted: 2 ... 8"]),
        (of(steps={"drop": {"blocks": "1"}}), ["steps; accepted: a list of methods"]),
        (of(steps=[{"drop": {"blocks": "1"}, "merge": {"n": 2}}]), ["steps; accepted: a list of methods"]),
        (of(steps=[{"dorp": {"blocks": "1"}}, {"merge": {"n": 2}}]), ["'drop'"]),
        (of(steps=[{"share": {}}, {"merge": {"n": 2}}]), ["window auto in a step"]),
        (of(steps=[{"drop": {"blocks": 1}}, {"merge": {"groups": "auto"}}]), ["groups auto in a step"]),
        (of(steps=[{"load": {"model": "pocket"}}, {"merge": {"n": 2}}]), ["unknown method 'load'"]),
        (of(load={"revision": "main"}), ["load.model"]),
        (of(load={"name": "x"}), ["load: unknown key 'name'"]),
        (of(load=3), ["load: 3"]),
        (of(load=None), ["model"]),
        (of(student={"every": 1}), ["student every 1; accepted: 2 or more"]),
        (of(student={"every": 2.5}), ["student.every"]),
        (of(student={"tokens": 0}), ["tokens 0; accepted: 1 or more"]),
        (of(student={"learning_rate": -1.0}), ["learning_rate -1.0"]),
        (of(student={"token": 5}), ["student: unknown key 'token'; did you mean 'tokens'?"]),
        (of(student={"published": "distilgpt2"}), ["student.published"]),
        (of(student={"published": {"gpt2": 3}}), ["student.published.gpt2"]),
        (of(student={"name": "x"}), ["student: unknown key 'name'"]),
        (of(student=4), ["student: 4; accepted: settings"]),
        (of(load="a", repair="refit"), ["repair 'refit' of a row that no method makes"]),
        (of(merge={"n": 2}, repair="refot"), ["unknown repair 'refot'; did you mean 'refit'?"]),
        (of(prune=HALF, repair="refit"), ["whose zeros it would fill; accepted: neurons, neurons+heads"]),
        (of(prune=HALF | HEADS, repair="rescale"), ["repair 'rescale' with prune, which averages no neurons"]),
        *((of(steps=[STEPS[0], {"prune": HALF}], repair=each), ["repair"]) for each in LEVELS if each != "none"),
        (of(steps=[STEPS[0], {"merge": {"n": 2}}], repair="rescale"), ["several steps"]),
        ({"variants": [], "evaluate": ["perplexty"]}, ["evaluate[0]", "did you mean 'perplexity'?"]),
        ({"variants": [], "evaluate": ["size", "size"]}, ["duplicate evaluator 'size'"]),
        ({"variants": [], "evaluate": []}, ["evaluate", "at least 1"]),
        ({"variants": [], "evaluate": [{"latency": {"rounds": 1}}]}, ["latency rounds 1; accepted: 3 or more"]),
        ({"variants": [], "evaluate": [{"perplexity": {"protocol": "secret"}}]}, ["perplexity.protocol", "'secret'"]),
        ({"variants": [], "seed": -1}, ["seed", "-1"]),
        ({"variants": [], "seed": 2**32}, ["seed"]),
        ({"variants": [], "calibration": {"token": 3}}, ["calibration.token", "unknown key"]),
        *(
            ({"variants": [], "recovery": recovery}, said)
            for recovery, said in [
                ("distill", ["recovery", "'distill'; accepted: one of distill, finetune, lowrank, with its settings"]),
                ({}, ["recovery", "accepted: one of distill, finetune"]),
                ([], ["recovery", "accepted: one of distill, finetune"]),
                ({"distill": {"tokens": 9}, "finetune": {"tokens": 9}}, ["accepted: one of"]),
                ({"distil": {"tokens": 9}}, ["unknown recovery 'distil'", "did you mean 'distill'?"]),
                ({"distill": None}, ["distill.tokens", "required"]),
                ({"distill": 1000}, ["distill: 1000", "settings"]),
                ({"distill": {"token": 9}}, ["distill: unknown key 'token'", "did you mean 'tokens'?"]),
                ({"finetune": {"tokens": 9, "lm_weight": 0.5}}, ["finetune: unknown key 'lm_weight'"]),
                ({"finetune": {"tokens": 9, "name": "x"}}, ["finetune: unknown key 'name'"]),
                (
                    {"lowrank": {"tokens": 9, "penalty_wieght": 0}},
                    ["did you mean 'penalty_weight'?"],
                ),
                ({"lowrank": {"tokens": 9, "penalty_weight": -1}}, ["penalty_weight -1.0; accepted: 0 or more"]),
                ({"finetune": {"tokens": 1e5}}, ["finetune.tokens", "valid integer"]),
                ({"finetune": {"tokens": "9"}}, ["finetune.tokens", "valid integer", "'9'"]),
                ({"finetune": {"tokens": True}}, ["finetune.tokens", "True"]),
                ({"finetune": {"tokens": 0}}, ["tokens 0; accepted: 1 or more"]),
                ({"finetune": {"tokens": 9, "learning_rate": "1e-3"}}, ["finetune.learning_rate", "valid number"]),
                ({"finetune": {"tokens": 9, "freeze": "*.wte.*"}}, ["finetune.freeze", "'*.wte.*'"]),
                ({"finetune": {"tokens": 9, "freeze": [1]}}, ["finetune.freeze[0]", "1"]),
                ({"finetune": {"tokens": 9, "schedule": "linaer"}}, ["finetune.schedule", "'linaer'"]),
                ({"distill": {"tokens": 9, "temperature": 0}}, ["temperature 0.0; accepted: a number above 0"]),
                ({"distill": {"tokens": 9, "temperature": float("inf")}}, ["temperature"]),
                ({"distill": {"tokens": 9, "counterparts": [0.5]}}, ["distill.counterparts[0]"]),
            ]
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(document: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(document)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "is not YAML at line"), ("", "holds NoneType"), ("- a", "holds list"), ("\x00", "is not YAML")],
)
def test_what_is_not_a_mapping_in_yaml_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_recipe(path)


def test_a_recipe_that_is_missing_binary_or_a_folder_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", binary, tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_recipe(path)


DISTILL: dict[str, Any] = {"tokens": 1000, "learning_rate": 1e-3, "freeze": ["*.wte.*"], "counterparts": [1, 3]}


def test_a_recovery_is_what_the_recipe_says() -> None:
    assert read_recipe({"variants": []}).recovery is None
    assert read_recipe({"variants": [], "recovery": None}).recovery is None
    assert read_recipe({"variants": [], "recovery": {"finetune": {"tokens": 7}}}).recovery == Finetune(tokens=7)
    lowrank = read_recipe({"variants": [], "recovery": {"lowrank": {"tokens": 7, "penalty_weight": 0}}})
    assert lowrank.recovery == LowRank(tokens=7, penalty_weight=0.0)
    recipe = read_recipe({"variants": [], "recovery": {"distill": DISTILL}})
    assert recipe.recovery == Distill(tokens=1000, learning_rate=1e-3, freeze=("*.wte.*",), counterparts=(1, 3))
    # A whole number is a number; what is left out is None.
    assert build_recovery("finetune", {"tokens": 7, "clip": 2, "patience": None}) == Finetune(tokens=7, clip=2.0)


@pytest.mark.parametrize("name", ["finetune", "distill", "lowrank"])
def test_a_resolved_recovery_reads_back_as_itself(name: str) -> None:
    settings = {"tokens": 64, "freeze": ["a", "b"], "report_to": "tensorboard", "patience": 2}
    document = read_recipe({"variants": [], "recovery": {name: settings}}).to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["recovery"][name].items() >= settings.items()
    assert read_recipe(document) == read_recipe({"variants": [], "recovery": {name: settings}})
