from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BLOCKS, FAMILY_NAMES, correlations, logits, neurons, reads, refused, sparsify, tiny, unchanged, windows

from layerfold import calibration as module
from layerfold.calibration import Calibration
from layerfold.errors import InputError, ModelError
from layerfold.inference.sensitivity import sensitivities
from layerfold.maths.linalg import match_neurons
from layerfold.maths.moments import SecondMoments
from layerfold.memory import room
from layerfold.methods import Drop
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows

# Overlapping groups, a block that is an anchor and another's other, and an anchor later than its other.
PAIRS = [(0, 1), (0, 3), (1, 2), (3, 2), (2, 0)]


def test_correlations_equal_a_direct_computation(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    found = Calibration(decoder, cut).correlations(PAIRS)
    x = neurons(decoder, cut, *range(BLOCKS))
    assert set(found) == set(PAIRS)
    for one, two in PAIRS:
        expected = np.corrcoef(x[one].T, x[two].T)[: x[one].shape[1], x[one].shape[1] :]
        assert np.abs(found[one, two].numpy() - expected).max() < 1e-4, (one, two)


def test_matches_are_of_the_correlations_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(tiny("gpt2").decoder, windows())
    expected = {pair: match_neurons(c) for pair, c in calibration.correlations(PAIRS).items()}
    found = calibration.matches(PAIRS)
    assert list(found) == PAIRS
    for pair in PAIRS:
        assert torch.equal(found[pair].order, expected[pair].order)
        assert found[pair].mean_correlation == expected[pair].mean_correlation
    monkeypatch.setattr(module, "Stepper", None)  # a second pass would need it
    again = calibration.matches([PAIRS[3], PAIRS[0], PAIRS[3]])
    assert list(again) == [PAIRS[3], PAIRS[0]], "a pair may be asked for twice"
    assert again[PAIRS[3]] is found[PAIRS[3]]
    with pytest.raises(TypeError):  # one that is missing is computed
        calibration.matches([PAIRS[0], (1, 3)])


def test_sensitivities_of_the_same_weights_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny("gpt2").decoder
    calibration = Calibration(decoder, windows())
    first, other = calibration.sensitivities(decoder.copy()), decoder.copy()
    other.keep_([0, 2])
    fewer, expected = calibration.sensitivities(other), sensitivities(other, windows())
    assert all(torch.equal(each, expected.neurons[index]) for index, each in fewer.neurons.items())
    monkeypatch.setattr(module, "sensitivities", None)
    assert calibration.sensitivities(decoder) is first
    assert calibration.of(other).sensitivities(other.copy()) is fewer
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[0] += 1
    with pytest.raises(TypeError):  # it would be worked out anew
        calibration.sensitivities(decoder)


def assert_untouched(decoder: Decoder) -> None:
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in decoder.model.modules())


def test_calibrating_leaves_the_model_as_it_was(family: str) -> None:
    decoder = tiny(family).decoder
    before = logits(decoder)
    Calibration(decoder, windows()).matches(PAIRS)
    assert torch.equal(logits(decoder), before)
    assert_untouched(decoder)


def test_blocks_of_different_widths_are_refused() -> None:
    decoder = tiny("llama").decoder
    narrow = tiny("llama", intermediate_size=40).decoder
    decoder.blocks[1].module.mlp = narrow.blocks[1].module.mlp
    with pytest.raises(InputError, match="blocks 0 and 1 have 48 and 40 neurons"):
        Calibration(decoder, windows()).matches([(0, 1)])


# Second moments, block by block


def moments(decoder: Decoder, cut: TokenWindows, **settings: Any) -> dict[str, SecondMoments]:
    """Of all blocks, each as its visit saw it."""
    found: dict[str, SecondMoments] = {}
    settings = {"whole": True, "edits": False} | settings
    Calibration(decoder, cut).each_block(lambda _, each: found.update(each), doing="", **settings)
    return found


def assert_moments_of(found: SecondMoments, x: np.ndarray, whole: bool = True) -> None:
    scale = np.sqrt(np.outer((x**2).mean(0), (x**2).mean(0))).clip(1e-6)
    assert (np.abs(found.squares.numpy() - (x**2).mean(0)) / scale.diagonal()).max() < 1e-4
    assert np.abs(found.mean.numpy() - x.mean(0)).max() < 1e-4 * np.abs(x).max()
    if whole:
        assert (np.abs(found.products.numpy() - x.T @ x / len(x)) / scale).max() < 1e-4


@pytest.mark.parametrize("whole", [True, False])
def test_moments_of_every_projection_equal_numpys(family: str, whole: bool) -> None:
    decoder, cut = tiny(family).decoder, windows()
    expected = reads(decoder, cut)
    found = moments(decoder, cut, whole=whole)
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert_moments_of(found[name], x, whole)


def test_projections_that_read_the_same_share_their_moments() -> None:
    found = moments(tiny("llama").decoder, windows())
    first = [found[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.gate_proj")]
    assert found["model.layers.0.self_attn.v_proj.weight"] is first[0]
    assert found["model.layers.0.mlp.up_proj.weight"] is first[1]
    assert len(set(map(id, found.values()))) == 4 * BLOCKS


def test_a_block_sees_what_the_edited_blocks_before_it_make(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    found: list[dict[str, SecondMoments]] = []
    expected: list[dict[str, np.ndarray]] = []

    def visit(index: int, here: dict[str, SecondMoments]) -> None:
        assert index == len(found)
        found.append(here)
        expected.append(reads(decoder, cut))  # of the model as it is: the blocks before this one edited
        for each in decoder.projections:
            if each.block == index:
                sparsify(each.matrix.weight, index)

    before = reads(decoder, cut)
    Calibration(decoder, cut).each_block(visit, whole=True, edits=True, doing="")
    for index in range(BLOCKS):
        for name, each in found[index].items():
            assert_moments_of(each, expected[index][name])
            same = np.allclose(expected[index][name], before[name], atol=1e-4)
            assert same == (index == 0), name


def test_padded_positions_count_nowhere() -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    before, pairs = moments(decoder, cut), Calibration(decoder, cut).correlations([(0, 1)])
    cut.input_ids[-1, cut.lengths[-1] :] = 77
    after = moments(decoder, cut)
    assert all(torch.equal(after[name].products, before[name].products) for name in before)
    assert (Calibration(decoder, cut).correlations([(0, 1)])[0, 1] - pairs[0, 1]).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 64, 1 << 20])
def test_the_batch_size_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cut = tiny("qwen3").decoder, windows()
    expected, pairs = reads(decoder, cut), Calibration(decoder, cut).correlations(PAIRS)
    monkeypatch.setattr(room, "CPU_TOKENS", tokens)
    for edits in (True, False):
        for name, each in moments(decoder, cut, edits=edits).items():
            assert_moments_of(each, expected[name])
    found = Calibration(decoder, cut).correlations(PAIRS)
    assert max(float((found[pair] - pairs[pair]).abs().max()) for pair in PAIRS) < 1e-4


def test_blocks_that_lack_a_part_have_moments_of_the_other() -> None:
    decoder, cut = tiny("llama").decoder, windows()
    Drop(blocks="0-1", part="ffn").apply(decoder, None)
    Drop(blocks="1-2", part="attention").apply(decoder, None)
    visited: list[int] = []
    Calibration(decoder, cut).each_block(
        lambda index, here: visited.append(len(here)), whole=False, edits=True, doing=""
    )
    assert visited == [4, 0, 3, 7]
    expected = reads(decoder, cut)
    for name, each in moments(decoder, cut).items():
        assert_moments_of(each, expected[name])


@pytest.mark.parametrize("edits", [True, False])
def test_the_moments_of_one_block_are_held_and_no_more(edits: bool) -> None:
    decoder = tiny("gpt2").decoder
    made: list[weakref.ref[SecondMoments]] = []

    def visit(index: int, here: dict[str, SecondMoments]) -> None:
        made.extend(map(weakref.ref, here.values()))
        assert sum(each() is not None for each in made) == len(here) == 4

    Calibration(decoder, windows()).each_block(visit, whole=True, edits=edits, doing="")
    assert len(made) == 4 * BLOCKS
    assert [each() for each in made] == [None] * 4 * BLOCKS


def test_no_activations_of_a_batch_are_held_while_a_block_is_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    update = SecondMoments.update

    def watched(self: SecondMoments, x: torch.Tensor) -> None:
        seen.append(weakref.ref(x))
        update(self, x)

    def visit(index: int, here: dict[str, SecondMoments]) -> None:
        assert seen
        assert not any(each() is not None for each in seen)

    monkeypatch.setattr(SecondMoments, "update", watched)
    Calibration(tiny("gpt2").decoder, windows()).each_block(visit, whole=False, edits=True, doing="")


def test_a_visit_that_fails_leaves_the_model_as_it_was() -> None:
    decoder = tiny("gpt2").decoder
    activations = [type(each) for each in decoder.model.modules()]

    def visit(index: int, here: dict[str, SecondMoments]) -> None:
        assert [type(each) for each in decoder.model.modules()] != activations
        raise KeyError(index)

    with unchanged(decoder), pytest.raises(KeyError, match="0"):
        Calibration(decoder, windows()).each_block(visit, whole=False, edits=True, doing="")
    assert [type(each) for each in decoder.model.modules()] == activations
    assert_untouched(decoder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_name_the_matrix_that_reads_them(bad: float) -> None:
    decoder = tiny("llama").decoder
    decoder.blocks[1].ffn.up.weight[0, 0] = bad
    visited: list[int] = []
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.down_proj.weight' reads .* not finite"):
        Calibration(decoder, windows()).each_block(
            lambda index, _: visited.append(index), whole=False, edits=False, doing=""
        )
    assert visited == [0]


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize(
    ("family", "bad"), [("gpt2", float("nan")), ("gpt2", 1e30), *((family, float("inf")) for family in FAMILY_NAMES)]
)
def test_neurons_that_are_not_finite_are_not_matched(bad: float, pair: tuple[int, int], family: str) -> None:
    decoder = tiny(family).decoder
    decoder.blocks[1].ffn.up.weight[0, 0] = bad
    with refused(ModelError, r"^the neurons of block 1 on the calibration text are not finite"):
        Calibration(decoder, windows()).matches([pair])


# What FFNs read, and only some projections


@pytest.mark.parametrize("chosen", [[0], [2, 1], [3]])
def test_what_ffns_read_equals_numpys_and_is_remembered(
    chosen: list[int], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, cut = tiny(family).decoder, windows()
    expected, names = reads(decoder, cut), {each.matrix.module: each.name for each in decoder.projections}
    calibration = Calibration(decoder, cut)
    found = calibration.ffn_inputs(chosen)
    assert list(found) == chosen
    for index, each in found.items():
        ffn = decoder.blocks[index].ffn
        for moments, matrix in ((each.up, ffn.up), (each.down, ffn.down)):
            assert_moments_of(moments, expected[names[matrix.module]])
            assert moments.count == int(cut.lengths.sum())
    monkeypatch.setattr(module, "Stepper", None)  # a second pass would need it
    assert calibration.ffn_inputs(chosen[:1])[chosen[0]] is found[chosen[0]]
    assert calibration.ffn_inputs([]) == {}


def test_moments_of_some_projections_visit_their_blocks_and_run_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    names = {f"transformer.h.{index}.mlp.c_proj.weight" for index in (0, 2)}
    stepped: list[int] = []
    step = module.Stepper.step
    monkeypatch.setattr(
        module.Stepper, "step", lambda self, index, hidden: stepped.append(index) or step(self, index, hidden)
    )
    visited: dict[int, dict[str, SecondMoments]] = {}
    Calibration(decoder, cut).each_block(visited.__setitem__, whole=True, edits=False, doing="", names=names)
    assert list(visited) == [0, 2]
    assert {name for each in visited.values() for name in each} == names
    assert sorted(set(stepped)) == [0, 1, 2]


def test_blocks_that_lack_an_ffn_beside_a_pair_are_no_obstacle(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    decoder.remove_("ffn", [0, 2])
    found = Calibration(decoder, cut).correlations([(1, 3)])[1, 3]
    assert (found - torch.from_numpy(correlations(decoder, cut, 1, 3))).abs().max() < 1e-4
    for wrong in ([(0, 1)], [(1, 2)]):
        with pytest.raises(InputError, match="has no FFN"):
            Calibration(decoder, cut).matches(wrong)
    with pytest.raises(InputError, match="block 2 has no FFN"):
        Calibration(decoder, cut).ffn_inputs([1, 2])
