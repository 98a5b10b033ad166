"""The search for groups to average, against averaging each grouping and measuring it from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import flat, selection
from tiny import FAMILY_NAMES, Write, prose, tiny

import layerfold
from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, InputError
from layerfold.evaluators import Perplexity
from layerfold.methods import Collapse, Merge, Share
from layerfold.methods.average import spelled
from layerfold.search import WindowSearch
from layerfold.search.auto import selection_text
from layerfold.search.groups import search
from layerfold.search.scores import Scores
from layerfold.search.stages import Averaged, Blocks, Fetched
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

METHOD = pytest.mark.parametrize("method", [Merge, Collapse])
PLAIN: dict[str, Any] = {"groups": "auto", "align": "none"}


def deep(name: str, depth: int) -> Model:
    return tiny(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": depth})


def compress(model: Model, method: Merge | Collapse, corpus: str, **settings: Any) -> Model:
    return layerfold.compress(model, method, corpus=corpus, tokens=512, repair_tokens=512, **settings)


def selected(model: Model, corpus: str) -> float:
    """Perplexity on the selection text, from scratch."""
    return float(selection_text(model, corpus)(model).value)


def last(model: Model) -> dict[str, Any]:
    step: dict[str, Any] = model.provenance.steps[-1]
    return step


def spelling(depth: int, joined: Blocks) -> str:
    return spelled(Averaged(deep("gpt2", depth).decoder, None).groups(joined))


class Scratch:
    """Every grouping of a model that joins so many blocks, averaged and measured by itself."""

    def __init__(self, name: str, depth: int, method: Merge | Collapse, number: int, corpus: str) -> None:
        self.perplexity = {
            spelling(depth, joined): selected(
                compress(deep(name, depth), replace(method, n=None, groups=spelling(depth, joined)), corpus),
                corpus,
            )
            for joined in combinations(range(1, depth), number)
        }
        self.best = min(self.perplexity, key=lambda groups: self.perplexity[groups])


@pytest.mark.parametrize(
    ("name", "method"),
    [("gpt2", Merge(n=2, **PLAIN)), ("qwen2", Collapse(n=2, anchor="last", **PLAIN))],
    ids=["merge", "collapse"],
)
def test_of_all_groupings_of_five_blocks_the_best_is_found(
    study_corpus: str, name: str, method: Merge | Collapse
) -> None:
    every = Scratch(name, 5, method, 2, study_corpus)
    model = compress(deep(name, 5), method, study_corpus)
    step = last(model)
    noted = step["notes"]["search"]
    assert noted["perplexity"] == pytest.approx(
        {each: every.perplexity[each] for each in noted["perplexity"]}, rel=1e-5
    )
    assert next(iter(noted["perplexity"])) == "0-1,2-3"
    assert every.perplexity[step["method"]["groups"]] >= every.perplexity[every.best]
    assert step["method"]["groups"] == every.best  # true of these models: the search may miss it in others
    assert selected(model, study_corpus) == pytest.approx(every.perplexity[every.best], rel=1e-6)
    assert noted["scored"] <= 4 + len(every.perplexity)


@pytest.mark.parametrize(
    ("method", "depth", "n"),
    [(Merge, 5, 2), (Merge, 5, 4), (Merge, 4, 4), (Collapse, 6, 2), (Collapse, 5, 3), (Collapse, 2, 2)],
)
def test_as_many_are_left_as_published_and_none_is_worse(
    study_corpus: str, method: type[Merge | Collapse], depth: int, n: int
) -> None:
    base = deep("gpt2", depth)
    published, found = (
        compress(base, method(n=n, align="none", **groups), study_corpus) for groups in ({}, {"groups": "auto"})
    )
    assert found.decoder.n_blocks == published.decoder.n_blocks
    groups = replace(method(n=n), n=None, groups=last(found)["method"]["groups"]).group_indices(depth)
    members = [index for group in groups for index in group]
    assert members == sorted(set(members))
    assert set(members) <= set(range(depth))
    assert depth - len(members) + len(groups) == -(-depth // n)
    assert selected(found, study_corpus) <= selected(published, study_corpus) * (1 + 1e-6)
    assert set(last(found)["method"]) == set(last(published)["method"]), "nothing is left to search"


@pytest.mark.parametrize(
    ("method", "anchor", "family"),
    [
        (method, ("first", "middle", "last")[(place + (method is Merge)) % 3], family)
        for place, family in enumerate(FAMILY_NAMES)
        for method in (Merge, Collapse)
        if family == "gpt2" or place % 2 == (method is Merge)
    ],
)
def test_what_is_scored_is_what_compress_makes(
    study_corpus: str, method: type[Merge | Collapse], anchor: Any, family: str
) -> None:
    model = compress(deep(family, 5), method(n=3, groups="auto", anchor=anchor), study_corpus)
    noted = last(model)["notes"]["search"]["perplexity"]
    assert selected(model, study_corpus) == pytest.approx(noted[last(model)["method"]["groups"]], rel=1e-5)
    published = compress(deep(family, 5), method(n=3, anchor=anchor), study_corpus)
    assert selected(published, study_corpus) == pytest.approx(noted["0-2,3-4"], rel=1e-5)


@METHOD
def test_the_model_is_left_as_it_was_and_the_same_is_found_again(
    study_corpus: str, method: type[Merge | Collapse]
) -> None:
    base = deep("llama", 4)
    Merge(groups="1-2", align="none", tie=True).apply(base.decoder, None)  # what is tied is not written through either
    tensors = dict(base.decoder.model.named_parameters(remove_duplicate=False))
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    auto = method(groups="auto")
    one, two = (compress(base, auto, study_corpus) for _ in range(2))
    named = compress(base, method(groups=last(one)["method"]["groups"]), study_corpus)
    for name, tensor in base.decoder.model.named_parameters(remove_duplicate=False):
        assert tensor is tensors[name]
        assert torch.equal(tensor, before[name])
    assert one.sha256 == two.sha256 == named.sha256
    assert compress(base.copy(), auto, study_corpus, in_place=True).sha256 == one.sha256
    assert "search" not in last(named)["notes"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_averaged_ffn_is_in_memory_whatever_the_number_of_groups(
    name: str, study_corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, made, seen = deep(name, 5), list[Fetched](), []
    ffn = sum(tensor.numel() for tensor in base.decoder.blocks[0].ffn.tensors())
    own = {id(parameter) for parameter in base.decoder.model.parameters()}
    init, run = Fetched.__init__, Fetched.run

    def noted(self: Fetched, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    def watched(self: Fetched, index: int, hidden: torch.Tensor) -> torch.Tensor:
        left = run(self, index, hidden)
        parameters = [p for each in made for p in each.decoder.model.parameters() if id(p) not in own]
        held = {id(p): p.untyped_storage().nbytes() // 4 for p in parameters if p.untyped_storage().nbytes() > 4}
        seen.append(sum(held.values()))
        return left

    monkeypatch.setattr(Fetched, "__init__", noted)
    monkeypatch.setattr(Fetched, "run", watched)
    compress(base, Merge(groups="auto"), study_corpus, in_place=True)
    assert len(made) > 5
    assert set(seen) == {ffn}


@pytest.mark.parametrize("settings", [{"repair": "refit+attention"}, {"repair": "rescale"}, {}], ids=str)
def test_with_a_repair_and_tied(study_corpus: str, settings: dict[str, Any]) -> None:
    base = deep("gpt2", 4)
    auto = Merge(groups="auto", tie=True)
    found = compress(base, auto, study_corpus, **settings)
    groups = found.provenance.steps[0]["method"]["groups"]
    assert compress(base, replace(auto, groups=groups), study_corpus, **settings).sha256 == found.sha256
    plain = compress(base, replace(auto, tie=False), study_corpus)
    assert last(plain)["method"]["groups"] == groups, "neither ties nor repairs change what is scored"
    ffn = sum(tensor.numel() for tensor in base.decoder.blocks[0].ffn.tensors())
    assert found.decoder.size().parameters == base.decoder.size().parameters - 2 * ffn


def test_a_block_whose_ffn_is_of_another_width_is_left_alone(study_corpus: str) -> None:
    base = deep("gpt2", 6)
    base.decoder.keep_neurons_({0: torch.arange(7)})
    model = compress(base, Merge(**PLAIN), study_corpus)
    noted = last(model)["notes"]["search"]
    assert list(noted["perplexity"]) == [last(model)["method"]["groups"]], "the published grouping has no average"
    assert model.decoder.d_ffn[0] == 7
    assert selected(model, study_corpus) == pytest.approx(*noted["perplexity"].values(), rel=1e-5)


def test_too_few_ffns_of_one_width() -> None:
    decoder = tiny("gpt2").decoder
    decoder.keep_neurons_({1: torch.arange(7)})
    with pytest.raises(InputError) as raised:
        Merge(groups="auto").resolved(decoder)
    assert str(raised.value) == (
        "groups auto with n 2 would leave 2 of 4 blocks, and no fewer than 3 can be left: blocks 0 and 1 have 128 and "
        "7 neurons; accepted: as many"
    )


@pytest.mark.parametrize(
    "given", [replace(Merge(n=2), groups="0-1", n=None), Collapse(n=2), Share(window="1:2", rank=2)]
)
def test_groups_and_windows_that_are_given_are_not_searched_for(
    study_corpus: str, monkeypatch: pytest.MonkeyPatch, given: Merge | Collapse | Share
) -> None:
    monkeypatch.setattr(Scores, "measure", None)
    made = layerfold.compress(tiny("gpt2"), given, corpus=study_corpus, tokens=512)
    assert "search" not in last(made)["notes"]


def chosen(cost: Any, joins: Sequence[int], published: Blocks) -> tuple[Blocks, list[Blocks]]:
    scores = flat(cost)
    raced, whole = (selection(scores, race=race) for race in (True, False))
    found = search(lambda some: raced({0: some}, 1)[0][0], lambda some: whole({0: some}, 1)[0][0], joins, published)
    return found, [each for each, _ in scores.asked]


class TestMadeUp:
    """What the search looks at, with figures that are made up."""

    def test_joins_that_cost_alone_what_they_cost_together(self) -> None:
        found, asked = chosen(lambda joined: 3 + sum(0.1 * each for each in joined), range(1, 8), (1, 3, 5, 7))
        assert found == (1, 2, 3, 4)
        assert (1, 3, 5, 7) in asked

    def test_what_was_joined_first_is_moved_where_that_helps(self) -> None:
        def trap(joined: Blocks) -> float:
            return 1 + 0.01 * sum(joined) if {2, 4} <= set(joined) else 3 + (1 not in joined) + 0.1 * sum(joined)

        found, _ = chosen(trap, range(1, 6), (1, 3))
        assert found == (2, 4)

    def test_the_published_grouping_is_taken_where_nothing_near_what_grew_is_better(self) -> None:
        def lone(joined: Blocks) -> float:
            return 1.0 if joined == (1, 3, 5) else 3 + 0.1 * sum(7 - each for each in joined)

        assert chosen(lone, range(1, 7), (1, 3, 5))[0] == (1, 3, 5)

    def test_what_may_not_be_joined_is_not(self) -> None:
        found, asked = chosen(lambda joined: 3 + sum(0.1 * each for each in joined), (2, 3, 5), (1, 3))
        assert found == (2, 3)
        assert all(set(each) <= {2, 3, 5} for each in asked)

    def test_figures_that_are_none(self) -> None:
        assert len(chosen(lambda _: float("nan"), range(1, 6), (1, 3, 5))[0]) == 3


class TestStudy:
    """A recipe that leaves groups and a window to a search."""

    def study(self, corpus: str, folder: Path, test: str | None = None) -> Study:
        recipe = {
            "variants": [
                {"label": "merged", "merge": {"groups": "auto", "n": 2}},
                {"label": "collapsed", "collapse": {"groups": "auto"}, "repair": "refit"},
                {"label": "shared", "share": {"window": "auto", "k": 2, "rank": 2}},
            ],
            "evaluate": ["size", {"perplexity": {"corpus": test or corpus, "limit_tokens": 200}}],
            "calibration": {"corpus": corpus, "tokens": 512, "repair_tokens": 512},
        }
        assert read_recipe(read_recipe(recipe).to_json()).to_json() == read_recipe(recipe).to_json()
        return Study(read_recipe(recipe), folder, base=tiny("gpt2"))

    def test_it_takes_what_the_search_finds_and_measures_once(
        self, searched: Any, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = self.study(study_corpus, tmp_path / "run")
        records = {(record.label, record.evaluator): record for record in study.run()}
        text = Perplexity(corpus=study_corpus, split="validation", limit_tokens=16_384).windows(tiny("gpt2"))
        for label in ("merged", "collapsed", "shared"):
            record = records[label, "perplexity"]
            assert record.notes["search"]["text"]["tokens_sha256"] == record.subject["selection"] == text.sha256
        for label in ("merged", "collapsed"):
            record = records[label, "perplexity"]
            assert (record.subject["method"]["groups"], record.subject["method"]["n"]) == ("auto", 2)
            assert next(iter(record.notes["search"]["perplexity"])) == "0-1,2-3"
        assert records["collapsed", "size"].score["blocks"] == 2
        assert "repaired" in records["collapsed", "size"].notes
        settings: dict[str, Any] = {"k": (2, 2), "share": Share(rank=2), "calibration_tokens": 512}
        found = searched(WindowSearch(corpus=study_corpus, **settings))
        perplexities = records["shared", "perplexity"].notes["search"]["perplexity"]
        assert perplexities.keys() == {window.name for window in found.candidates}
        assert min(perplexities, key=perplexities.get) == found.best[2].name
        assert records["shared", "size"].score["parameters"] == found.best[2].parameters
        monkeypatch.setattr(Scores, "measure", None)
        assert list(self.study(study_corpus, tmp_path / "run").run()) == []

    def test_a_variant_that_the_base_does_not_admit_is_named(self, study_corpus: str, tmp_path: Path) -> None:
        recipe = read_recipe({"variants": [{"label": "deep", "merge": {"groups": "auto", "n": 9}}]})
        with pytest.raises(InputError, match=r"'deep': n 9 for a model of 4 blocks; accepted: 2 \.\.\. 4"):
            Study(recipe, tmp_path / "run", base=tiny("gpt2"))

    def test_selection_text_in_the_test_text_is_refused(self, study_corpus: str, tmp_path: Path, write: Write) -> None:
        document = Perplexity(corpus=study_corpus, split="validation").read(tiny("gpt2")).documents[0]
        held_out = write("other/test.txt", "\n\n".join([prose(40, 999), document])).parent
        with pytest.raises(CorpusError, match=r"1 documents stand in both .*study\.txt' validation and .*other' test"):
            list(self.study(study_corpus, tmp_path / "run", str(held_out)).run())
