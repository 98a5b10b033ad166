from __future__ import annotations

import pytest
import torch
from tiny import correlations, logits, tiny, windows

from layerfold import calibration as module
from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.linalg import match_neurons

# Overlapping groups, a block that is an anchor and another's other, and an anchor later than its other.
PAIRS = [(0, 1), (0, 3), (1, 2), (3, 2), (2, 0)]


def test_correlations_equal_a_direct_computation(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    found = Calibration(decoder, cut).correlations(PAIRS)
    assert list(found) != []
    for pair in PAIRS:
        expected = torch.from_numpy(correlations(decoder, cut, *pair))
        assert (found[pair] - expected).abs().max() < 1e-4, pair


def test_padded_positions_are_excluded() -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    before = Calibration(decoder, cut).correlations([(0, 1)])[0, 1]
    cut.input_ids[-1, cut.lengths[-1] :] = 77
    assert (Calibration(decoder, cut).correlations([(0, 1)])[0, 1] - before).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 64, 1 << 20])
def test_the_batch_size_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cut = tiny("llama").decoder, windows()
    expected = Calibration(decoder, cut).correlations(PAIRS)
    monkeypatch.setattr(module, "_BATCH_TOKENS", tokens)
    found = Calibration(decoder, cut).correlations(PAIRS)
    assert max(float((found[pair] - expected[pair]).abs().max()) for pair in PAIRS) < 1e-4


def test_matches_are_of_the_correlations_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(tiny("gpt2").decoder, windows())
    expected = {pair: match_neurons(c) for pair, c in calibration.correlations(PAIRS).items()}
    found = calibration.matches(PAIRS)
    assert list(found) == PAIRS
    for pair in PAIRS:
        assert torch.equal(found[pair].order, expected[pair].order)
        assert found[pair].mean_correlation == expected[pair].mean_correlation
    monkeypatch.setattr(module, "Stepper", None)  # a second pass would need it
    again = calibration.matches([PAIRS[3], PAIRS[0]])
    assert again[PAIRS[3]] is found[PAIRS[3]]


def test_only_what_is_missing_is_computed() -> None:
    calibration = Calibration(tiny("gpt2").decoder, windows())
    first = calibration.matches([(0, 1)])[0, 1]
    both = calibration.matches([(0, 1), (0, 2)])
    assert both[0, 1] is first
    assert set(both) == {(0, 1), (0, 2)}


def test_a_pair_may_be_asked_for_twice_in_one_call() -> None:
    calibration = Calibration(tiny("gpt2").decoder, windows())
    assert set(calibration.matches([(0, 1), (0, 1)])) == {(0, 1)}


def test_calibrating_leaves_the_model_as_it_was(family: str) -> None:
    decoder = tiny(family).decoder
    before = logits(decoder)
    Calibration(decoder, windows()).matches(PAIRS)
    assert torch.equal(logits(decoder), before)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in decoder.model.modules())


def test_blocks_of_different_widths_are_refused() -> None:
    decoder = tiny("llama").decoder
    narrow = tiny("llama", intermediate_size=40).decoder
    decoder.blocks[1].module.mlp = narrow.blocks[1].module.mlp
    with pytest.raises(InputError, match="blocks 0 and 1 have 48 and 40 neurons"):
        Calibration(decoder, windows()).matches([(0, 1)])
