"""Recipes: what they say, and one clear line for each way of getting them wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import deep, tiny

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.errors import RecipeError
from layerfold.methods import Collapse, Drop, Merge, Prune, Share
from layerfold.recovery import Distill, Finetune, LowRank
from layerfold.study.recipe import build_recovery, default_recipe, read_recipe
from layerfold.study.rows import Budgeted, Load, Student


def test_the_default_is_the_published_comparison() -> None:
    recipe = default_recipe()
    assert [variant.label for variant in recipe.variants] == [
        *(f"merged_{n}" for n in (2, 4, 6, 8, 10)),
        *(f"compressed_{n}" for n in (2, 4, 6, 8, 10)),
        "pruned_104M",
        "shared_4x8",
        "repaired_drop_6",
        "planned_82M",
    ]
    assert recipe.variants[1].method == Merge(n=4)
    assert recipe.variants[-5].method == Collapse(n=10)
    assert recipe.variants[-4].method == Prune(nonzero="84.1289%")
    assert recipe.variants[-3].method == Share(window="auto", k=4, rank=8)
    assert recipe.variants[-1].method == Budgeted(parameters="65.8952%")
    assert (recipe.variants[-2].method, recipe.variants[-2].repair) == (Drop(every=2), "refit+attention")
    assert [evaluator.name for evaluator in recipe.evaluate] == ["size", "perplexity", "latency", "generation"]


def test_the_default_goes_no_deeper_than_the_model() -> None:
    labels = [variant.label for variant in default_recipe("shallow", deep(5)).variants]
    admitted = ["merged_2", "merged_4", "compressed_2", "compressed_4", "pruned_104M", "shared_4x8"]
    assert labels == [*admitted, "repaired_drop_6", "planned_82M"]
    one = tiny("gpt2", n_layer=1, n_positions=4096).decoder  # mostly tables: the budget is out of reach
    assert default_recipe("flat", one).variants == []


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


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    for recipe in (
        default_recipe(),
        read_recipe({"variants": [{"label": "a", "merge": {"groups": "1-4", "tie": True}}]}),
    ):
        assert read_recipe(recipe.to_json()).to_json() == recipe.to_json()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_in_the_repository_are_valid(path: Path) -> None:
    decoder = load(POCKET).decoder
    for variant in read_recipe(path).variants:
        method = variant.method
        (method.drop(decoder) if isinstance(method, Student) else method).resolved(decoder)


VARIANT: dict[str, Any] = {"label": "a", "merge": {"n": 2}}


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
        ({"variants": [{"label": "a"}]}, ["variants[0]", "one of collapse, drop, load, merge"]),
        ({"variants": [{"label": "a", "merg": {"n": 2}}]}, ["unknown key or method 'merg'", "did you mean 'merge'?"]),
        ({"variants": [VARIANT | {"collapse": {"n": 2}}]}, ["accepted: label, repair and one of"]),
        (
            {"variants": [{"label": "a", "merge": {"size": 2}}]},
            ["merge: unknown key 'size'", "accepted: align, anchor"],
        ),
        ({"variants": [{"label": "a", "collapse": {"n": 2, "tie": True}}]}, ["collapse: unknown key 'tie'"]),
        ({"variants": [{"label": "a", "merge": {"n": "two"}}]}, ["merge.n", "valid integer", "'two'"]),
        ({"variants": [{"label": "a", "merge": {"n": 2.5}}]}, ["merge.n", "2.5"]),
        ({"variants": [{"label": "a", "merge": {"n": True}}]}, ["merge.n", "True"]),
        ({"variants": [{"label": "a", "merge": {"n": 1}}]}, ["n 1; accepted: a whole number from 2"]),
        ({"variants": [{"label": "a", "merge": {"n": 2, "align": "best"}}]}, ["merge.align", "'best'", "'hungarian'"]),
        ({"variants": [{"label": "a", "merge": 4}]}, ["merge: 4", "settings"]),
        ({"variants": [{"label": "a", "share": {"windw": "1:2"}}]}, ["unknown key 'windw'; did you mean 'window'?"]),
        ({"variants": [{"label": "a", "share": {"name": "x"}}]}, ["share: unknown key 'name'"]),
        ({"variants": [{"label": "a", "shares": {}}]}, ["did you mean 'share'?"]),
        ({"variants": [{"label": "a", "share": {"window": 62}}]}, ["share.window", "62"]),
        ({"variants": [{"label": "a", "share": {"window": "3:1"}}]}, ["window '3:1'; accepted: auto, or START:K"]),
        ({"variants": [{"label": "a", "share": {"window": "1:2", "k": 2}}]}, ["k 2 beside window '1:2'"]),
        ({"variants": [{"label": "a", "share": {"k": 1}}]}, ["k 1; accepted: 2 or more"]),
        ({"variants": [{"label": "a", "share": {"rank": -1}}]}, ["rank -1; accepted: 0 or more"]),
        ({"variants": [{"label": "a", "share": {"rank": 2.0}}]}, ["share.rank", "2.0"]),
        ({"variants": [{"label": "a", "share": {"base": "best"}}]}, ["share.base", "'best'", "'fitted'"]),
        ({"variants": [{"label": "a", "share": {"init": "data_svd"}}]}, ["share.init", "'data-svd'"]),
        ({"variants": [], "evaluate": ["perplexty"]}, ["evaluate[0]", "did you mean 'perplexity'?"]),
        ({"variants": [], "evaluate": ["size", "size"]}, ["duplicate evaluator 'size'"]),
        ({"variants": [], "evaluate": []}, ["evaluate", "at least 1"]),
        ({"variants": [], "evaluate": [{"latency": {"rounds": 1}}]}, ["latency rounds 1; accepted: 3 or more"]),
        ({"variants": [], "evaluate": [{"perplexity": {"protocol": "secret"}}]}, ["perplexity.protocol", "'secret'"]),
        ({"variants": [], "seed": -1}, ["seed", "-1"]),
        ({"variants": [], "calibration": {"token": 3}}, ["calibration.token", "unknown key"]),
    ],
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


def test_blocks_share_as_the_recipe_says() -> None:
    every = {"window": "1:2", "rank": 2, "base": "mean", "init": "svd", "ranks": "allotted", "align": "none"}
    variants = [
        {"label": "named", "share": {"window": "1:2", "rank": 2}},
        {"label": "searched", "share": {"window": "auto", "k": 2}},
        {"label": "plain", "share": None},
        {"label": "all", "share": every | {"anchor": "last"}},
    ]
    recipe = read_recipe({"variants": variants})
    assert [variant.method for variant in recipe.variants] == [
        Share(window="1:2", rank=2),
        Share(window="auto", k=2),
        Share(),
        Share(**every, anchor="last"),  # type: ignore[arg-type]
    ]
    document = recipe.to_json()
    assert document["variants"][0]["share"].items() >= {"window": "1:2", "k": None, "rank": 2, "base": "fitted"}.items()
    assert read_recipe(json.loads(json.dumps(document))) == recipe


def test_a_model_to_load_is_named_in_short_or_in_full() -> None:
    variants = [
        {"label": "short", "load": "distilgpt2"},
        {"label": "full", "load": {"model": "./folder", "revision": "main"}},
    ]
    recipe = read_recipe({"variants": variants})
    assert [variant.method for variant in recipe.variants] == [Load("distilgpt2"), Load("./folder", "main")]
    assert read_recipe(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("recovery", "said"),
    [
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
        ({"lowrank": {"tokens": 9, "penalty_wieght": 0}}, ["lowrank: unknown key", "did you mean 'penalty_weight'?"]),
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
    ],
    ids=str,
)
def test_a_recovery_that_is_wrong_is_said_in_one_line(recovery: Any, said: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe({"variants": [], "recovery": recovery})
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"revision": "main"}, "load.model"),
        ({"name": "x"}, "load: unknown key 'name'"),
        (3, "load: 3"),
        (None, "model"),
    ],
)
def test_a_model_to_load_that_is_not_named_is_refused(load: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe({"variants": [{"label": "a", "load": load}]})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(RecipeError, match="seed"):
        read_recipe({"variants": [], "seed": seed})
