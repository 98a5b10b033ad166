from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, deep, tiny

from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, InputError, OutputError
from layerfold.evaluators import Perplexity
from layerfold.evaluators.perplexity import versus
from layerfold.methods import Drop
from layerfold.search import DropSearch, Found, best_drop
from layerfold.search.scores import Scores
from layerfold.text.corpora import load_corpus


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


def test_candidates_are_scored_on_selection_text_and_the_best_on_test_text(search: Any, study_corpus: str) -> None:
    model = tiny("gpt2")
    found = search(remove=(1, 2))(model)
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


def test_selection_and_test_text_share_no_document(search: Any, study_corpus: str) -> None:
    found = search()(tiny("gpt2"))
    assert (found.text["split"], found.test_text["split"]) == ("validation", "test")
    selection, test = (load_corpus(study_corpus, split) for split in ("validation", "test"))
    assert found.text["corpus_sha256"] == selection.sha256
    assert found.test_text["corpus_sha256"] == test.sha256
    assert not set(selection.documents) & set(test.documents)


def test_the_objective_chooses(search: Any) -> None:
    found = search(remove=(2, 2), objective="kl")(tiny("gpt2"))
    assert found.best[2] == min(found.candidates, key=lambda candidate: candidate.kl)
    by_perplexity = search(remove=(2, 2))(tiny("gpt2"))
    assert by_perplexity.best[2].removed != found.best[2].removed  # this model and text were chosen so that they differ


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
def test_other_strategies_look_at_less(search: Any, strategy: str, race: bool) -> None:
    model = tiny("gpt2", n_layer=7, n_embd=16, n_head=2)
    whole = search(remove=None)(model)
    found = search(remove=(1, 4), strategy=strategy, width=2, race=race)(model)
    assert list(found.best) == [1, 2, 3, 4]
    assert found.best[1] == whole.best[1]
    assert len(found.candidates) + found.eliminated < len(whole.candidates) / 2
    assert {c.removed: c.perplexity for c in found.candidates}.items() <= {
        c.removed: c.perplexity for c in whole.candidates
    }.items()


def test_a_race_chooses_what_all_of_the_text_chooses(search: Any) -> None:
    model = tiny("gpt2", n_layer=7, n_embd=16, n_head=2)
    whole, raced = search(remove=None, tokens=2000)(model), search(remove=None, tokens=2000, race=True)(model)
    assert raced.best == whole.best
    assert raced.eliminated > 0
    assert raced.eliminated + len(raced.candidates) == len(whole.candidates)
    assert raced.work["scored_windows"] < raced.work["windows_of_all_candidates"] == whole.work["scored_windows"]


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


def test_a_candidate_that_is_broken_has_no_figure(search: Any) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.decoder.blocks[0].module.mlp.down_proj.weight.fill_(float("nan"))
        model.decoder.blocks[2].module.mlp.down_proj.weight.fill_(float("nan"))
    document = search(remove=None)(model).to_json()
    assert document["base"]["perplexity"] is None
    assert set(document["best"]["2"]["removed"]) == {0, 2}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_without_rounds_nothing_is_timed(search: Any) -> None:
    found = search()(tiny("gpt2"))
    assert found.timings == {}
    assert found.to_json()["candidates"][0]["milliseconds"] is None


def test_a_search_goes_on_in_its_folder_and_gives_the_same_document(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(remove=(1, 2))(tiny("gpt2"), tmp_path / "run").to_json()
    assert json.loads((tmp_path / "run" / "search.json").read_text()) == json.loads(json.dumps(first))
    monkeypatch.setattr(Scores, "_step", None)  # nothing is computed again
    assert search(remove=(1, 2))(tiny("gpt2"), tmp_path / "run").to_json() == first
    one = search(remove=(1, 1))(tiny("gpt2"), tmp_path / "run").to_json()
    assert [row["removed"] for row in one["candidates"]] == [[i] for i in range(BLOCKS)]


def test_another_model_or_text_in_the_same_folder_is_measured_apart(search: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = search()(tiny("gpt2"), run), search()(tiny("gpt2", seed=1), run)
    assert first.base.perplexity != second.base.perplexity
    assert search()(tiny("gpt2", seed=1)).candidates == second.candidates
    assert search(tokens=100)(tiny("gpt2"), run).base.perplexity != first.base.perplexity


def test_a_model_that_was_edited_is_another_model(search: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    before = search()(model, tmp_path / "run")
    with torch.no_grad():
        model.decoder.blocks[1].module.mlp.c_proj.weight.mul_(2)
    after = search()(model, tmp_path / "run")
    assert after.model_sha256 != before.model_sha256
    assert after.base.perplexity != before.base.perplexity


def test_a_folder_of_something_else_is_left_alone(search: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds something other than such a run \(scores-\*\.safetensors\)"):
        search()(tiny("gpt2"), folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    search()(tiny("gpt2"), folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"remove": (0, 2)}, r"remove 0\.\.2; accepted: first\.\.last with 1 <= first <= last"),
        ({"remove": (3, 2)}, r"remove 3\.\.2; accepted"),
        ({"strategy": "gredy"}, r"unknown strategy 'gredy'; did you mean 'greedy'\?"),
        ({"objective": "loss"}, r"unknown objective 'loss'; accepted: kl, perplexity"),
        ({"part": "heads"}, r"unknown part 'heads'; .*accepted: attention, block, ffn"),
        ({"width": 0}, r"width 0; accepted: 1 or more"),
        ({"rounds": 2}, r"rounds 2; accepted: 0 \(nothing is timed\), or 3 or more"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DropSearch(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"remove": (1, 4)}, r"remove 1\.\.4 for a model of depth 4; accepted: 1 \.\.\. 3"),
        ({"remove": (5, 9), "part": "ffn"}, r"remove 5\.\.9 for a model of depth 4; accepted: 1 \.\.\. 4"),
        ({"context": 33}, r"context 33; accepted: 2 \.\.\. 32"),
        ({"tokens": 1}, r"limit of 1 tokens"),
    ],
)
def test_what_this_model_does_not_admit(search: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        search(**settings)(tiny("gpt2"))


def test_a_model_of_one_block_has_none_to_remove(search: Any) -> None:
    model = tiny("gpt2", n_layer=1)
    with pytest.raises(InputError, match=r"a model of depth 1 with 1 blocks: there is none to remove"):
        search()(model)
    assert search(part="attention")(model).best[1].removed == (0,)


def test_too_many_candidates_are_refused_at_once(search: Any) -> None:
    model = tiny("gpt2", n_layer=48, n_embd=16, n_head=2)
    with pytest.raises(InputError, match=r"18,472 candidates; accepted: 10,000 at most; take strategy beam"):
        search(remove=(1, 3), corpus="/nowhere/text.txt")(model)  # before the text is looked for
    found = search(remove=(1, 3), strategy="beam", width=2, race=True, tokens=64)(model)
    assert len(found.best[3].removed) == 3


def test_a_corpus_without_selection_text_is_refused(corpus_folder: str) -> None:
    with pytest.raises(CorpusError, match="no documents in split 'validation'"):
        DropSearch(corpus=corpus_folder)(tiny("gpt2"))


class TestBestDrop:
    """Reading what a search found."""

    @pytest.fixture
    def file(self, search: Any, tmp_path: Path) -> Path:
        search(remove=(1, 2), part="ffn")(tiny("gpt2"), tmp_path / "run")
        return tmp_path / "run" / "search.json"

    def test_the_best_of_that_many(self, file: Path, search: Any) -> None:
        found = search(remove=(1, 2), part="ffn")(tiny("gpt2"))
        drop = best_drop(file, tiny("gpt2"), 2)
        assert drop.resolved(deep(BLOCKS))["blocks"] == ",".join(map(str, found.best[2].removed))
        assert drop.part == "ffn"

    def test_a_single_number_need_not_be_named(self, search: Any, tmp_path: Path) -> None:
        found: Found = search()(tiny("gpt2"), tmp_path / "run")
        drop = best_drop(tmp_path / "run" / "search.json", tiny("gpt2"))
        assert drop.indices(BLOCKS) == list(found.best[1].removed)

    @pytest.mark.parametrize("remove", [None, 3, 0])
    def test_a_number_that_it_does_not_tell_of(self, file: Path, remove: int | None) -> None:
        with pytest.raises(InputError, match=rf"remove {remove}; accepted: what the search .* tells of: 1, 2"):
            best_drop(file, tiny("gpt2"), remove)

    def test_a_search_of_another_model(self, file: Path) -> None:
        other = tiny("gpt2", seed=1)
        with pytest.raises(InputError, match=rf"of another model: weights .*these are {other.sha256[:12]}"):
            best_drop(file, other, 1)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "{}", '"drop"', '{"format_version": 1}', "\x00", '{"format_version": 1, "best": {"x": {}}}'],
    )
    def test_a_file_that_is_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "search.json").write_text(content)
        with pytest.raises(InputError, match=r"cannot be read \(.*\); accepted: a search\.json"):
            best_drop(tmp_path / "search.json", tiny("gpt2"), 1)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\)"):
            best_drop(tmp_path / "search.json", tiny("gpt2"), 1)

    def test_a_later_version(self, file: Path) -> None:
        document = json.loads(file.read_text())
        file.write_text(json.dumps(document | {"format_version": 2}))
        with pytest.raises(InputError, match="is of version 2; accepted: 1"):
            best_drop(file, tiny("gpt2"), 1)


def test_a_search_of_what_a_drop_left(search: Any) -> None:
    model = tiny("gpt2", n_layer=6)
    Drop(blocks="1", part="attention").apply(model.decoder, None)
    found = search(part="attention", remove=(1, 1))(model)
    assert [candidate.removed for candidate in found.candidates] == [(0,), (2,), (3,), (4,), (5,)]
    assert (found.parts, found.base.blocks) == (5, 6)
