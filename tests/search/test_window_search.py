"""The search for a window to share, against sharing each window and measuring it from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, tiny

import layerfold
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.evaluators import Perplexity
from layerfold.evaluators.perplexity import versus
from layerfold.methods import Share
from layerfold.search import FoundWindows, WindowSearch
from layerfold.search.scores import Scores

CALIBRATED = Share(rank=2)
PLAIN = Share(rank=3, init="svd", align="none", base="anchor")
ALLOTTED = Share(rank=2, ranks="allotted", base="mean", align="none", init="svd")

Search = Callable[..., WindowSearch]


def auto_search(corpus: str) -> WindowSearch:
    return WindowSearch(k=(2, 2), share=CALIBRATED, corpus=corpus, calibration_tokens=512)


@pytest.fixture
def search(study_corpus: str) -> Search:
    def search(**settings: Any) -> WindowSearch:
        few = {"corpus": study_corpus, "calibration_tokens": 512, "tokens": 200, "test_tokens": 150, "k": (2, 2)}
        return WindowSearch(**few | {"share": PLAIN} | settings)

    return search


def scratch(model: Model, share: Share, blocks: tuple[int, ...], corpus: str) -> Model:
    """The model with one window shared, as the compress command would."""
    method = replace(share, window=f"{blocks[0]}:{len(blocks)}", k=None)
    return layerfold.compress(model, method, corpus=corpus, tokens=512)


@pytest.mark.parametrize(
    ("name", "share"), [("gpt2", CALIBRATED), ("llama", CALIBRATED), ("gpt2", PLAIN), ("llama", ALLOTTED)]
)
def test_every_window_scores_what_it_scores_from_scratch(
    search: Search, study_corpus: str, name: str, share: Share
) -> None:
    found = search(k=(2, BLOCKS), share=share)(tiny(name))
    selection = Perplexity(corpus=study_corpus, split="validation", limit_tokens=200)
    test = Perplexity(corpus=study_corpus, split="test", limit_tokens=150)
    base = tiny(name)
    assert [window.name for window in found.candidates] == ["0:2", "1:2", "2:2", "0:3", "1:3", "0:4"]
    assert found.base.perplexity == pytest.approx(selection(base).value, rel=1e-5)
    assert found.base.parameters == base.decoder.size().parameters
    base_test = test(base)
    assert found.tests[()].perplexity.value == pytest.approx(base_test.value, rel=1e-5)
    assert found.tests[()].versus_base.low == found.tests[()].versus_base.high == 1
    for window in found.candidates:
        one = scratch(tiny(name), share, window.blocks, study_corpus)
        assert window.perplexity == pytest.approx(selection(one).value, rel=1e-5)
        assert window.parameters == one.decoder.size().parameters
        if window in found.best.values():
            score, judged = test(one), found.tests[window.blocks]
            ratio = versus(score.to_json(), base_test.to_json())
            assert ratio is not None
            assert judged.perplexity.value == pytest.approx(score.value, rel=1e-5)
            assert judged.perplexity.low == pytest.approx(score.low, rel=1e-4)
            assert judged.versus_base.value == pytest.approx(ratio["value"], rel=1e-4)
            assert judged.versus_base.high == pytest.approx(ratio["high"], rel=1e-4)
    for k, best in found.best.items():
        alike = [window for window in found.candidates if len(window.blocks) == k]
        assert best == min(alike, key=lambda window: window.perplexity)
    assert list(found.best) == [2, 3, 4]
    assert set(found.tests) == {(), *(window.blocks for window in found.best.values())}


def test_the_model_is_left_as_it_was(search: Search) -> None:
    model = tiny("llama")
    parameters = dict(model.decoder.model.named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in model.decoder.model.state_dict().items()}
    search(k=(2, 4), share=CALIBRATED)(model)
    after = model.decoder.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter is parameters[name] for name, parameter in model.decoder.model.named_parameters())


def test_what_an_interrupted_search_measured_is_not_measured_again(
    search: Search, searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Scores.measure
    calls = 0

    def stopping(self: Scores, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        measure(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Scores, "measure", stopping)
        with pytest.raises(KeyboardInterrupt):
            search(k=(2, 3))(tiny("gpt2"), tmp_path / "run")
    assert not (tmp_path / "run" / "search.json").exists()
    measured: list[Any] = []
    original = Scores._measured

    def noting(self: Scores, batch: list[int], candidates: list[Any]) -> Any:
        measured.extend(candidates)
        return original(self, batch, candidates)

    monkeypatch.setattr(Scores, "_measured", noting)
    resumed = search(k=(2, 3))(tiny("gpt2"), tmp_path / "run")
    best = [window.blocks for window in resumed.best.values()]
    assert measured == [(0, 1, 2), (1, 2, 3), (), (), *best]  # of windows of two, nothing; the last are on test text
    assert resumed == searched(search(k=(2, 3)))


def test_other_calibration_is_measured_apart(search: Search, searched: Any, tmp_path: Path) -> None:
    first = search(share=CALIBRATED)(tiny("gpt2"), tmp_path / "run")
    assert first == searched(search(share=CALIBRATED))
    other = search(share=CALIBRATED, calibration_tokens=256)(tiny("gpt2"), tmp_path / "run")
    assert other.best[2].perplexity != first.best[2].perplexity
    assert len(first.settings["calibration_sha256"]) == 64 != other.settings["calibration_sha256"]
    assert searched(search()).settings["calibration_sha256"] is None


def test_windows_that_cannot_be_shared_are_left_out(search: Search) -> None:
    model = tiny("gpt2", n_layer=6)
    model.decoder.remove_("ffn", (2,))
    found = search(k=(2, 3))(model)
    assert [window.name for window in found.candidates] == ["0:2", "3:2", "4:2", "3:3"]
    for window in found.candidates:
        one = model.copy()
        replace(PLAIN, window=window.name).apply(one.decoder, None)
        assert window.parameters == one.decoder.size().parameters
    model.decoder.remove_("ffn", (1, 4))
    with pytest.raises(InputError, match=r"no window of 2 blocks can be shared: ") as refused:
        search()(model)
    assert "\n" not in str(refused.value)


class TestAuto:
    """Sharing whatever window a search finds best."""

    @pytest.fixture
    def found(self, searched: Any, study_corpus: str) -> FoundWindows:
        found: FoundWindows = searched(auto_search(study_corpus))
        return found

    def test_compress_takes_the_window_that_the_search_finds(self, found: FoundWindows, study_corpus: str) -> None:
        base, auto = tiny("gpt2"), replace(CALIBRATED, k=2)
        model = layerfold.compress(base, auto, corpus=study_corpus, tokens=512)
        step = model.provenance.steps[-1]
        assert step["method"]["window"] == found.best[2].name
        assert "k" not in step["method"]
        perplexities = {window.name: window.perplexity for window in found.candidates}
        noted = step["notes"]["search"]["perplexity"]  # those that a race gave up on are not there
        assert found.best[2].name in noted
        assert noted == pytest.approx({name: perplexities[name] for name in noted}, rel=1e-6)
        assert step["notes"]["search"]["text"] == found.text
        assert model.decoder.size().parameters == found.best[2].parameters
        alone = scratch(tiny("gpt2"), CALIBRATED, found.best[2].blocks, study_corpus)
        assert model.sha256 == alone.sha256
        assert base.sha256 == tiny("gpt2").sha256
        assert layerfold.compress(base, auto, corpus=study_corpus, tokens=512, in_place=True).sha256 == model.sha256

    def test_without_a_search_auto_is_refused(self) -> None:
        with pytest.raises(InputError, match="window auto, and nothing has searched for it"):
            Share(rank=2, init="svd", align="none").apply(tiny("gpt2").decoder, None)
