"""What candidates consist of, and that blocks they have in common are passed once."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from tiny import BLOCKS, tiny, windows
from torch import Tensor

from layerfold.inference.scoring import window_nats
from layerfold.inference.spool import Apart
from layerfold.inference.stepping import Stepper
from layerfold.methods import Share
from layerfold.model.decoder import Decoder
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Edited, Lacking, Path, Replaced, removable, walk


def shared(decoder: Decoder, *windows: str) -> dict[Blocks, Decoder]:
    """The decoder with each of these windows shared, using the decoder's own tensors for the rest."""
    others = {}
    for window in windows:
        share = Share(window=window, rank=2, init="svd", align="none")
        other = decoder.copy(share=True)
        share.apply(other, None)
        others[tuple(share.blocks(decoder))] = other
    return others


def apart(decoder: Decoder, others: dict[Blocks, Decoder]) -> dict[Blocks, Apart]:
    found = {blocks: Apart(copied(other, decoder), decoder) for blocks, other in others.items()}
    for each in found.values():
        each.own.stow()
    return found


def copied(other: Decoder, beside: Decoder) -> Decoder:
    """A copy with own tensors of its own, and the same shared ones."""
    memo = {id(each): each for each in (*beside.model.parameters(), *beside.model.buffers())}
    return Decoder(copy.deepcopy(other.model, memo))


def test_a_candidate_has_the_other_decoders_blocks_in_the_place_of_its_own() -> None:
    decoder = tiny("gpt2").decoder
    stages = Replaced(decoder, apart(decoder, shared(decoder, "0:2", "1:3")))
    assert stages.path(()) == (0, 1, 2, 3)
    assert stages.path((0, 1)) == (4, 5, 2, 3)
    assert stages.path((1, 2, 3)) == (0, 9, 10, 11)
    assert [stepper.decoder.n_blocks for stepper in stages.steppers] == [BLOCKS] * 3
    with pytest.raises(KeyError):
        stages.path((1, 2))  # there is no decoder for it


@pytest.mark.parametrize("divergence", [False, True])
def test_what_is_below_the_window_is_passed_once(divergence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    scores = Scores(Replaced(decoder, apart(decoder, shared(decoder, "0:2", "1:2", "2:2"))), cut, divergence=divergence)
    passed: Counter[int] = Counter()
    step = Scores._step

    def counting(self: Scores, stage: int, hidden: Tensor) -> Tensor:
        passed[stage] += 1
        return step(self, stage, hidden)

    monkeypatch.setattr(Scores, "_step", counting)
    scores.measure([(0, 1), (1, 2), (2, 3), ()])
    # Paths, all in one batch: 4 5 2 3, 0 9 10 3, 0 1 14 15 and 0 1 2 3; the divergence passes the last once more.
    own = Counter({0: 1, 1: 1, 2: 2, 3: 3})
    reference = Counter(dict.fromkeys(range(BLOCKS), 1)) if divergence else Counter()
    assert passed == own + reference + Counter({4: 1, 5: 1, 9: 1, 10: 1, 14: 1, 15: 1})


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_parameters_count_what_is_shared_once(name: str) -> None:
    decoder = tiny(name).decoder
    others = shared(decoder, "0:2", "1:3", "0:4")
    scores = Scores(Replaced(decoder, apart(decoder, others)), windows())
    assert scores.parameters(()) == decoder.size().parameters
    for window, other in others.items():
        assert scores.parameters(window) == other.size().parameters < decoder.size().parameters


def held_bytes(others: dict[Blocks, Apart], beside: Decoder) -> list[int]:
    """What each decoder has in memory of its own."""
    shared = {id(each) for each in beside.model.parameters()}
    found = []
    for other in others.values():
        own = [each for each in other.decoder.model.parameters() if id(each) not in shared]
        found.append(sum({each.data_ptr(): each.untyped_storage().nbytes() for each in own}.values()))
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_decoder_at_a_time_has_its_own_tensors_in_memory_and_the_figures_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, cut = tiny(name).decoder, windows(stride=20)
    plain = shared(decoder, "0:2", "1:2", "2:2", "0:4")
    sizes = [max(each, 1) for each in held_bytes(apart_in_memory(decoder, plain), decoder)]
    others = apart(decoder, plain)
    assert max(held_bytes(others, decoder)) < min(sizes) / 50  # an element stands for each tensor
    seen: list[int] = []
    step = Stepper.run

    def watching(self: Stepper, index: int, hidden: Tensor) -> Tensor:
        held = held_bytes(others, decoder)
        seen.append(sum(each > min(sizes) / 2 for each in held))
        return step(self, index, hidden)

    monkeypatch.setattr(Stepper, "run", watching)
    stowed = Scores(Replaced(decoder, others), cut)
    stowed.measure([(), *others])
    assert max(seen) == 1
    monkeypatch.undo()
    held = Scores(Replaced(decoder, apart_in_memory(decoder, plain)), cut)
    held.measure([(), *others])
    for blocks in ((), *others):
        for objective in ("perplexity", "kl"):
            assert stowed.values(blocks, objective).tolist() == held.values(blocks, objective).tolist()
        assert stowed.parameters(blocks) == held.parameters(blocks)


def apart_in_memory(decoder: Decoder, others: dict[Blocks, Decoder]) -> dict[Blocks, Any]:
    found = apart(decoder, others)
    for each in found.values():
        each.own.fetch()
        each.own.stow = lambda: None  # type: ignore[method-assign]
    return found


def test_a_model_that_trains_with_dropout_is_scored_without() -> None:
    decoder, cut = tiny("gpt2", resid_pdrop=0.5).decoder, windows()
    others = shared(decoder, "1:2")
    decoder.model.train()
    others[(1, 2)].model.train()
    scores = Scores(Replaced(decoder, apart(decoder, others)), cut)
    scores.measure([(), (1, 2)])
    assert scores.values((1, 2), "perplexity") == pytest.approx(window_nats(others[(1, 2)], cut), rel=1e-5)


def test_blocks_that_lack_a_part_follow_those_of_the_model() -> None:
    decoder = tiny("llama").decoder
    assert Lacking(decoder).path((1, 2)) == (0, 3)
    assert Lacking(decoder, "ffn").path((1, 2)) == (0, 5, 6, 3)
    assert len(Lacking(decoder).steppers) == 1
    decoder.remove_("ffn", (1,))
    assert removable(decoder, "ffn") == (0, 2, 3)
    assert removable(decoder, "block") == (0, 1, 2, 3)


def test_decoders_of_their_own_depth_are_measured_while_they_are_held() -> None:
    decoder, cut = tiny("mistral").decoder, windows(stride=20)
    stages = Edited(decoder)
    scores = Scores(stages, cut, divergence=False)
    others: dict[Blocks, Decoder] = {}
    for removed in [(0, 2), (1,), (1, 2, 3)]:
        others[removed] = other = decoder.copy()
        other.keep_([index for index in range(BLOCKS) if index not in removed])
        with torch.no_grad():
            other.blocks[0].ffn.down.weight.mul_(1.5)
        stages.held[removed] = Stepper(other)
    assert stages.path((0, 2)) == (4, 5)
    assert stages.path((1,)) == (8, 9, 10)
    del stages.held[(0, 2)]
    assert stages.path((1,)) == (4, 5, 6)
    stages.held[(0, 2)] = Stepper(others[(0, 2)])
    scores.measure(others)
    for removed, other in others.items():
        assert scores.values(removed, "perplexity") == pytest.approx(window_nats(other, cut), rel=1e-5)
    stages.held.clear()
    scores.measure(others)  # what was measured asks for none of them


def test_scores_are_those_of_the_other_decoder_and_no_tensor_of_the_model_is_written_into() -> None:
    decoder, cut = tiny("mistral").decoder, windows(stride=20)
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    others = shared(decoder, "1:2", "0:4")
    scores = Scores(Replaced(decoder, apart(decoder, others)), cut)
    scores.measure([(), *others])
    assert scores.values((), "perplexity") == pytest.approx(window_nats(decoder, cut), rel=1e-5)
    assert scores.mean((), "kl") == pytest.approx(0, abs=1e-6)
    for window, other in others.items():
        assert scores.values(window, "perplexity") == pytest.approx(window_nats(other, cut), rel=1e-5)
        assert scores.mean(window, "kl") > 1e-4
    after = decoder.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def subsets(n: int) -> list[Path]:
    return list(chain.from_iterable(combinations(range(n), size) for size in range(n + 1)))


class Counted:
    """Writes each stage passed into the states as a digit, and counts steps and states that are alive."""

    def __init__(self) -> None:
        self.steps = 0
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __call__(self, stage: int, hidden: Tensor) -> Tensor:
        self.steps += 1
        result = hidden * 10 + stage + 1
        self.alive.add(result)
        self.most = max(self.most, len(self.alive))
        return result


def by_digits(path: Path) -> float:
    value = 0.0
    for stage in path:
        value = 10 * value + stage + 1
    return value


@pytest.mark.parametrize(
    "paths",
    [subsets(0), subsets(1), subsets(4), subsets(8), [(0, 5, 2), (4, 1, 2), (0, 1, 2), (0, 5, 6), (), (0,)]],
    ids=["none", "one", "four", "eight", "other stages"],
)
def test_every_path_ends_in_its_own_stages_and_each_prefix_is_stepped_through_once(paths: list[Path]) -> None:
    step = Counted()
    found = {path: float(hidden) for path, hidden in walk(paths, torch.zeros((), dtype=torch.double), step)}
    assert found == {path: by_digits(path) for path in paths}
    assert step.steps == len({path[:end] for path in paths for end in range(1, len(path) + 1)})
    # The path's own states, and the one that is being made: as many as the depth, not as the paths.
    assert step.most <= 1 + max(map(len, paths))
