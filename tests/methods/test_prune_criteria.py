"""Which weights go, by each criterion, scope and structure, and what the others become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruning import CUT, SCOPES, WAYS, fresh, norms, prunable, prune, weights
from tiny import BLOCKS, logits, unchanged

from layerfold.calibration import Calibration
from layerfold.errors import ModelError
from layerfold.methods import Prune
from layerfold.model.masks import held

CRITERION = pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])


@pytest.mark.parametrize("scope", SCOPES)
def test_wanda_is_its_definition_on_what_pruned_blocks_make(family: str, scope: Any) -> None:
    original = fresh(family)
    decoder, mixed = original.copy(), original.copy()
    prune(decoder, sparsity=0.5, criterion="wanda", scope=scope)
    results = {each.name: each.matrix.weight for each in decoder.projections}
    gone, left = 0.0, np.inf
    for index in range(BLOCKS):
        # By the published order the blocks before are pruned; one choice over all needs all at once.
        sizes = norms(original if scope == "global" else mixed)
        for each in [each for each in mixed.projections if each.block == index]:
            weight, result = each.matrix.weight.double().numpy(), results[each.name].numpy()
            scores, kept = np.abs(weight) * sizes[each.name], result != 0
            if scope == "global":
                gone, left = max(gone, scores[~kept].max()), min(left, scores[kept].min())
            for row, keeps in zip(*([scores, kept] if scope == "row" else [[scores], [kept]]), strict=True):
                if scope != "global":
                    assert keeps.sum() == keeps.size // 2
                    assert row[~keeps].max() <= row[keeps].min() * (1 + 1e-4)
            each.matrix.weight.copy_(results[each.name])
    assert gone <= left * (1 + 1e-4)


def test_sparsegpt_makes_up_for_what_it_zeroes(family: str) -> None:
    decoder = fresh(family)
    before = decoder.copy()
    prune(decoder, sparsity=0.5, criterion="sparsegpt")
    moments: dict[str, Any] = {}
    Calibration(before, CUT).each_block(
        lambda index, found: moments.update(found if index == 0 else {}), whole=True, edits=False, doing=""
    )
    old = {each.name: each.matrix.weight.double() for each in before.projections}
    for each in [each for each in decoder.projections if each.block == 0]:
        new, h = each.matrix.weight.double(), moments[each.name].products.double()
        kept = new != 0
        assert int(kept.sum()) == kept.numel() // 2
        changes = new - old[each.name], torch.where(kept, old[each.name], 0) - old[each.name]
        made_up, plain = (float(((change @ h) * change).sum()) for change in changes)
        assert made_up < plain, each.name


@CRITERION
def test_two_of_four_along_the_inputs_of_every_row(family: str, criterion: Any) -> None:
    decoder = fresh(family)
    before, total = weights(decoder), prunable(decoder)[0]
    assert Prune(structure="2:4", criterion=criterion).resolved(decoder)["zeros"] == total // 2
    prune(decoder, structure="2:4", criterion=criterion)
    for each in decoder.projections:
        stored = dict(decoder.model.named_parameters())[each.name].detach()
        rows = stored.T if family == "gpt2" else stored  # Conv1D stores (in, out)
        fours = (rows != 0).reshape(len(rows), -1, 4)
        assert (fours.sum(2) == 2).all()
        if criterion == "magnitude":
            old = before[each.name].T if family == "gpt2" else before[each.name]
            old = old.reshape(len(rows), -1, 4).abs()
            assert (old.masked_fill(fours, 0).amax(2) <= old.masked_fill(~fours, torch.inf).amin(2)).all()
    assert prunable(decoder)[1] == total // 2
    with unchanged(decoder):
        prune(decoder, structure="2:4", criterion=criterion)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_published_prunes_the_linear_modules_and_warns_of_a_tied_table(family: str) -> None:
    decoder = fresh(family)
    before, total = weights(decoder), decoder.size().nonzero
    notes = prune(decoder, nonzero="90%", criterion="published")
    assert decoder.size().nonzero == round(0.9 * total)
    changed = [name for name, each in weights(decoder).items() if not torch.equal(each, before[name])]
    if family == "gpt2":
        assert changed == ["transformer.wte.weight"]
        assert list(held(decoder)) == ["transformer.wte.weight"]
    assert decoder.model.get_input_embeddings().weight is decoder.model.get_output_embeddings().weight
    assert "one matrix: what is zeroed in it is lost to both" in notes["warning"]


def test_published_prunes_an_untied_head_and_every_projection() -> None:
    decoder = fresh("llama")
    table = decoder.model.get_input_embeddings().weight.detach().clone()
    notes = prune(decoder, sparsity=0.4, criterion="published")
    assert held(decoder).keys() == {"lm_head.weight", *(each.name for each in decoder.projections)}
    assert notes["zeros"] == round(0.4 * notes["weights"])
    assert torch.equal(decoder.model.get_input_embeddings().weight, table)
    assert "lost to both" not in notes.get("warning", "")


@pytest.mark.parametrize("parts", ["embeddings", "head", "embeddings,head", "attention,ffn,embeddings,head"])
def test_tables_are_pruned_where_asked_for_and_a_tied_one_once(parts: str) -> None:
    tied, free = fresh("gpt2"), fresh("llama")
    for decoder in (tied, free):
        notes = prune(decoder, sparsity=0.5, parts=parts)
        assert "warning" in notes
        zero = [int((each == 0).sum()) for each in weights(decoder).values()]
        assert sum(zero) == notes["zeros"] == round(0.5 * notes["weights"])
    tables = {"transformer.wte.weight"}
    assert tables <= held(tied).keys()
    assert ("lm_head.weight" in held(free)) == ("head" in parts)
    assert ("model.embed_tokens.weight" in held(free)) == ("embeddings" in parts)


# Inputs that say nothing


@pytest.mark.parametrize("way", WAYS[3:], ids=lambda way: "-".join(way.values()))
def test_inputs_that_are_always_zero(way: dict[str, Any]) -> None:
    decoder = fresh("gpt2")
    for parameter in decoder.blocks[0].module.ln_1.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    decoder.blocks[2].ffn.up.weight[:64] = 0
    decoder.blocks[2].ffn.up.bias[:64] = 0  # type: ignore[index]
    parameters = decoder.size().parameters
    prune(decoder, nonzero="75%", **way)
    assert decoder.size().nonzero == round(0.75 * parameters)
    assert torch.isfinite(logits(decoder)).all()


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "neurons"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_activations_that_are_not_numbers_are_an_error(criterion: Any, structure: Any) -> None:
    decoder = fresh("gpt2")
    decoder.blocks[1].ffn.up.weight[3, 3] = torch.nan
    with pytest.raises(ModelError, match=r"'transformer.h.1.mlp.c_proj.weight' reads .* not finite"):
        prune(decoder, sparsity=None if structure == "2:4" else 0.3, criterion=criterion, structure=structure)
