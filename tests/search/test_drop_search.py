from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, tiny

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.evaluators import Perplexity
from layerfold.evaluators.perplexity import versus
from layerfold.methods import Drop
from layerfold.search import DropSearch, best_drop


@pytest.fixture
def search(study_corpus: str) -> Any:
    def search(**settings: Any) -> DropSearch:
        few = {"corpus": study_corpus, "tokens": 200, "test_tokens": 150, "rounds": 0}
        return DropSearch(**few | settings)

    return search


def built(model: Model, removed: tuple[int, ...]) -> Model:
    copied = model.copy()
    Drop(blocks=removed).apply(copied.decoder, None)
    return copied


def test_candidates_are_scored_on_selection_text_and_the_best_on_test_text(
    search: Any, searched: Any, study_corpus: str
) -> None:
    model = tiny("gpt2")
    found = searched(search(remove=(1, 2)))
    selection = Perplexity(corpus=study_corpus, split="validation", limit_tokens=200)
    test = Perplexity(corpus=study_corpus, split="test", limit_tokens=150)
    assert [candidate.removed for candidate in found.candidates] == [
        *[(i,) for i in range(BLOCKS)],
        *[(i, j) for i in range(BLOCKS) for j in range(i + 1, BLOCKS)],
    ]
    assert found.base.perplexity == pytest.approx(selection(model).value, rel=1e-5)
    for candidate in found.candidates:
        one = built(model, candidate.removed)
        assert candidate.perplexity == pytest.approx(selection(one).value, rel=1e-5)
        assert candidate.blocks == one.decoder.n_blocks
        assert candidate.parameters == one.decoder.size().parameters
    base = test(model)
    for count, candidate in found.best.items():
        alike = [each for each in found.candidates if len(each.removed) == count]
        assert candidate == min(alike, key=lambda each: each.perplexity)
        judged, score = found.tests[candidate.removed], test(built(model, candidate.removed))
        ratio = versus(score.to_json(), base.to_json())
        assert ratio is not None
        assert judged.perplexity.value == pytest.approx(score.value, rel=1e-5)
        assert judged.perplexity.low == pytest.approx(score.low, rel=1e-4)
        assert judged.versus_base.high == pytest.approx(ratio["high"], rel=1e-4)
    assert set(found.tests) == {(), *(candidate.removed for candidate in found.best.values())}
    assert found.tests[()].versus_base.low == found.tests[()].versus_base.high == 1


@pytest.mark.parametrize(
    ("part", "most", "blocks"), [("block", BLOCKS - 1, 1), ("attention", BLOCKS, BLOCKS), ("ffn", BLOCKS, BLOCKS)]
)
def test_all_removes_every_number_that_leaves_a_block(search: Any, part: str, most: int, blocks: int) -> None:
    found = search(remove=None, part=part)(tiny("llama"))
    assert list(found.best) == list(range(1, most + 1))
    assert (
        len(found.candidates)
        == sum(1 for c in found.candidates if len(c.removed) <= most)
        == 2**BLOCKS - (2 if part == "block" else 1)
    )
    assert found.best[most].blocks == blocks


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("race", [False, True])
def test_other_strategies_look_at_less(search: Any, searched: Any, strategy: str, race: bool) -> None:
    deep = {"n_layer": 7, "n_embd": 16, "n_head": 2}
    whole = searched(search(remove=None), **deep)
    found = searched(search(remove=(1, 4), strategy=strategy, width=2, race=race), **deep)
    assert list(found.best) == [1, 2, 3, 4]
    assert found.best[1] == whole.best[1]
    assert len(found.candidates) + found.eliminated < len(whole.candidates) / 2
    assert {c.removed: c.perplexity for c in found.candidates}.items() <= {
        c.removed: c.perplexity for c in whole.candidates
    }.items()


def test_depths_are_timed_once_each_and_not_again(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(remove=(1, 2), rounds=3)(tiny("gpt2"), tmp_path / "run")
    assert list(found.timings) == [0, 1, 2]
    same = found.timings[0].speedup  # of a copy of the model
    assert 0 < same.low <= same.value <= same.high
    assert found.speed_change_percent(found.base) == 0
    timing = found.timings[2]
    assert timing.milliseconds.low <= timing.milliseconds.value <= timing.milliseconds.high
    for candidate in found.candidates:
        if len(candidate.removed) == 2:
            assert found.speed_change_percent(candidate) == pytest.approx(100 * (1 / timing.speedup.value - 1))
    monkeypatch.setattr("layerfold.search.judging.Latency.compare", None)
    assert search(remove=(1, 2), rounds=3)(tiny("gpt2"), tmp_path / "run").timings == found.timings
    untimed = search()(tiny("gpt2"))
    assert untimed.timings == {}
    assert untimed.to_json()["candidates"][0]["milliseconds"] is None


def test_a_candidate_that_is_broken_has_no_figure(search: Any) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.decoder.blocks[0].module.mlp.down_proj.weight.fill_(float("nan"))
        model.decoder.blocks[2].module.mlp.down_proj.weight.fill_(float("nan"))
    document = search(remove=None)(model).to_json()
    assert document["base"]["perplexity"] is None
    assert set(document["best"]["2"]["removed"]) == {0, 2}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_too_many_candidates_are_refused_at_once(search: Any) -> None:
    model = tiny("gpt2", n_layer=48, n_embd=16, n_head=2)
    with pytest.raises(InputError, match=r"18,472 candidates; accepted: 10,000 at most; take strategy beam"):
        search(remove=(1, 3), corpus="/nowhere/text.txt")(model)  # before the text is looked for
    found = search(remove=(1, 2), strategy="beam", width=1, race=True, tokens=64)(model)
    assert len(found.best[2].removed) == 2


@pytest.fixture
def file(search: Any, searched: Any, tmp_path: Path) -> Path:
    """What a search for FFNs to remove found."""
    document = searched(search(remove=(1, 2), part="ffn")).to_json()
    (tmp_path / "search.json").write_text(json.dumps(document))
    return tmp_path / "search.json"


def test_the_best_drop_is_that_of_a_number_which_need_not_be_named_where_there_is_one(
    file: Path, search: Any, searched: Any
) -> None:
    drop = best_drop(file, tiny("gpt2"), 2)
    assert drop.indices(BLOCKS) == list(searched(search(remove=(1, 2), part="ffn")).best[2].removed)
    assert drop.part == "ffn"
    found = searched(search())
    file.write_text(json.dumps(found.to_json()))
    assert best_drop(file, tiny("gpt2")).indices(BLOCKS) == list(found.best[1].removed)


@pytest.mark.parametrize(
    ("changes", "seed", "remove", "said"),
    [
        *(({}, 0, each, rf"remove {each}; accepted: what the search .* tells of: 1, 2") for each in (None, 3, 0)),
        ({}, 1, 1, r"of another model: weights .*these are [0-9a-f]{12}"),
        ({"format_version": 2}, 0, 1, "is of version 2; accepted: 1"),
    ],
)
def test_a_search_that_does_not_tell_is_refused(
    file: Path, changes: dict[str, Any], seed: int, remove: int | None, said: str
) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=said):
        best_drop(file, tiny("gpt2", seed=seed), remove)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '"drop"', '{"format_version": 1}', "\x00", '{"format_version": 1, "best": {"x": {}}}'],
)
def test_a_file_that_is_no_search_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(InputError, match=r"cannot be read \(.*\); accepted: a search\.json"):
        best_drop(tmp_path / "search.json", tiny("gpt2"), 1)
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\)"):
        best_drop(tmp_path / "none.json", tiny("gpt2"), 1)


def test_a_search_of_what_a_drop_left(search: Any) -> None:
    model = tiny("gpt2", n_layer=6)
    Drop(blocks="1", part="attention").apply(model.decoder, None)
    found = search(part="attention", remove=(1, 1))(model)
    assert [candidate.removed for candidate in found.candidates] == [(0,), (2,), (3,), (4,), (5,)]
    assert (found.parts, found.base.blocks) == (5, 6)
