"""Models that share FFNs, trained in whatever way: what stays shared, on the disk too, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from safetensors.torch import load_file, save
from tiny import assert_masks_equal, logits, refused, shared, token_ids, unequal
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import DELTAS, FORMATS
from layerfold.errors import InputError, ModelError
from layerfold.methods import Merge, Prune
from layerfold.model import deltas
from layerfold.model.masks import held
from layerfold.recovery import Recovery
from layerfold.recovery import trainer as training


def plain(family: str = "gpt2") -> Model:
    return shared(runs.small(family))


def uneven(family: str = "gpt2") -> Model:
    """Deltas of different ranks, some of them 0."""
    return unequal(plain(family))


def narrow(family: str = "gpt2") -> Model:
    """Two blocks that share narrower FFNs, one of the full width, and one whose attention is gone."""
    model = runs.small(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    model.decoder.keep_neurons_({index: torch.arange(40) for index in (1, 2)})
    model.decoder.remove_("attention", [0])
    return shared(model, window="1:2")


def masked(family: str = "gpt2") -> Model:
    model = runs.small(family)
    Prune(sparsity=0.5, parts="attention").apply(model.decoder, None)
    return shared(model)


def beside_ties(family: str = "gpt2") -> Model:
    """Blocks that share with deltas beside blocks that share all."""
    model = runs.small(family, n_layer=4)
    Merge(groups="0-1", align="none", tie=True).apply(model.decoder, None)
    return shared(model, window="2:2")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (runs.lowrank, uneven),
        (runs.lowrank, masked),
        (runs.lowrank, narrow),
        (runs.finetune, plain),
        (runs.finetune, masked),
        (runs.finetune, beside_ties),
    ],
)
def test_a_killed_run_gives_the_same_weights_to_the_bit_and_checkpoints_that_plain_transformers_loads(
    kind: Any, make: Any, tmp_path: Path, train: Train
) -> None:
    model = make()
    recovery: Recovery = kind(train.corpus, evaluations=3, learning_rate=3e-3, accumulation=2, weight_decay=0.1)
    whole = train(model, recovery, "whole")
    train.killed(3, model, recovery)
    again, outcome = train(model, recovery)
    assert outcome.best_step == 6
    runs.assert_equal((again, outcome), whole, drifted=0)
    assert runs.difference(again, model) > 1e-3
    runs.assert_shared(again, model)
    if kind is runs.finetune:
        assert outcome.parameters_trained == model.decoder.size().parameters, "what is shared counts once"
    # Zeros that are held elsewhere stay.
    kept = held(model.decoder)
    assert len(kept) == 4 * (make is masked)
    assert_masks_equal(held(again.decoder), kept)
    for name, mask in kept.items():
        assert torch.count_nonzero(again.decoder.model.get_parameter(name)) == mask.sum()
    # Nothing pickled but the optimizer.
    folder = tmp_path / "run" / "checkpoint-6"
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(loaded(token_ids()).logits, logits(again.decoder), atol=1e-5)
    pickled = {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickled <= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


def test_fine_tuning_trains_what_is_shared_once(train: Train) -> None:
    model = uneven()
    recovery = train.finetune(warmup=1 / 6, weight_decay=0.1)
    recovered, outcome = train(model, recovery)
    assert outcome.best_step == 6
    expected = runs.by_hand(model, train.batches(6), decay=0.1)
    assert runs.drift(recovered, expected) < 1e-5
    moved = runs.weights(recovered)
    assert all(not torch.equal(tensor, moved[name]) for name, tensor in runs.weights(model).items() if tensor.numel())


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", runs.finetune), ("llama", runs.lowrank), ("qwen2", runs.finetune)]
)
def test_what_was_trained_is_saved_and_loaded_as_it_is(family: str, kind: Any, tmp_path: Path, train: Train) -> None:
    model = uneven(family)
    recovered, _ = train(model, kind(train.corpus, steps=2, learning_rate=3e-3))
    for form in FORMATS:
        recovered.save(tmp_path / form, format=form)
    compact, dense = (load(tmp_path / form) for form in ("compact", "dense"))
    runs.assert_shared(compact, model)
    assert compact.sha256 == recovered.sha256
    assert torch.equal(logits(compact.decoder), logits(recovered.decoder))
    assert not deltas.ranks(dense.decoder)
    assert torch.allclose(logits(dense.decoder), logits(recovered.decoder), atol=1e-5)


def test_a_reloaded_model_goes_on_with_the_run_of_the_one_that_was_saved(tmp_path: Path, train: Train) -> None:
    model, recovery = uneven(), train.lowrank(evaluations=3)
    model.save(tmp_path / "model", format="compact")
    train.killed(3, model, recovery)
    again, _ = train(load(tmp_path / "model"), recovery)
    assert runs.difference(again, train(model, recovery, "whole")[0]) == 0


def test_the_best_weights_are_read_back_to_the_bit(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    """Not from the product of the deltas, which does not say what they were."""
    nats, kept = iter([3.0, 1.0, 2.0]), {}

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(nats)}
        kept[self.state.global_step] = runs.weights(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(training.RecoveryTrainer, "evaluate", evaluate)
    recovered, outcome = train(plain(), train.lowrank(learning_rate=1e-2))
    assert outcome.best_step == 3
    assert runs.difference(recovered, kept[3]) == 0
    assert runs.difference(recovered, kept[6]) > 1e-3


def test_a_checkpoint_without_its_deltas_is_an_error_and_not_other_weights(tmp_path: Path, train: Train) -> None:
    model, recovery = plain(), train.lowrank(steps=2, evaluations=1)
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


@pytest.mark.parametrize("make", [shared, lambda model: shared(model, rank=0)], ids=["deltas", "none"])
def test_a_student_that_shares_stays_so(make: Any, taught: Model, train: Train) -> None:
    model = make(taught.copy())
    recovery = train.distill(evaluations=3, hidden_weight=0.5, learning_rate=3e-3)
    whole, outcome = train(model, recovery, "whole", teacher=taught)
    assert outcome.parameters_trained == model.decoder.size().parameters < taught.decoder.size().parameters
    train.killed(3, model, recovery, teacher=taught)
    again, _ = train(model, recovery, teacher=taught)
    assert runs.drift(whole, again) == 0
    runs.assert_shared(again, model)


@pytest.mark.parametrize("make", [plain, masked])
def test_shards_of_what_is_shared_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    original = training.RecoveryTrainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        original(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(training.RecoveryTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(InputError, match="and FSDP, which shards the tensors: accepted: one of the two"):
        train(make(), train.finetune(steps=1))
