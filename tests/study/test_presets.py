"""Recipes that come with layerfold, what extends them, and the files in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import Write, tiny

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.cli.options import Preset
from layerfold.errors import RecipeError
from layerfold.evaluators import Generation, Imdb, Latency, Perplexity, Rouge, Size
from layerfold.methods import Collapse, Drop, Merge, Prune, Share
from layerfold.model.decoder import Decoder
from layerfold.recovery import Distill, Finetune
from layerfold.study.recipe import PRESETS, CalibrationText, Recipe, default_recipe, read_recipe
from layerfold.study.rows import Budgeted, Load, Student
from layerfold.study.study import Study

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PUBLISHED = [
    *((f"merged_{n}", Merge(n=n)) for n in (2, 4, 6, 8, 10)),
    *((f"compressed_{n}", Collapse(n=n)) for n in (2, 4, 6, 8, 10)),
    ("pruned_104M", Prune(nonzero="84.1289%")),
    ("shared_4x8", Share(window="auto", k=4, rank=8)),
]
FITTED = [
    *((f"merged_{n}_fitted", Merge(n=n, average="fitted")) for n in (2, 4)),
    *((f"compressed_{n}_fitted", Collapse(n=n, average="fitted")) for n in (2, 4)),
]
REPAIRED = ("repaired_drop_6", Drop(every=2))
PLANNED = ("planned_82M", Budgeted(parameters="65.8952%"))
EVALUATORS = [Size(), Perplexity(limit_tokens=65_536), Latency(), Generation()]


@pytest.fixture(scope="module")
def pocket() -> Decoder:
    return load(POCKET).decoder


def rows(recipe: Recipe) -> list[tuple[str, Any]]:
    return [(variant.label, variant.method) for variant in recipe.variants]


# Presets


DEMO = ["merged_2", "compressed_2", "pruned_104M", "shared_4x8", "repaired_drop_6", "distilled_drop_6"]


def test_the_demo_has_a_row_of_each_method_and_little_text(pocket: Decoder) -> None:
    for recipe in (default_recipe(), default_recipe(POCKET, pocket), default_recipe(preset="demo")):
        assert [variant.label for variant in recipe.variants] == DEMO
        assert rows(recipe)[:4] == [each for each in PUBLISHED if each[0] in DEMO]
        *_, repaired, distilled = recipe.variants
        assert (repaired.method, repaired.repair, repaired.recovery) == (Drop(every=2), "refit+attention", None)
        assert (distilled.method, distilled.repair) == (Drop(every=2), "refit+attention")
        assert distilled.recovery == Distill(tokens=12_288, learning_rate=3e-4)
        assert [each.name for each in recipe.evaluate] == ["size", "perplexity", "latency", "generation"]
        assert recipe.evaluate[1] == Perplexity(limit_tokens=16_384)
        assert recipe.recovery is None


def test_published_is_the_published_comparison_with_nothing_trained(pocket: Decoder) -> None:
    for recipe in (default_recipe(preset="published"), default_recipe(POCKET, pocket, "published")):
        assert rows(recipe) == [*PUBLISHED, *FITTED, REPAIRED, PLANNED]
        assert [variant.repair for variant in recipe.variants] == ["none"] * len([*PUBLISHED, *FITTED]) + [
            "refit+attention",
            "none",
        ]
        assert recipe.evaluate == EVALUATORS
        assert (recipe.base, recipe.revision) == ("pocket", None)
        assert recipe.calibration == CalibrationText(corpus=None, tokens=16_384, repair_tokens=65_536)
        assert (recipe.recovery, recipe.seed, recipe.seeds) == (None, 0, None)
        assert list(recipe.to_json())[-1] == "seed"


def test_full_is_all_of_the_published_study(pocket: Decoder) -> None:
    for recipe in (default_recipe(preset="full"), default_recipe(POCKET, pocket, "full")):
        (label, student), *others = rows(recipe)
        assert label == "distilled"
        assert isinstance(student, Student)
        assert student.every == 2
        assert others == PUBLISHED
        assert recipe.evaluate == [*EVALUATORS, Imdb(train_rows=512), Rouge()]
        assert recipe.recovery == Finetune(tokens=24_576)
        assert recipe.seed == 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_reads_back_as_itself_and_goes_no_deeper_than_the_base(name: str) -> None:
    recipe = default_recipe(preset=name)
    assert read_recipe(recipe.to_json()) == recipe
    assert read_recipe({"extends": name}) == recipe
    assert default_recipe("other", preset=name) == recipe.with_base("other", None)
    labels = [variant.label for variant in default_recipe("shallow", tiny("gpt2", n_layer=5).decoder, name).variants]
    admitted = ["merged_2", "merged_4", "compressed_2", "compressed_4", "pruned_104M", "shared_4x8"]
    expected = {
        "full": ["distilled", *admitted],
        "published": [*admitted, *(label for label, _ in FITTED), "repaired_drop_6", "planned_82M"],
        "demo": DEMO,
    }
    assert labels == expected[name]
    one = tiny("gpt2", n_layer=1, n_positions=4096).decoder
    assert default_recipe("flat", one, name).variants == []
    with pytest.raises(
        ValueError, match=r"^unknown preset 'ful'; did you mean 'full'\? accepted: demo, full, published$"
    ):
        default_recipe(preset="ful")


@pytest.mark.parametrize(
    ("base", "loaded"),
    [
        ("gpt2", "distilgpt2"),
        ("openai-community/gpt2", "distilbert/distilgpt2"),
        ("gpt2-medium", None),
        ("./gpt2", None),
        (POCKET, None),
    ],
)
def test_the_published_student_stands_where_there_is_one(base: str, loaded: str | None) -> None:
    resolved = default_recipe(base, preset="full").for_base(tiny("gpt2"))
    (_, student), *others = rows(resolved)
    assert others == PUBLISHED
    if loaded is None:
        assert isinstance(student, Student)
    else:
        assert student == Load(loaded)
    assert read_recipe(resolved.to_json()) == resolved


# The command


class Asked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path]]:
    """What a study was to compare, and in which folder; it is not run."""
    found: list[tuple[Recipe, Path]] = []

    def run(self: Study, *_: Any) -> None:
        found.append((self.recipe, self.output_dir))
        raise Asked

    monkeypatch.setattr(Study, "run", run)
    return found


@pytest.mark.parametrize(
    ("words", "preset", "folder"),
    [
        ([], "demo", "pocket-demo"),
        (["--preset", "published"], "published", "pocket-published"),
        (["--preset", "full"], "full", "pocket-full"),
    ],
    ids=["none", "published", "full"],
)
def test_the_command_takes_a_preset(
    words: list[str], preset: str, folder: str, layerfold: Any, asked: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Asked):
        layerfold("study", *words, "--model", "pocket")
    ((recipe, output_dir),) = asked
    base = load(POCKET)
    assert recipe == default_recipe(POCKET, base.decoder, preset).for_base(base)
    assert output_dir == Path("runs") / folder
    named = {each.name: each for each in recipe.evaluate}
    assert named["perplexity"].corpus == "imdb"
    if preset == "full":
        assert (named["imdb"].data, named["rouge"].data) == ("imdb", "aclsum")
        assert recipe.recovery == Finetune(tokens=24_576, corpus="imdb")


def test_the_command_s_presets_are_those_that_there_are() -> None:
    assert get_args(Preset) == tuple(PRESETS)


def test_a_file_and_a_preset_are_one_line(layerfold: Any, write: Write, asked: Any) -> None:
    path = write("mine.yaml", "variants: []")
    outcome = layerfold("study", path, "--preset", "full")
    assert outcome.code == 2
    assert outcome.err.strip().endswith(f"recipe {str(path)!r} and preset 'full'; accepted: one of the two")
    assert len(outcome.err.strip().splitlines()) == 1
    assert asked == []


# What extends


def test_what_extends_a_preset_has_its_keys_where_it_has_none_of_its_own() -> None:
    before = {name: read_recipe({"extends": name}).to_json() for name in PRESETS}
    recipe = read_recipe({"extends": "full", "base": "gpt2", "evaluate": ["size"]})
    assert rows(recipe) == rows(default_recipe(preset="full"))
    assert recipe.recovery == Finetune(tokens=24_576)
    assert (recipe.base, recipe.evaluate) == ("gpt2", [Size()])
    assert "extends" not in recipe.to_json()
    under = read_recipe({"extends": "full", "recovery": None, "calibration": {"tokens": 99}})
    assert (under.recovery, under.calibration.tokens) == (None, 99)
    own = read_recipe({"extends": "full", "variants": [{"label": "a", "merge": {"n": 2}}]})
    assert rows(own) == [("a", Merge(n=2))], "in place of the others, not beside them"
    distilled = read_recipe({"extends": "full", "recovery": {"distill": {"tokens": 1000}}})
    assert distilled.to_json()["recovery"].keys() == {"distill"}
    document = {"extends": "full", "variants": []}
    read_recipe(document)
    assert document == {"extends": "full", "variants": []}
    assert {name: read_recipe({"extends": name}).to_json() for name in PRESETS} == before


def test_a_file_extends_another_beside_it_wherever_one_stands(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("recipes/common/base.yaml", "extends: full\nbase: gpt2\nseed: 3\nevaluate: [size]")
    write("recipes/middle.yaml", "extends: common/base.yaml\nseed: 4\nrecovery:")
    path = write("recipes/mine.yml", "extends: middle.yaml\nvariants: []")
    write("elsewhere/middle.yaml", "variants: []\nbase: wrong")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in (path, Path("..") / "recipes" / "mine.yml", "../recipes/mine.yml"):
        recipe = read_recipe(given)
        assert (recipe.base, recipe.seed, recipe.recovery, recipe.variants) == ("gpt2", 4, None, [])
        assert recipe.evaluate == [Size()]
    absolute = write("other/far.yaml", f"extends: {path}")
    assert read_recipe(absolute) == read_recipe(path)
    assert read_recipe({"extends": str(path)}) == read_recipe(path)


def test_a_preset_s_name_is_the_preset_though_a_file_is_called_so(write: Write) -> None:
    write("full", "variants: []")
    write("full.yaml", "variants: []")
    assert len(read_recipe(write("one.yaml", "extends: full")).variants) == 13
    assert read_recipe(write("two.yaml", "extends: full.yaml")).variants == []


@pytest.mark.parametrize(
    ("under", "own", "seed", "seeds"),
    [
        ("seed: 3", "", 3, None),
        ("seeds: [1, 2]", "", 0, [1, 2]),
        ("seed: 3", "seeds: [1, 2]", 0, [1, 2]),
        ("seeds: [1, 2]", "seed: 3", 3, None),
        ("seeds: [1, 2]", "seeds: [5]", 0, [5]),
        ("seed: 3", "seed: 0", 0, None),
    ],
)
def test_one_s_own_seed_or_seeds_are_in_place_of_either(
    under: str, own: str, seed: int, seeds: list[int] | None, write: Write
) -> None:
    write("under.yaml", f"variants: []\n{under}")
    recipe = read_recipe(write("own.yaml", f"extends: under.yaml\n{own}"))
    assert (recipe.seed, recipe.seeds) == (seed, seeds)


def test_both_a_seed_and_seeds_are_refused_though_they_come_from_one_file(write: Write) -> None:
    with pytest.raises(RecipeError, match="seed and seeds; accepted: one of the two"):
        read_recipe(write("both.yaml", "extends: demo\nseed: 1\nseeds: [1, 2]"))


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"], ["one", "link"]], ids="-".join)
def test_what_comes_back_to_itself_is_refused(names: list[str], write: Write, tmp_path: Path) -> None:
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        if name != "link":
            path = write(f"{name}.yaml", f"extends: ./{following}.yaml\nvariants: []")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "one.yaml")
    with pytest.raises(RecipeError, match="extends comes back to") as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("ful", "extends 'ful'; did you mean 'full'? accepted: a .yaml file, demo, full, published"),
        ("none.yaml", "none.yaml' cannot be read: No such file"),
        ("[demo]", "extends \"['demo']\"; did you mean 'demo'? accepted"),
        ("", "extends 'None'; accepted"),
        ("3", "extends '3'; accepted"),
        ("list.yaml", "list.yaml' holds list; accepted: keys"),
        ("broken.yaml", "broken.yaml' is not YAML at line"),
    ],
)
def test_what_cannot_be_extended_is_one_line(extends: str, said: str, write: Write) -> None:
    write("list.yaml", "- a")
    write("broken.yaml", "a: [")
    with pytest.raises(RecipeError) as caught:
        read_recipe(write("mine.yaml", f"variants: []\nextends: {extends}"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_in_a_file_that_is_extended_is_said(write: Write) -> None:
    write("under.yaml", "varaints: []")
    with pytest.raises(RecipeError, match=r"unknown key 'varaints'; did you mean 'variants'\?"):
        read_recipe(write("mine.yaml", "extends: under.yaml\nvariants: []"))


# The files


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_in_the_repository_fit_pocket(path: Path, pocket: Decoder) -> None:
    recipe = read_recipe(path)
    for _, source in rows(recipe):
        source.resolved(pocket)
    assert read_recipe(recipe.to_json()) == recipe


def test_there_are_recipes() -> None:
    assert {"quickstart", "pruned_104M", "recovery", "share"} <= {path.stem for path in RECIPES}
