"""Training models whose zeros are held, whose FFNs differ in width or share weights, or that lack blocks and parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from safetensors.torch import load_file, save, save_file
from tiny import assert_masks_equal, chosen, halve_, logits, refused, shared, token_ids, unequal
from transformers import AutoModelForCausalLM

import layerfold
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import DELTAS, FORMATS
from layerfold.checkpoint.weights import cast_
from layerfold.errors import InputError, ModelError
from layerfold.methods import Drop, Merge, Prune
from layerfold.model import deltas
from layerfold.model.masks import held
from layerfold.recovery.trainer import RecoveryTrainer


def masked(model: Model) -> Model:
    halve_(model.decoder)
    return model


def uneven(model: Model) -> Model:
    """FFNs of two widths, of which the narrower has masks too, and is the width of neither zeros nor config."""
    halve_(model.decoder)
    model.decoder.keep_neurons_({0: chosen(model.decoder, 0, 30), 1: chosen(model.decoder, 1, 17)})
    return model


def uneven_student(model: Model) -> Model:
    halve_(model.decoder)
    model.decoder.keep_neurons_({1: chosen(model.decoder, 1, 20), 3: chosen(model.decoder, 3, 5)})
    return model


def tied(model: Model) -> Model:
    Merge(n=2, align="none", tie=True).apply(model.decoder, None)
    return masked(model)


def lacking(model: Model) -> Model:
    uneven(model)
    model.decoder.remove_("attention", [0])
    model.decoder.remove_("ffn", [0])
    return model


def dropped(model: Model) -> Model:
    Drop(blocks="0", part="attention").apply(model.decoder, None)
    Drop(blocks="1", part="ffn").apply(model.decoder, None)
    return model


def unequally(model: Model) -> Model:
    """Deltas of different ranks, some of them 0."""
    return unequal(shared(model))


def narrow(model: Model) -> Model:
    """Two blocks that share narrower FFNs, one of the full width, and one whose attention is gone."""
    model.decoder.keep_neurons_({index: torch.arange(40) for index in (1, 2)})
    model.decoder.remove_("attention", [0])
    return shared(model, window="1:2")


def masked_beside(model: Model) -> Model:
    Prune(sparsity=0.5, parts="attention").apply(model.decoder, None)
    return shared(model)


def beside_ties(model: Model) -> Model:
    """Blocks that share with deltas beside blocks that share all."""
    Merge(groups="0-1", align="none", tie=True).apply(model.decoder, None)
    return shared(model, window="2:2")


def assert_kept(model: Model, like: Model) -> None:
    """The same structure, zeros where they were held, to the last, and hardly any elsewhere."""
    assert_masks_equal(held(model.decoder), held(like.decoder))
    for name, mask in held(like.decoder).items():
        assert torch.equal(model.decoder.model.get_parameter(name) != 0, mask)
    assert model.decoder.d_ffn == like.decoder.d_ffn
    assert model.decoder.blocks_by_ffn == like.decoder.blocks_by_ffn
    assert model.decoder.removed_parts == like.decoder.removed_parts
    assert model.decoder.size() == like.decoder.size()
    if deltas.ranks(like.decoder):
        runs.assert_shared(model, like)


CASES: list[Any] = [
    (masked, "gpt2", "finetune", {"weight_decay": 0.1, "accumulation": 2}),
    (uneven, "qwen2", "finetune", {"weight_decay": 0.1, "accumulation": 4}),
    (tied, "llama", "finetune", {}),
    (lacking, "mistral", "finetune", {}),
    (dropped, "mistral", "finetune", {}),
    (shared, "qwen2", "finetune", {"weight_decay": 0.1, "accumulation": 2}),
    (masked_beside, "gpt2", "finetune", {"weight_decay": 0.1, "accumulation": 2}),
    (masked_beside, "gpt2", "lowrank", {"weight_decay": 0.1, "accumulation": 2}),
    (beside_ties, "gpt2", "finetune", {"weight_decay": 0.1, "accumulation": 2}),
    (unequally, "llama", "lowrank", {"weight_decay": 0.1, "accumulation": 2}),
    (narrow, "gpt2", "lowrank", {"weight_decay": 0.1, "accumulation": 2}),
]


@pytest.mark.parametrize(("make", "family", "kind", "settings"), CASES)
def test_a_structure_survives_training_its_checkpoints_a_kill_and_saving(
    make: Any, family: str, kind: str, settings: dict[str, Any], tmp_path: Path, train: Train
) -> None:
    deep = {"n_layer": 4} if make in (narrow, beside_ties) else {}
    model = make(runs.small(family, **deep))
    model.save(tmp_path / "model", format="compact")
    recovery = getattr(train, kind)(steps=4, learning_rate=3e-3, **settings)
    recovered, outcome = train(model, recovery)
    assert outcome.best_step == 4
    if kind == "finetune":
        assert outcome.parameters_trained == model.decoder.size().parameters, "what is shared counts once"
    assert runs.difference(recovered, model) > 1e-4
    assert recovered.sha256 != model.sha256
    assert_kept(recovered, model)
    for step in (2, 4):  # each on the disk, whether it is the best or not, is one that plain transformers loads
        path = tmp_path / "run" / f"checkpoint-{step}"
        if path.is_dir():
            plain, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            assert not any(info.values())
            for name, mask in held(model.decoder).items():
                assert torch.equal(plain.get_parameter(name)[: len(mask), : mask.shape[1]] != 0, mask), name
            # Nothing pickled but the optimizer.
            pickled = {each.name for each in path.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".pkl")}
            assert pickled <= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert torch.allclose(plain(token_ids()).logits, logits(recovered.decoder), atol=1e-5)
    for form in FORMATS:
        recovered.save(tmp_path / form, format=form)
        loaded = load(tmp_path / form)
        assert_masks_equal(held(loaded.decoder), held(recovered.decoder))
        assert loaded.decoder.d_ffn == model.decoder.d_ffn
        # Multiplied out, deltas are rounded.
        exact = form == "compact" or not deltas.ranks(model.decoder)
        assert torch.allclose(logits(loaded.decoder), logits(recovered.decoder), atol=0 if exact else 1e-5, rtol=0)
        if form == "compact":
            assert_kept(loaded, model)
            assert loaded.sha256 == recovered.sha256
    train.killed(3, model, recovery, "killed")
    for form in FORMATS if make is uneven else ("compact",):
        model.save(tmp_path / "model", format=form, overwrite=True)
        shutil.copytree(tmp_path / "killed", tmp_path / f"killed-{form}")
        again = train(load(tmp_path / "model"), recovery, f"killed-{form}")  # resumes the run of the saved model
        runs.assert_equal(again, (recovered, outcome), drifted=0)
        assert_kept(again[0], model)


@pytest.mark.parametrize("make", [masked, uneven_student, tied, shared, lambda m: shared(m, rank=0)])
def test_a_student_keeps_its_structure(make: Any, taught: Model, train: Train) -> None:
    model, before = make(taught.copy()), runs.weights(taught)
    recovery = train.distill(steps=4, hidden_weight=0.5, learning_rate=3e-3)
    recovered, outcome = train(model, recovery, teacher=taught)
    assert outcome.best_step == 4 or (make is tied and outcome.best_step == 2)
    assert outcome.parameters_trained == model.decoder.size().parameters <= taught.decoder.size().parameters
    assert_kept(recovered, model)
    assert runs.difference(before, taught) == 0
    train.killed(3, model, recovery, "killed", teacher=taught)
    assert runs.drift(train(model, recovery, "killed", teacher=taught)[0], recovered) == 0


def test_a_student_without_attention_learns_what_leaves_its_teachers_blocks(
    taught: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    model = layerfold.compress(layerfold.compress(taught, Drop(blocks="1")), Drop(blocks="0,2", part="attention"))
    seen: list[Any] = []
    recovery = train.distill(steps=4, hidden_weight=0.5, learning_rate=3e-3)
    original = type(recovery).loss

    def loss(self: Any, student: Any, ids: Any, teacher: Any, counterparts: Any) -> Any:
        seen.append((len(student.hidden_states), len(teacher.hidden_states), counterparts))
        return original(self, student, ids, teacher, counterparts)

    monkeypatch.setattr(type(recovery), "loss", loss)
    recovered, outcome = train(model, recovery, teacher=taught)
    assert set(seen) == {(4, 5, (1, 2, 3))}
    assert outcome.best_step == 4
    assert runs.difference(recovered, model) > 1e-4
    recovered.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.decoder.removed_parts == {"attention": (0, 2), "ffn": ()}
    assert torch.equal(logits(loaded.decoder), logits(recovered.decoder))


@pytest.mark.parametrize(("make", "family"), [(masked, "gpt2"), (unequally, "gpt2"), (dropped, "mistral")])
def test_a_structure_is_trained_as_by_a_plain_loop(make: Any, family: str, train: Train) -> None:
    model = make(runs.small(family))
    recovery = train.finetune(steps=4, weight_decay=0.1, clip=0.1, learning_rate=3e-3)
    recovered, outcome = train(model, recovery)
    assert outcome.best_step == 4
    expected = runs.by_hand(model, train.batches(4), rate=3e-3, warmup=0, decay=0.1, clip=0.1)
    assert runs.drift(recovered, expected) < 1e-5
    moved = runs.weights(recovered)
    assert all(not torch.equal(tensor, moved[name]) for name, tensor in runs.weights(model).items() if tensor.numel())


# Zeros


def test_zeros_that_are_not_held_are_filled(train: Train) -> None:
    plain, kept = runs.small(), halve_(runs.small().decoder)
    with torch.no_grad():
        for name, mask in kept.items():
            plain.decoder.model.get_parameter(name).masked_fill_(~mask, 0)
    trained, _ = train(plain, train.finetune(steps=3))
    assert all(int((runs.weights(trained)[name] == 0).sum()) < int((~mask).sum()) // 2 for name, mask in kept.items())


@pytest.mark.parametrize("make", [masked, tied])
def test_gradients_of_held_zeros_are_no_part_of_the_norm_that_is_clipped(
    make: Any, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    model, clip, seen = make(runs.small()), RecoveryTrainer._clip_grad_norm, []
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_trained_with_float32_weights_and_keeps_its_dtype_and_zeros(
    dtype: torch.dtype, train: Train
) -> None:
    model = masked(runs.small())
    cast_(model.decoder.model, dtype)
    before = {name: each.clone() for name, each in model.decoder.model.named_parameters()}
    kept = held(model.decoder)
    trained, outcome = train(model, train.finetune(steps=4))
    assert outcome.best_step
    after = dict(trained.decoder.model.named_parameters())
    assert {each.dtype for each in after.values()} == {dtype}
    assert any(not torch.equal(after[name], each) for name, each in before.items())
    assert kept
    assert not any(after[name][~mask].any() for name, mask in kept.items())


def test_the_search_of_a_rate_holds_zeros_too(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    model, ends = masked(runs.small()), []
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
    assert_kept(recovered, model)


@pytest.mark.parametrize("over", [False, True], ids=["resumed", "finished"])
def test_a_checkpoint_that_is_not_zero_where_it_must_be_is_refused(over: bool, tmp_path: Path, train: Train) -> None:
    model, recovery = uneven(runs.small()), train.finetune(evaluations=3, learning_rate=3e-3, weight_decay=0.1)
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


# What blocks share


def test_the_best_weights_are_read_back_to_the_bit(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    """Not from the product of the deltas, which does not say what they were."""
    nats, kept = iter([3.0, 1.0, 2.0]), {}

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(nats)}
        kept[self.state.global_step] = runs.weights(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(RecoveryTrainer, "evaluate", evaluate)
    recovered, outcome = train(shared(runs.small()), train.lowrank(learning_rate=1e-2))
    assert outcome.best_step == 3
    assert runs.difference(recovered, kept[3]) == 0
    assert runs.difference(recovered, kept[6]) > 1e-3


def test_a_checkpoint_without_its_deltas_is_an_error_and_not_other_weights(tmp_path: Path, train: Train) -> None:
    model, recovery = shared(runs.small()), train.lowrank(steps=2, evaluations=1)
    assert train(model, recovery)[1].best_step == 2
    file = tmp_path / "run" / "checkpoint-2" / DELTAS
    whole, tensors = file.read_bytes(), load_file(file)
    name = next(name for name in tensors if name.endswith(".a"))
    cut = save(tensors | {name: tensors[name][:, :1].contiguous()})
    for damaged in (None, whole[:-8], cut):
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        with refused(ModelError, r"cannot be read: ."):
            train(model, recovery)


@pytest.mark.parametrize("make", [shared, masked_beside])
def test_shards_of_what_is_shared_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    original = RecoveryTrainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        original(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(RecoveryTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(InputError, match="and FSDP, which shards the tensors: accepted: one of the two"):
        train(make(runs.small()), train.finetune(steps=1))
