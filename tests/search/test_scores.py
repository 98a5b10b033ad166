from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tiny import BLOCKS, corpus, logits, tiny, tokenizer, windows

from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import hash_weights
from layerfold.errors import OutputError
from layerfold.inference.scoring import window_nats
from layerfold.methods import Merge
from layerfold.methods.drop import PARTS, Part
from layerfold.model.decoder import Decoder
from layerfold.progress import Silent
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Lacking, removable
from layerfold.text.corpora import load_corpus
from layerfold.text.windows import TokenWindows, cut_windows


def subsets(n: int) -> list[Blocks]:
    return list(chain.from_iterable(combinations(range(n), size) for size in range(n + 1)))


def without(decoder: Decoder, part: Part, removed: Blocks) -> Decoder:
    """The candidate, built."""
    copied = decoder.copy()
    if part == "block":
        copied.keep_([i for i in range(decoder.n_blocks) if i not in removed])
    else:
        copied.remove_(part, removed)
    return copied


def window_sums(scores: Scores, removed: Blocks) -> np.ndarray:
    return scores.values(removed, "perplexity")


@pytest.mark.parametrize("part", PARTS)
def test_every_candidate_scores_what_it_scores_by_itself(family: str, part: Part) -> None:
    decoder, cut = tiny(family).decoder, windows(stride=20)
    scores = Scores(Lacking(decoder, part), cut)
    candidates = [removed for removed in subsets(BLOCKS) if part != "block" or len(removed) < BLOCKS]
    scores.measure(candidates)
    for removed in candidates:
        alone = window_nats(without(decoder, part, removed), cut)
        assert window_sums(scores, removed) == pytest.approx(alone, rel=1e-5)


def test_a_model_without_any_block_is_its_embedding_and_its_head() -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    scores = Scores(Lacking(decoder), cut)
    everything = tuple(range(BLOCKS))
    scores.measure([everything])
    for block in decoder.blocks:
        block.module.forward = lambda hidden, *_, **__: hidden
    assert window_sums(scores, everything) == pytest.approx(window_nats(decoder, cut), rel=1e-5)


@pytest.mark.parametrize(("blocks", "candidates"), [(1, [()]), (48, [(), (0,), (47,), tuple(range(1, 48))])])
def test_models_of_one_block_and_of_48(blocks: int, candidates: list[Blocks]) -> None:
    decoder, cut = tiny("gpt2", n_layer=blocks, n_embd=16, n_head=2).decoder, windows()
    scores = Scores(Lacking(decoder), cut)
    scores.measure(candidates)
    for removed in candidates:
        alone = window_nats(without(decoder, "block", removed), cut)
        assert window_sums(scores, removed) == pytest.approx(alone, rel=1e-5)


def test_subsets_of_pocket_score_what_they_score_by_themselves() -> None:
    pocket = load("pocket")
    text = load_corpus("imdb", "validation")
    cut = cut_windows(text, pocket.require_tokenizer(), context=64, limit_tokens=64)
    scores = Scores(Lacking(pocket.decoder), cut)
    # benchmarks/drop.py does this for all 4,096, and for 200 of them from scratch.
    chosen = random.Random(0).sample([removed for removed in subsets(12) if len(removed) < 12], 12)
    scores.measure(chosen)
    for removed in chosen:
        one = pocket.decoder.copy(share=True)
        one.keep_([i for i in range(12) if i not in removed])
        apart = scores.mean(removed, "perplexity") - window_nats(one, cut).sum() / cut.tokens
        assert abs(np.expm1(apart)) < 1e-5


def test_the_divergence_is_that_of_the_whole_distributions(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    scores = Scores(Lacking(decoder), cut)
    scores.measure([(), (1,), (0, 2)])
    whole = torch.log_softmax(logits(decoder, cut.input_ids).double(), -1)
    for removed in ((1,), (0, 2)):
        other = torch.log_softmax(logits(without(decoder, "block", removed), cut.input_ids).double(), -1)
        divergence = (whole.exp() * (whole - other)).sum(-1)[:, :-1]
        scored = (torch.arange(1, cut.context) < cut.lengths[:, None]).double()
        expected = (divergence * scored).sum(1).numpy()
        assert scores.values(removed, "kl") == pytest.approx(expected, rel=1e-4)
        assert expected.min() > 0
    assert scores.mean((), "kl") == pytest.approx(0, abs=1e-6)


def test_windows_may_be_measured_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    together = Scores(Lacking(decoder), cut)
    together.measure([(1,)])
    monkeypatch.setattr("layerfold.memory.room.CPU_TOKENS", 2 * cut.context)
    apart = Scores(Lacking(decoder), cut)
    order = [2, 0, 1, *range(3, len(cut))]
    apart.measure([(1,)], order[:2])
    assert np.isnan(apart.mean((1,), "perplexity"))
    assert np.isfinite(apart.values((1,), "perplexity")[[2, 0]]).all()
    apart.measure([(1,)], order)
    for objective in ("perplexity", "kl"):
        assert apart.values((1,), objective) == pytest.approx(together.values((1,), objective), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_parameters_are_those_of_the_candidate_built(family: str, part: Part) -> None:
    decoder = tiny(family).decoder
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    scores = Scores(Lacking(decoder, part), windows())
    for removed in [(), (0,), (1,), (1, 2), (0, 1, 3)]:
        assert scores.parameters(removed) == without(decoder, part, removed).size().parameters


def test_the_model_is_left_as_it_was(family: str) -> None:
    model = tiny(family)
    before = hash_weights(model.decoder.model)
    for part in PARTS:
        Scores(Lacking(model.decoder, part), windows()).measure([(), (0,), (1, 2)])
    assert hash_weights(model.decoder.model) == before


@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_was_being_trained_is_scored_without_dropout(part: Part) -> None:
    cut = windows()
    calm, training = tiny("gpt2").decoder, tiny("gpt2").decoder
    training.model.train()
    one, two = Scores(Lacking(calm, part), cut), Scores(Lacking(training, part), cut)
    for scores in (one, two):
        scores.measure([(1,)])
    assert two.values((1,), "kl") == pytest.approx(one.values((1,), "kl"), rel=1e-4)


def test_the_blocks_that_lack_a_part_already_are_no_candidates() -> None:
    decoder = tiny("llama").decoder
    decoder.remove_("ffn", [1])
    scores = Scores(Lacking(decoder, "ffn"), windows())
    assert removable(decoder, "ffn") == (0, 2, 3)
    scores.measure([(), (2,)])
    assert window_sums(scores, (2,)) == pytest.approx(window_nats(without(decoder, "ffn", (2,)), windows()), rel=1e-5)


class Stopping(Silent):
    """Stops after so many items."""

    def __init__(self, items: int) -> None:
        self.items = items

    def track(self, items: Iterable[Any], description: str, total: float | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.items:
                raise KeyboardInterrupt
            yield item


def keeping(decoder: Decoder, cut: TokenWindows, path: Path, key: str = "one") -> Scores:
    return Scores(Lacking(decoder), cut, file=path, key=key)


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    decoder, cut, path = tiny("gpt2").decoder, windows(), tmp_path / "scores.safetensors"
    candidates = subsets(BLOCKS)
    whole = keeping(decoder, cut, tmp_path / "whole.safetensors")
    whole.measure(candidates)
    stopped = keeping(decoder, cut, path)
    with pytest.raises(KeyboardInterrupt):
        stopped.measure(candidates, progress=Stopping(7))
    assert {type(block.module.mlp.act).__name__ for block in decoder.blocks} == {"NewGELUActivation"}
    resumed = keeping(decoder, cut, path)
    resumed.measure(candidates)
    measured = whole.head_tokens - 2 * cut.tokens  # the model as it is takes two, and again in each process
    assert 0 < resumed.head_tokens - 2 * cut.tokens < measured
    for removed in candidates:
        for objective in ("perplexity", "kl"):
            expected = whole.values(removed, objective)
            assert resumed.values(removed, objective) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    again = keeping(decoder, cut, path)
    again.measure(candidates)
    assert again.head_tokens == 0


@pytest.mark.parametrize("damage", ["another key", "cut short", "not a file of tensors", "another shape"])
def test_a_file_of_something_else_is_measured_again(tmp_path: Path, damage: str) -> None:
    decoder, cut, path = tiny("gpt2").decoder, windows(), tmp_path / "scores.safetensors"
    first = keeping(decoder, cut, path, "two" if damage == "another key" else "one")
    first.measure([(), (1,)])
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "not a file of tensors":
        path.write_text("{}")
    elif damage == "another shape":
        short = Scores(Lacking(decoder), windows(stride=7), file=tmp_path / "other", key="one")
        short.measure([(), (1,)])
        (tmp_path / "other").rename(path)
    again = keeping(decoder, cut, path)
    again.measure([(), (1,)])
    assert again.head_tokens == first.head_tokens
    read = keeping(decoder, cut, path)
    read.measure([(), (1,)])
    assert read.head_tokens == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("layerfold.search.scores.save_file", full)
    with pytest.raises(OutputError, match=r"cannot write '.*scores\.safetensors': I/O error: No space left on device"):
        keeping(tiny("gpt2").decoder, windows(), tmp_path / "scores.safetensors").measure([(1,)])
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_grows_by_what_is_measured_next(tmp_path: Path) -> None:
    decoder, cut, path = tiny("gpt2").decoder, windows(), tmp_path / "scores.safetensors"
    keeping(decoder, cut, path).measure([(0,)])
    keeping(decoder, cut, path).measure([(1,)])
    both = keeping(decoder, cut, path)
    both.measure([(0,), (1,)])
    assert both.head_tokens == 0


def test_a_short_text() -> None:
    cut = cut_windows(corpus("a b c"), tokenizer(), context=4)
    scores = Scores(Lacking(tiny("gpt2").decoder), cut)
    scores.measure([(), (1,)])
    assert scores.tokens.sum() == cut.tokens
    assert np.isfinite(scores.mean((1,), "perplexity"))


def test_a_candidate_lacks_what_was_not_measured_on_every_window() -> None:
    scores = Scores(Lacking(tiny("gpt2").decoder), windows(), divergence=False)
    assert scores.lacks((1,))
    scores.measure([(1,)], [0])
    assert scores.lacks((1,))
    scores.measure([(1,)])
    assert not scores.lacks((1,))  # the divergence was not asked for
    assert scores.lacks((2,))
