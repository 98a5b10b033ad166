"""Searches whose candidates are repaired, against what `compress` makes of each."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BLOCKS, Write, prose, tiny

import layerfold
from layerfold.calibration import calibration_windows
from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, ModelError
from layerfold.evaluators import Perplexity
from layerfold.evaluators.perplexity import versus
from layerfold.methods import Drop, Merge
from layerfold.repair.refit import refit_
from layerfold.search import DropSearch, Found, best_drop
from layerfold.search import drop as drop_search
from layerfold.search.repaired import Repairs
from layerfold.search.scores import Scores

CALIBRATION = 1200
Removed = tuple[int, ...]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with documents enough for all four splits."""
    path = tmp_path_factory.mktemp("text") / "study.txt"
    path.write_text("\n\n".join(prose(30, seed) for seed in range(60)))
    return str(path)


@pytest.fixture
def search(text: str) -> Callable[..., DropSearch]:
    def search(**settings: Any) -> DropSearch:
        few = {"tokens": 200, "test_tokens": 150, "calibration_tokens": CALIBRATION, "rounds": 0, "finalists": 1}
        return DropSearch(**{"corpus": text, "objective": "repaired"} | few | settings)

    return search


@functools.cache
def searched(search: DropSearch, family: str = "gpt2") -> Found:
    """What it finds of the model of four blocks, in no folder."""
    return search(tiny(family))


@functools.cache
def whole(family: str, removed: Removed, text: str, seed: int = 0) -> Model:
    """A candidate as `compress` repairs it; without blocks to remove, the model as it is."""
    if not removed:
        return tiny(family)
    settings: dict[str, Any] = {"repair": "refit+attention", "repair_tokens": CALIBRATION, "seed": seed}
    return layerfold.compress(tiny(family), Drop(blocks=removed), corpus=text, **settings)


def selection(model: Model, text: str) -> float:
    return Perplexity(corpus=text, split="validation", limit_tokens=200)(model).value


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("done once more")


def rows(found: Found) -> dict[Removed, float]:
    return {each.removed: each.perplexity for each in found.candidates}


@pytest.mark.parametrize(("family", "finalists"), [("gpt2", 1), ("gpt2", 4), ("llama", 2)])
def test_the_best_finalist_is_chosen_by_its_whole_repair_and_tested(
    family: str, finalists: int, search: Any, text: str
) -> None:
    found = searched(search(remove=(2, 3), finalists=finalists), family)
    test = Perplexity(corpus=text, split="test", limit_tokens=150)
    base = test(tiny(family)).to_json()
    for count in (2, 3):
        quick = sorted((each for each in found.candidates if len(each.removed) == count), key=lambda x: x.perplexity)
        assert len(quick) == comb(BLOCKS, count)
        perplexities = {each.removed: selection(whole(family, each.removed, text), text) for each in quick[:finalists]}
        best = found.best[count]
        assert best.removed == min(perplexities, key=perplexities.__getitem__)
        assert best.perplexity == pytest.approx(perplexities[best.removed], rel=1e-5)
        assert best.blocks == BLOCKS - count
        assert best.parameters == whole(family, best.removed, text).decoder.size().parameters
        score, judged = test(whole(family, best.removed, text)), found.tests[best.removed]
        ratio = versus(score.to_json(), base)
        assert ratio is not None
        assert judged.perplexity.value == pytest.approx(score.value, rel=1e-5)
        assert judged.perplexity.high == pytest.approx(score.high, rel=1e-4)
        assert judged.versus_base.low == pytest.approx(ratio["low"], rel=1e-4)
    assert set(found.tests) == {(), *(each.removed for each in found.best.values())}
    assert found.base.perplexity == pytest.approx(selection(tiny(family), text), rel=1e-5)
    assert found.base.kl == pytest.approx(0, abs=1e-6)


def test_more_finalists_may_choose_otherwise(search: Any) -> None:
    one, many = (search(remove=(2, 2), finalists=number)(tiny("gpt2", seed=6)) for number in (1, 6))
    assert one.candidates == many.candidates
    assert many.best[2].removed != one.best[2].removed  # of this model and text
    assert many.best[2].perplexity <= one.best[2].perplexity


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_candidates_are_closer_to_the_model_than_without_a_repair(family: str, search: Any) -> None:
    repaired, plain = (search(remove=None, objective=each)(tiny(family)) for each in ("repaired", "perplexity"))
    was = {each.removed: each.kl for each in plain.candidates}
    assert was.keys() == rows(repaired).keys()
    for each in repaired.candidates:
        if each.removed == tuple(range(len(each.removed))):  # nothing stands for the first ones
            assert each.kl == pytest.approx(was[each.removed], rel=1e-5)
        elif each.removed[0] > 0:
            assert each.kl < 0.9 * was[each.removed], each
    assert repaired.base == plain.base
    assert repaired.tests[()] == plain.tests[()]


def test_the_test_text_takes_no_part_in_choosing(search: Any) -> None:
    one, two = (search(remove=(1, 2), test_tokens=tokens)(tiny("gpt2")) for tokens in (150, 90))
    assert one.tests != two.tests
    assert (one.best, one.candidates) == (two.best, two.candidates)


@functools.cache
def of_six_blocks(search: DropSearch) -> Found:
    return search(tiny("gpt2", n_layer=6, n_embd=16, n_head=2))


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_other_strategies_repair_the_best_of_what_they_look_at(search: Any, strategy: str, race: bool) -> None:
    every = of_six_blocks(search(remove=(1, 3)))
    some = of_six_blocks(search(remove=(1, 3), strategy=strategy, width=3, race=race))
    assert list(some.best) == [1, 2, 3]
    assert some.best[1] == every.best[1]
    assert len(some.candidates) + some.eliminated < len(every.candidates)
    for removed, perplexity in rows(some).items():
        assert perplexity == pytest.approx(rows(every)[removed], rel=1e-5)


def test_a_race_finds_the_same(search: Any, write: Write) -> None:
    """On text enough for a race to be sure of something before its end."""
    corpus = str(write("long.txt", "\n\n".join(prose(60, seed) for seed in range(300))))
    settings = {"remove": (2, 2), "tokens": 5_000, "corpus": corpus}
    every, raced = (of_six_blocks(search(**settings, race=race)) for race in (False, True))
    assert raced.best == every.best
    assert raced.tests == every.tests
    assert raced.eliminated > 0


def test_a_search_in_its_folder_measures_nothing_again(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(remove=(1, 3))(tiny("gpt2"), tmp_path / "run").to_json()
    document = json.loads((tmp_path / "run" / "search.json").read_text())
    assert document == json.loads(json.dumps(first, allow_nan=False))
    assert [row["kl"] for row in document["best"].values()] == [None, None, None]
    assert all(row["kl"] > 0 for row in document["candidates"])
    assert (document["settings"]["repair"]["level"], document["settings"]["finalists"]) == ("refit+attention", 1)
    drop = best_drop(tmp_path / "run" / "search.json", tiny("gpt2"), 2)
    assert list(drop.indices(BLOCKS)) == document["best"]["2"]["removed"]
    monkeypatch.setattr(Scores, "_step", refuse)
    monkeypatch.setattr(Repairs, "repaired", refuse)
    assert search(remove=(1, 3))(tiny("gpt2"), tmp_path / "run").to_json() == first
    assert len(list((tmp_path / "run").glob("scores-*"))) == 4
    monkeypatch.undo()
    monkeypatch.setattr(Repairs, "repaired", refuse)  # whole repairs are kept whatever the number removed
    search(remove=(1, 2))(tiny("gpt2"), tmp_path / "run")


def test_a_search_that_was_interrupted_goes_on(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Removed] = []
    repaired = Repairs.repaired

    def counting(self: Repairs, removed: Removed) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(removed)
        return repaired(self, removed)

    with monkeypatch.context() as patch:
        patch.setattr(Repairs, "repaired", counting)
        with pytest.raises(KeyboardInterrupt):
            search(remove=(1, 2), finalists=2)(tiny("gpt2"), tmp_path / "run")
    before, asked[:] = list(asked), []
    with monkeypatch.context() as patch:
        patch.setattr(Repairs, "repaired", counting)
        found = search(remove=(1, 2), finalists=2)(tiny("gpt2"), tmp_path / "run")
    assert len(before) == 3
    assert set(asked) - set(before)  # what was to come
    assert len(asked) <= 2  # and at most the winner, once more, as it is to be tested
    assert found.to_json() == searched(search(remove=(1, 2), finalists=2)).to_json()


@pytest.mark.parametrize(
    "other",
    [{"objective": "perplexity"}, {"calibration_tokens": 200}, {"seed": 1}, {"remove": (1, 3)}],
    ids=str,
)
def test_what_another_search_measured_is_not_taken_for_its_own(search: Any, tmp_path: Path, other: Any) -> None:
    run = tmp_path / "run"
    one, two = (search(**{"remove": (1, 2), "finalists": 1} | each) for each in ({}, other))
    assert two(tiny("gpt2"), run).to_json() == searched(two).to_json()
    assert one(tiny("gpt2"), run).to_json() == searched(one).to_json()
    if "remove" not in other:
        assert rows(searched(two)) != rows(searched(one))


def test_another_protocol_is_measured_anew(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search()(tiny("gpt2"), tmp_path / "run")
    monkeypatch.setattr(drop_search, "PROTOCOL", "drop-of-tomorrow")
    search()(tiny("gpt2"), tmp_path / "run")
    assert len(list((tmp_path / "run").glob("scores-*"))) == 2 * 4


def test_ffns_that_are_one_are_counted_once(search: Any, text: str) -> None:
    model = tiny("gpt2")
    Merge(n=2, align="none", tie=True).apply(model.decoder, None)
    found = search(remove=(1, 2))(model)
    for candidate in (*found.candidates, *found.best.values()):
        one = model.copy()
        Drop(blocks=candidate.removed).apply(one.decoder, None)
        assert candidate.parameters == one.decoder.size().parameters
    calibration = calibration_windows(model, text, CALIBRATION, 0)
    for count, candidate in found.best.items():
        one, kept = model.copy(), [index for index in range(BLOCKS) if index not in candidate.removed]
        one.decoder.keep_(kept)
        refit_(one.decoder, model.decoder, [*kept[1:], BLOCKS], calibration, attention=True)
        assert candidate.perplexity == pytest.approx(selection(one, text), rel=1e-5), count


def test_a_finalist_that_is_not_finite_comes_last(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    repaired, seen = Repairs.repaired, []

    def breaking(self: Repairs, removed: Removed) -> Any:
        assert len(self.edited.held) <= 1  # the best so far
        found = repaired(self, removed)
        if not seen:
            torch.nn.init.constant_(next(found.blocks[0].module.parameters()), np.nan)
        seen.append(removed)
        return found

    monkeypatch.setattr(Repairs, "repaired", breaking)
    found = search(remove=(2, 2), finalists=3)(tiny("gpt2"))
    assert len(seen) == 3
    assert found.best[2].removed in seen[1:]
    assert np.isfinite(found.best[2].perplexity)


def test_a_model_that_was_in_training_is_repaired_without_dropout(search: Any) -> None:
    settings = {"resid_pdrop": 0.5, "embd_pdrop": 0.5}
    model, still = tiny("gpt2", **settings), tiny("gpt2", **settings)
    model.decoder.model.train()
    assert search(remove=(1, 2))(model).to_json() == search(remove=(1, 2))(still).to_json()


def test_a_model_or_corpus_that_cannot_be_repaired_with(search: Any, tmp_path: Path) -> None:
    for split in ("validation", "test"):
        (tmp_path / f"{split}.txt").write_text("\n\n".join(prose(30, seed + len(split)) for seed in range(6)))
    with pytest.raises(CorpusError, match="no documents in split 'calibration'"):
        search(corpus=str(tmp_path))(tiny("gpt2"))
    model = tiny("llama")
    with torch.no_grad():
        model.decoder.blocks[2].module.mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="activations on the calibration text are not finite"):
        search()(model)
