"""What searches for blocks to drop and for windows to share have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from layerfold.errors import CorpusError, InputError, OutputError
from layerfold.methods import Share
from layerfold.search import DropSearch, WindowSearch
from layerfold.search.run import Search
from layerfold.search.scores import Scores
from layerfold.text.corpora import load_corpus

PLAIN = Share(rank=3, init="svd", align="none", base="anchor")
SEARCHES: dict[str, Search[Any]] = {
    "drop": DropSearch(remove=(1, 2), rounds=0, tokens=200, test_tokens=150),
    "window": WindowSearch(k=(2, 3), share=PLAIN, calibration_tokens=512, tokens=200, test_tokens=150),
}
NUMBER = {"drop": "remove", "window": "k"}
DEEP = {"n_layer": 7, "n_embd": 16, "n_head": 2}


@pytest.fixture(params=list(SEARCHES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def search(kind: str, study_corpus: str) -> Callable[..., Search[Any]]:
    def search(**settings: Any) -> Search[Any]:
        return replace(SEARCHES[kind], **{"corpus": study_corpus} | settings)

    return search


def test_selection_and_test_text_share_no_document(search: Any, searched: Any, study_corpus: str) -> None:
    found = searched(search())
    assert (found.text["split"], found.test_text["split"]) == ("validation", "test")
    selection, test = (load_corpus(study_corpus, split) for split in ("validation", "test"))
    assert found.text["corpus_sha256"] == selection.sha256
    assert found.test_text["corpus_sha256"] == test.sha256
    assert not set(selection.documents) & set(test.documents)


def test_the_objective_chooses(search: Any, searched: Any, kind: str) -> None:
    by_kl, by_perplexity = (searched(search(**{NUMBER[kind]: (2, 2)}, objective=each)) for each in ("kl", "perplexity"))
    assert by_kl.candidates == by_perplexity.candidates
    assert by_kl.best[2] == min(by_kl.candidates, key=lambda candidate: candidate.kl)
    assert by_perplexity.best[2].changed != by_kl.best[2].changed  # the model was chosen so that they differ


def test_a_race_chooses_what_all_of_the_text_chooses(search: Any, searched: Any, kind: str) -> None:
    number = {"drop": {"remove": None}, "window": {"k": (2, 3)}}[kind]
    whole, raced = (searched(search(**number, tokens=2000, race=race), **DEEP) for race in (False, True))
    assert (raced.best, raced.tests) == (whole.best, whole.tests)
    assert raced.eliminated > 0 == whole.eliminated
    assert raced.eliminated + len(raced.candidates) == len(whole.candidates) == {"drop": 126, "window": 6 + 5}[kind]
    assert raced.work["scored_windows"] < raced.work["windows_of_all_candidates"] == whole.work["scored_windows"]
    assert raced.to_json()["eliminated"] == raced.eliminated


def test_a_search_goes_on_in_its_folder_and_gives_the_same_document(
    search: Any, searched: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {"drop": {"remove": (1, 1)}, "window": {}}[kind]
    part = searched(search(**fewer))
    first = search()(tiny("gpt2"), tmp_path / "run").to_json()
    assert first == searched(search()).to_json()
    assert json.loads((tmp_path / "run" / "search.json").read_text()) == json.loads(json.dumps(first))
    monkeypatch.setattr(Scores, "_step", None)  # nothing is computed again
    assert search()(tiny("gpt2"), tmp_path / "run").to_json() == first
    assert search(**fewer)(tiny("gpt2"), tmp_path / "run") == part


def test_another_model_or_other_settings_in_the_same_folder_are_measured_apart(
    search: Any, searched: Any, kind: str, tmp_path: Path
) -> None:
    shares: list[dict[str, Any]] = [{"share": replace(PLAIN, rank=1)}, {"share": replace(PLAIN, base="mean")}]
    other: dict[str, list[dict[str, Any]]] = {
        "drop": [{"tokens": 100}, {"part": "ffn"}],
        "window": [{"tokens": 100}, {"k": (3, 3)}, *shares],
    }
    for settings in ({}, *other[kind]):
        assert search(**settings)(tiny("gpt2"), tmp_path) == searched(search(**settings))
    assert search()(tiny("gpt2", seed=1), tmp_path) == searched(search(), seed=1)
    model = tiny("gpt2")
    with torch.no_grad():
        model.decoder.blocks[1].module.mlp.c_proj.weight.mul_(2)  # an edited model is another model
    edited = search()(model, tmp_path)
    assert edited.model_sha256 != searched(search()).model_sha256
    assert edited.base.perplexity != searched(search()).base.perplexity


def test_a_folder_of_something_else_is_left_alone(search: Any, kind: str, tmp_path: Path, study_corpus: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    marker = {"drop": "scores", "window": "windows"}[kind]
    with pytest.raises(OutputError, match=rf"holds something other than such a run \({marker}-\*\.safetensors\)"):
        search()(tiny("gpt2"), folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    search()(tiny("gpt2"), folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"
    (of_the_other_kind,) = (each for name, each in SEARCHES.items() if name != kind)
    with pytest.raises(OutputError, match="holds something other than such a run"):
        replace(of_the_other_kind, corpus=study_corpus)(tiny("gpt2"), folder)


def test_a_broken_model_has_no_figures(search: Any) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    document = search()(model).to_json()
    assert document["base"]["perplexity"] is None
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_corpus_without_selection_text_is_refused(search: Any, corpus_folder: str) -> None:
    with pytest.raises(CorpusError, match="no documents in split 'validation'"):
        search(corpus=corpus_folder)(tiny("gpt2"))


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("drop", {"remove": (0, 2)}, r"^remove 0\.\.2; accepted: first\.\.last with 1 <= first <= last$"),
        ("drop", {"remove": (3, 2)}, r"^remove 3\.\.2; accepted"),
        ("drop", {"strategy": "gredy"}, r"^unknown strategy 'gredy'; did you mean 'greedy'\?"),
        ("drop", {"objective": "loss"}, r"^unknown objective 'loss'; accepted: kl, perplexity"),
        ("drop", {"objective": "repair"}, r"^unknown objective 'repair'; did you mean 'repaired'\? "),
        ("drop", {"part": "heads"}, r"^unknown part 'heads'; .*accepted: attention, block, ffn"),
        ("drop", {"width": 0}, r"^width 0; accepted: 1 or more$"),
        ("drop", {"finalists": 0}, r"^finalists 0; accepted: 1 or more$"),
        ("drop", {"rounds": 2}, r"^rounds 2; accepted: 0 \(nothing is timed\), or 3 or more$"),
        ("drop", {"objective": "repaired", "part": "ffn"}, r"^objective 'repaired' with part 'ffn'; accepted: block$"),
        ("window", {"k": (1, 3)}, r"^k 1\.\.3; accepted: first\.\.last with 2 <= first <= last$"),
        ("window", {"k": (4, 2)}, r"^k 4\.\.2; accepted"),
        ("window", {"objective": "perplexty"}, r"^unknown objective 'perplexty'; did you mean 'perplexity'\?"),
        ("window", {"share": Share(window="1:2")}, r"^window '1:2' in a search for it; accepted: auto$"),
    ],
)
def test_settings_that_are_refused(search: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        search(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("drop", {"remove": (1, 4)}, r"^remove 1\.\.4 for a model of depth 4; accepted: 1 \.\.\. 3$"),
        ("drop", {"remove": (5, 9), "part": "ffn"}, r"^remove 5\.\.9 for a model of depth 4; accepted: 1 \.\.\. 4$"),
        ("drop", {"context": 33}, r"^context 33; accepted: 2 \.\.\. 32"),
        ("drop", {"tokens": 1}, r"^limit of 1 tokens"),
        ("drop", {"objective": "repaired", "calibration_tokens": 32}, r"^calibration text of 1 window; accepted: 2 or"),
        ("drop", {"objective": "repaired", "calibration_tokens": 1}, r"^limit of 1 tokens; accepted: 2 or more$"),
        ("window", {"k": (2, 5)}, r"^k 5 for a model of 4 blocks; accepted: 2 \.\.\. 4"),
        ("window", {"context": 33}, r"^context 33; accepted: 2 \.\.\. 32"),
        ("window", {"tokens": 1}, r"^limit of 1 tokens"),
        ("window", {"test_tokens": 0}, r"^limit of 0 tokens"),
        ("window", {"share": Share(rank=2), "calibration_tokens": 0}, r"^limit of 0 tokens"),
        ("window", {"share": replace(PLAIN, rank=33)}, r"^no window of 2 blocks can be shared: rank 33; accepted: 0 "),
    ],
)
def test_what_a_model_does_not_admit_is_one_line(
    search: Any, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as refused:
        search(**settings)(tiny("gpt2"), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("run/*"))


def test_a_model_of_one_block(study_corpus: str) -> None:
    model = tiny("gpt2", n_layer=1)
    drop, window = (replace(search, corpus=study_corpus) for search in SEARCHES.values())
    with pytest.raises(InputError, match=r"a model of depth 1 with 1 blocks: there is none to remove"):
        drop(model)
    assert replace(drop, part="attention", remove=(1, 1))(model).best[1].removed == (0,)
    with pytest.raises(InputError, match="k 2 for a model of 1 block, which has none to share with"):
        window(model)
