"""Training models of which zeros are held, or whose FFNs have different widths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from safetensors.torch import load_file, save_file
from tiny import assert_masks_equal, chosen, halve_, logits, refused, sparsify, tiny, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS
from layerfold.errors import InputError, ModelError
from layerfold.methods import Merge
from layerfold.model.masks import held, hold_
from layerfold.recovery import Recovery
from layerfold.recovery.trainer import RecoveryTrainer


def masked(family: str = "gpt2") -> Model:
    model = runs.small(family)
    halve_(model.decoder)
    return model


def uneven(family: str = "gpt2") -> Model:
    """FFNs of two widths, of which the narrower has masks too, and is the width of neither zeros nor config."""
    model = runs.small(family)
    halve_(model.decoder)
    model.decoder.keep_neurons_({0: chosen(model.decoder, 0, 30), 1: chosen(model.decoder, 1, 17)})
    return model


def tied(family: str = "gpt2") -> Model:
    model = runs.small(family)
    Merge(n=2, align="none", tie=True).apply(model.decoder, None)
    halve_(model.decoder)
    return model


def lacking(family: str = "gpt2") -> Model:
    model = uneven(family)
    model.decoder.remove_("attention", [0])
    model.decoder.remove_("ffn", [0])
    return model


def assert_zeros(model: Model, like: Model) -> None:
    """Zeros where they were held, to the last, and hardly any elsewhere."""
    kept = held(like.decoder)
    assert kept
    assert_masks_equal(held(model.decoder), kept)
    for name, mask in kept.items():
        weight = model.decoder.model.get_parameter(name)
        assert not weight[~mask].any()
        assert torch.count_nonzero(weight) == mask.sum()
    assert model.decoder.d_ffn == like.decoder.d_ffn
    assert model.decoder.removed_parts == like.decoder.removed_parts
    assert model.decoder.size() == like.decoder.size()


@pytest.mark.parametrize(
    ("make", "family", "settings"),
    [
        (masked, "gpt2", {"weight_decay": 0.1, "accumulation": 2}),
        (uneven, "qwen2", {"weight_decay": 0.1, "accumulation": 4}),
        (tied, "llama", {}),
        (lacking, "mistral", {}),
    ],
)
def test_zeros_and_widths_survive_training_its_checkpoints_and_a_kill(
    make: Any, family: str, settings: dict[str, Any], tmp_path: Path, train: Train
) -> None:
    model = make(family)
    recovery = train.finetune(steps=4, learning_rate=3e-3, **settings)
    recovered, outcome = train(model, recovery)
    assert outcome.best_step == 4
    assert outcome.parameters_trained == model.decoder.size().parameters
    assert runs.difference(recovered, model) > 1e-4
    assert_zeros(recovered, model)
    assert recovered.sha256 != model.sha256
    for step in (2, 4):  # each on the disk, whether it is the best or not, is one that plain transformers loads
        path = tmp_path / "run" / f"checkpoint-{step}"
        if path.is_dir():
            plain, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            assert not any(info.values())
            for name, mask in held(model.decoder).items():
                weight = plain.get_parameter(name)[: len(mask), : mask.shape[1]]
                assert torch.equal(weight != 0, mask), name
    assert torch.allclose(plain(token_ids()).logits, logits(recovered.decoder), atol=1e-5)
    for form in FORMATS:
        recovered.save(tmp_path / form, format=form)
        loaded = load(tmp_path / form)
        assert_masks_equal(held(loaded.decoder), held(recovered.decoder))
        assert loaded.decoder.d_ffn == model.decoder.d_ffn
        assert torch.equal(logits(loaded.decoder), logits(recovered.decoder))
    train.killed(3, model, recovery, "killed")
    again = train(model, recovery, "killed")
    runs.assert_equal(again, (recovered, outcome))
    assert_zeros(again[0], model)


def test_zeros_that_are_not_held_are_filled(train: Train) -> None:
    plain, kept = runs.small(), halve_(runs.small().decoder)
    with torch.no_grad():
        for name, mask in kept.items():
            plain.decoder.model.get_parameter(name).masked_fill_(~mask, 0)
    trained, _ = train(plain, train.finetune(steps=3))
    assert all(int((runs.weights(trained)[name] == 0).sum()) < int((~mask).sum()) // 2 for name, mask in kept.items())


def test_zeros_are_held_for_each_block_of_a_tie_whichever_names_them(train: Train) -> None:
    model = tiny("gpt2")
    Merge(n=4, align="none", tie=True).apply(model.decoder, None)
    kept = sparsify(model.decoder.blocks[0].ffn.up.module.weight)
    hold_(model.decoder, {"transformer.h.2.mlp.c_fc.weight": kept})
    trained, _ = train(model, train.finetune(steps=3))
    for block in trained.decoder.blocks:
        assert torch.equal(block.ffn.up.module.weight != 0, kept)


def test_each_step_is_a_plain_one_of_the_weights_that_are_kept(train: Train) -> None:
    """What is held gets no step of its own: the others' are those of a loop that multiplies by the mask."""
    model = masked()
    recovery = train.finetune(steps=4, weight_decay=0.1, clip=0.1)
    recovered, outcome = train(model, recovery)
    kept = held(model.decoder)
    expected: Any = model.decoder.copy().model.eval()
    named = dict(expected.named_parameters())
    plain = [p for name, p in named.items() if name.endswith("bias") or ".ln_" in name]
    decayed = [p for p in named.values() if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step, ids in enumerate(train.batches(4)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 4)
        expected(input_ids=ids, labels=ids).loss.backward()
        for name, mask in kept.items():
            named[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in kept.items():
                named[name].mul_(mask)
    assert outcome.best_step == 4
    assert runs.drift(recovered, expected) < 1e-5


@pytest.mark.parametrize("make", [masked, tied])
def test_gradients_of_held_zeros_are_no_part_of_the_norm_that_is_clipped(
    make: Any, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    model, clip, seen = make(), RecoveryTrainer._clip_grad_norm, []
    masks = held(model.decoder)

    def watched(self: RecoveryTrainer, trained: Any) -> Any:
        gradients = {name: trained.get_parameter(name).grad for name in masks}
        assert all(gradients[name][mask].any() and not gradients[name][~mask].any() for name, mask in masks.items())
        everything = torch.stack([each.grad.norm() for each in trained.parameters() if each.grad is not None]).norm()
        norm = clip(self, trained)
        assert norm == pytest.approx(float(everything), rel=1e-5)
        seen.append(norm)
        return norm

    monkeypatch.setattr(RecoveryTrainer, "_clip_grad_norm", watched)
    train(model, train.finetune(steps=2, accumulation=2))
    assert len(seen) == 2


def test_half_precision_is_not_trained(train: Train) -> None:
    model = masked()
    model.decoder.model.bfloat16()
    with pytest.raises(InputError, match=r"is bfloat16, and training takes float32; accepted: .*model\.float\(\)"):
        train(model, train.finetune(steps=2))


@pytest.mark.parametrize("make", [masked, uneven])
def test_a_student_keeps_its_zeros_and_widths(make: Any, taught: Model, train: Train) -> None:
    model = taught.copy()
    halve_(model.decoder)
    if make is uneven:
        model.decoder.keep_neurons_({1: chosen(model.decoder, 1, 20), 3: chosen(model.decoder, 3, 5)})
    before = runs.weights(taught)
    recovery = train.distill(steps=4, hidden_weight=0.5, learning_rate=3e-3)
    recovered, outcome = train(model, recovery, teacher=taught)
    assert outcome.best_step == 4
    assert_zeros(recovered, model)
    assert runs.difference(before, taught) == 0


def test_the_search_of_a_rate_holds_zeros_too(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    model, ends = masked(), []
    original = RecoveryTrainer.evaluate

    def evaluate(self: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        weights = runs.weights(self.model)
        ends.append(max(float(weights[name][~mask].abs().max()) for name, mask in held(model.decoder).items()))
        return original(self, *arguments, **options)

    monkeypatch.setattr(RecoveryTrainer, "evaluate", evaluate)
    recovery = train.finetune(steps=8, learning_rate=None, search_fraction=0.25, evaluations=1)
    recovered, outcome = train(model, recovery)
    assert len(ends) == len(outcome.learning_rates) + 2
    assert set(ends) == {0.0}
    assert_zeros(recovered, model)


# Killed and resumed


def three_checkpoints(corpus: str, **changes: Any) -> Recovery:
    return runs.finetune(corpus, **{"steps": 6, "evaluations": 3, "learning_rate": 3e-3, "weight_decay": 0.1} | changes)


def test_a_reloaded_model_goes_on_with_the_run_of_the_one_that_was_saved(
    straight: Any, tmp_path: Path, train: Train
) -> None:
    model, recovery = uneven(), three_checkpoints(train.corpus)
    train.killed(3, model, recovery)
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"run-{form}")
        runs.assert_equal(train(load(tmp_path / form), recovery, folder), straight(model, recovery))


@pytest.mark.parametrize("over", [False, True], ids=["resumed", "finished"])
def test_a_checkpoint_that_is_not_zero_where_it_must_be_is_refused(over: bool, tmp_path: Path, train: Train) -> None:
    model, recovery = uneven(), three_checkpoints(train.corpus)
    if over:
        assert train(model, recovery)[1].best_step == 6
    else:
        train.killed(3, model, recovery)
    path = tmp_path / "run" / f"checkpoint-{6 if over else 2}" / "model.safetensors"
    name = "transformer.h.1.mlp.c_fc.weight"  # (d_model, d_ffn)
    whole = load_file(path)[name]
    assert whole.shape[1] == 30
    masked_at = tuple(torch.nonzero(~held(model.decoder)[name])[0])
    for place, said in (
        (masked_at, "is not zero everywhere that its mask says"),
        ((0, 17), "is not zero where the model has nothing"),
    ):
        changed = whole.clone()
        changed[place] = 1e-9
        save_file(load_file(path) | {name: changed}, path, metadata={"format": "pt"})
        with refused(ModelError, f"'{name}' {said}$"):
            train(model, recovery)
