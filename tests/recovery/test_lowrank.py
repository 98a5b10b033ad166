"""Training the deltas of models that share FFNs, and training such models otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from tiny import logits, refused, shared, unequal
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from layerfold import recover
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import hash_weights
from layerfold.errors import InputError
from layerfold.model import deltas
from layerfold.model.decoder import Decoder
from layerfold.recovery import LowRank
from layerfold.recovery.trainer import RecoveryTrainer


def small(family: str = "gpt2", rank: int = 2) -> Model:
    """Two blocks that share."""
    return shared(runs.small(family), rank=rank)


def dense() -> Model:
    model = small()
    return Model(deltas.multiplied_out(model.decoder), model.tokenizer, model.provenance)


def is_of_a_delta(name: str) -> bool:
    return name.endswith((".a", ".b"))


def squares(model: PreTrainedModel) -> Tensor:
    """The sum of |A B|_F^2, each product formed."""
    modules = deltas.factored(Decoder(model)).values()
    return torch.stack([torch.square(module.a @ module.b).sum() for module in modules]).sum()


def by_hand(model: Model, texts: list[Tensor], penalty_weight: float, decay: float = 0.0) -> PreTrainedModel:
    """Train a copy's A and B by a plain loop."""
    trained: PreTrainedModel = model.decoder.copy().model.eval()
    factors = [parameter for name, parameter in trained.named_parameters() if is_of_a_delta(name)]
    optimizer = torch.optim.AdamW(factors, lr=1e-3, weight_decay=decay)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1, len(texts))
    for ids in texts:
        loss = trained(input_ids=ids, labels=ids).loss + penalty_weight * squares(trained)
        found = torch.autograd.grad(loss, factors)
        for parameter, gradient in zip(factors, found, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        scheduler.step()
    return trained


# What is trained


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"penalty_weight": 0.0}),
        ("gpt2", {"penalty_weight": 1e-2, "weight_decay": 0.1}),
        ("qwen2", {"penalty_weight": 1e-3, "accumulation": 2}),
    ],
)
def test_it_is_the_same_training_written_out_by_hand(family: str, settings: dict[str, Any], train: Train) -> None:
    model = small(family)
    recovered, outcome = train(model, train.lowrank(warmup=1 / 6, **settings))
    assert outcome.best_step == 6
    texts = train.batches(6)
    expected = by_hand(model, texts, settings["penalty_weight"], settings.get("weight_decay", 0.0))
    assert runs.difference(recovered, expected) < 1e-5
    without = by_hand(model, texts, 0.0)
    assert runs.difference(recovered, without) > 1e-5 or not settings["penalty_weight"], "the penalty tells"


@pytest.mark.parametrize(
    ("model", "freeze"),
    [
        *((lambda: small("gpt2"), ()), (lambda: small("llama"), ())),
        (lambda: unequal(small()), ("*.0.*.a",)),  # freezing goes on top, and deltas of rank 0 are not trained
    ],
)
def test_all_deltas_are_trained_and_nothing_else(model: Any, freeze: tuple[str, ...], train: Train) -> None:
    model = model()
    before, ranks = runs.weights(model), deltas.ranks(model.decoder)
    recovered, outcome = train(model, train.lowrank(steps=2, freeze=freeze))
    after = runs.weights(recovered)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if freeze and ".0." in name and name.endswith(".a")}
    trained = {f"{path}.{name}" for path, rank in ranks.items() for name in "ab" if rank}
    assert moved == trained - frozen
    assert bool(frozen) == bool(freeze)
    assert (outcome.method, outcome.best_step) == ("lowrank", 2)
    assert outcome.parameters_trained == sum(before[name].numel() for name in moved)
    assert runs.difference(before, model) == 0, "the model that was given"
    runs.assert_shared(recovered, model)
    step = recovered.provenance.steps[-1]["method"]
    assert (step["name"], step["penalty_weight"]) == ("lowrank", 1e-4)


@pytest.mark.parametrize("freeze", [("*.a", "*.b"), ("*",)])
def test_freezing_all_of_it_is_refused(freeze: tuple[str, ...], tmp_path: Path, train: Train) -> None:
    with pytest.raises(InputError, match=r"^freeze \*\S*( \*\.b)? leaves nothing to train$"):
        train(small(), train.lowrank(freeze=freeze))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [runs.small, lambda: small(rank=0), dense], ids=["plain", "of rank 0", "dense"])
def test_a_model_without_deltas_is_refused_in_one_line(make: Any, train: Train) -> None:
    with refused(InputError, r"the model has none; accepted: .* in the compact form"):
        recover(make(), train.lowrank())


def test_among_the_rows_of_a_study_a_model_without_deltas_stays_as_it_is(train: Train) -> None:
    model = runs.small()
    recovered, outcome = train(model, train.lowrank(learning_rate=None))
    assert hash_weights(recovered.decoder.model) == hash_weights(model.decoder.model)
    assert (outcome.tokens, outcome.search_tokens, outcome.steps, outcome.best_step) == (0, 0, 0, 0)
    assert (outcome.parameters_trained, outcome.learning_rate) == (0, None)
    _, plain = train(model, train.finetune(steps=1, learning_rate=1e-9), "plain")
    assert outcome.validation_perplexity == pytest.approx(plain.validation_perplexity, rel=1e-5)


# The penalty


def test_the_penalty_is_the_squares_of_the_products(family: str) -> None:
    model = small(family, rank=3)
    weight = 0.25
    found = LowRank(tokens=1, penalty_weight=weight).penalty(model.decoder)
    assert found is not None
    expected = weight * squares(model.decoder.model)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    factors = [p for name, p in model.decoder.model.named_parameters() if is_of_a_delta(name)]
    for one, two in zip(torch.autograd.grad(found, factors), torch.autograd.grad(expected, factors), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
    assert LowRank(tokens=1, penalty_weight=0).penalty(model.decoder) is None
    assert runs.finetune("text").penalty(model.decoder) is None


def test_what_validates_and_is_logged_is_the_language_model_alone(train: Train) -> None:
    """A penalty of many times the loss moves no figure that is reported, nor counts as divergence."""
    model = small()
    recovery = train.lowrank(steps=1, evaluations=1, learning_rate=1e-9, penalty_weight=1e3)
    assert float(1e3 * squares(model.decoder.model).detach()) > 1e3
    _, outcome = train(model, recovery)
    (ids,) = train.batches(1)
    nats = cross_entropy(logits(model.decoder, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert outcome.curve["train"] == [[runs.STEP, pytest.approx(float(nats), rel=1e-4)]]
    _, plain = train(model, train.finetune(steps=1, learning_rate=1e-9), "plain")
    assert outcome.validation_perplexity == pytest.approx(plain.validation_perplexity, rel=1e-5)


def test_a_rate_is_chosen_by_trials_of_the_same_training(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    seen: set[int] = set()
    original = RecoveryTrainer.train

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.add(sum(each.numel() for each in self.model.parameters() if each.requires_grad))
        return original(self, *arguments, **options)

    monkeypatch.setattr(RecoveryTrainer, "train", watched)
    model = small()
    recovery = train.lowrank(steps=4, learning_rate=None, evaluations=1)
    recovered, outcome = train(model, recovery)
    assert len(outcome.learning_rates) > 1
    assert seen == {outcome.parameters_trained}
    runs.assert_shared(recovered, model)
