"""Training: against a plain loop, in pieces, with a seed; what it leaves alone; what it holds."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import runs
import torch
from runs import Train
from tiny import refused, tiny
from torch import Tensor
from transformers import (
    PreTrainedModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

import layerfold
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Collapse
from layerfold.recovery.trainer import without_dropout

FAMILIES = ("gpt2", "llama")


@pytest.mark.parametrize(
    ("family", "schedule", "theirs", "warmup"),
    [
        ("gpt2", "linear", lambda optimizer, warmup: get_linear_schedule_with_warmup(optimizer, warmup, 8), 2),
        ("llama", "cosine", lambda optimizer, warmup: get_cosine_schedule_with_warmup(optimizer, warmup, 8), 2),
        ("gpt2", "constant", get_constant_schedule_with_warmup, 0),
    ],
    ids=["linear", "cosine", "constant"],
)
def test_the_weights_are_a_plain_loops_by_transformers_own_schedules(
    family: str, schedule: Any, theirs: Any, warmup: int, train: Train
) -> None:
    model = runs.small(family)
    settings: dict[str, Any] = {"weight_decay": 0.1, "clip": 0.5, "learning_rate": 3e-3, "schedule": schedule}
    trained, outcome = train(model, train.finetune(8, warmup=warmup / 8, **settings))
    assert outcome.best_step == 8
    texts = train.batches(8)
    hand = runs.by_hand(model, texts, rate=3e-3, warmup=warmup, decay=0.1, clip=0.5, schedule=theirs)
    assert runs.difference(model, trained) > 5e-3, "the test would tell"
    assert runs.difference(trained, runs.weights(hand)) < 1e-5


def relative(own: Tensor, theirs: Tensor) -> Tensor:
    return ((own - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()


def distilled_by_hand(
    student: Model, teacher: Model, texts: list[Tensor], temperature: float, pairs: tuple[int, ...]
) -> PreTrainedModel:
    """Train on KL at a temperature, half the language-model loss, and twice the distance of what leaves the blocks."""
    own, theirs = student.decoder.copy(), teacher.decoder.copy()
    left: dict[Any, Tensor] = {}
    for decoder in (own, theirs):
        for block in decoder.blocks:
            block.module.register_forward_hook(
                lambda module, _, out: left.update({module: out[0] if isinstance(out, tuple) else out})
            )
    optimizer = torch.optim.AdamW(own.model.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(texts))
    for ids in texts:
        result = own.model(input_ids=ids, labels=ids)
        with torch.no_grad():
            taught = theirs.model(input_ids=ids).logits
        p, q = torch.softmax(taught / temperature, -1), torch.log_softmax(result.logits / temperature, -1)
        loss = 0.5 * result.loss + 0.5 * temperature**2 * (p * (p.log() - q)).sum(-1).mean()
        if pairs:
            terms = [relative(left[own.blocks[s].module], left[theirs.blocks[t].module]) for s, t in enumerate(pairs)]
            loss = loss + 2.0 * torch.stack(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return own.model


@pytest.mark.parametrize(
    ("family", "hidden", "given", "pairs"),
    [
        ("llama", 0.0, None, ()),
        # Before the final norm, where transformers' last hidden state is taken after it.
        ("gpt2", 2.0, None, (1, 3)),
        ("llama", 2.0, (0, 2), (0, 2)),
    ],
)
def test_distillation_is_a_plain_loops_too(
    family: str, hidden: float, given: Any, pairs: tuple[int, ...], train: Train
) -> None:
    base = tiny(family)
    student = layerfold.compress(base, Collapse(n=2, align="none"))
    recovery = train.distill(
        steps=4,
        warmup=0.0,
        temperature=2.0,
        lm_weight=0.5,
        hidden_weight=hidden,
        counterparts=given,
        evaluations=1,
    )
    trained, outcome = train(student, recovery, teacher=base)
    assert outcome.best_step == 4
    hand = distilled_by_hand(student, base, train.batches(4), 2.0, pairs)
    assert runs.difference(student, trained) > 1e-3
    # AdamW divides by small squares at first, which enlarges rounding.
    assert runs.difference(trained, runs.weights(hand)) < 3e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_pieces_is_the_same_step(family: str, straight: Any, train: Train) -> None:
    model = runs.small(family)
    four = train(model, train.finetune(accumulation=4))
    runs.assert_equal(straight(model, train.finetune()), four)
    assert four[1].best_step == four[1].steps == 6
    assert runs.difference(model, four[0]) > 1e-3


def test_the_objective_in_pieces_is_the_same_for_distillation(taught: Model, train: Train) -> None:
    student = layerfold.compress(taught, Collapse(n=2, align="none"))
    settings: dict[str, Any] = {"hidden_weight": 0.5, "temperature": 2.0, "lm_weight": 0.5}
    (one, whole), (four, _) = (
        train(student, train.distill(accumulation=pieces, **settings), str(pieces), teacher=taught) for pieces in (1, 4)
    )
    assert whole.best_step == 6
    assert runs.difference(student, one) > 1e-3
    assert runs.drift(one, four) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_are_computed_again_change_no_figure(
    family: str, taught: Model, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[Any] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        again.append(options)
        return checkpoint(*arguments, **options)

    model = taught if family == "gpt2" else runs.small(family)
    student = layerfold.compress(model, Collapse(n=2, align="none"))
    settings: dict[str, Any] = {"hidden_weight": 0.5, "lm_weight": 0.5}
    kept, one = train(student, train.distill(**settings), "kept", teacher=model)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    recovery = train.distill(**settings, gradient_checkpointing=True)
    computed, two = train(student, recovery, "again", teacher=model)
    assert len(again) == 6 * student.decoder.n_blocks
    assert recovery.resolved() == train.distill(**settings).resolved()
    assert one.curve == two.curve
    assert runs.drift(kept, computed) == 0
    assert not any(getattr(each, "gradient_checkpointing", False) for each in computed.decoder.model.modules())


DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "qwen3": {"attention_dropout": 0.5},
}


def test_dropout_is_switched_off(family: str) -> None:
    model = tiny(family, **DROPOUT[family]).decoder.model.train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_and_stands_in_the_configuration_as_before(family: str, straight: Any, train: Train) -> None:
    recovery = train.finetune(steps=2, evaluations=1)
    with_, without = runs.small(family, **DROPOUT[family]), runs.small(family)
    assert runs.difference(with_, without) == 0
    one, outcome = train(with_, recovery)
    assert outcome.best_step == 2
    assert runs.difference(one, straight(without, recovery)[0]) == 0
    model = one.decoder.model
    for name, value in DROPOUT[family].items():
        assert getattr(model.config, name) == value
    ids = torch.arange(8)[None]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits), "the model that is returned drops out as it did"


def test_the_same_recipe_gives_the_same_weights_and_another_seed_another_order(straight: Any, train: Train) -> None:
    model, recovery = runs.small(), train.finetune()
    one, first = straight(model, recovery)
    torch.manual_seed(1234)  # whatever the generators were left at
    random.seed(99)
    two, second = train(model, recovery, "two")
    three, third = train(model, recovery, "three", seed=1)
    assert runs.difference(one, two) == 0
    assert first.curve == second.curve
    assert runs.difference(one, three) > 1e-4
    assert first.curve["train"] != third.curve["train"]


def test_what_was_done_stands_in_the_provenance(train: Train) -> None:
    model = runs.small()
    trained, outcome = train(model, train.finetune(steps=4), seed=5)
    (step,) = trained.provenance.steps
    assert step["method"]["name"] == "finetune"
    assert (step["method"]["learning_rate"], step["method"]["tokens"], step["seed"]) == (1e-3, 256, 5)
    assert step["notes"] == outcome.to_json()
    assert (outcome.tokens, outcome.search_tokens, outcome.steps) == (256, 0, 4)
    assert outcome.learning_rates == []
    assert outcome.parameters_trained == model.decoder.size().parameters
    assert outcome.seconds > 0


def test_the_curves_are_in_tokens_and_in_nats_of_the_text(taught: Model, train: Train) -> None:
    model = layerfold.compress(taught, Collapse(n=2, align="none"))
    recovery = train.distill(steps=6, evaluations=3, validation_tokens=40)
    trained, outcome = train(model, recovery, teacher=taught)
    assert outcome.best_step == 6
    assert [tokens for tokens, _ in outcome.curve["train"]] == [64, 128, 192, 256, 320, 384]
    assert [tokens for tokens, _ in outcome.curve["validation"]] == [0, 128, 256, 384]
    # The first batch is scored before any step, and not by what is minimised.
    (first, *_) = train.batches(1)
    loss = model.decoder.model(input_ids=first, labels=first).loss
    assert outcome.curve["train"][0][1] == pytest.approx(float(loss.detach()), rel=1e-5)
    scores = [
        float(layerfold.evaluate(each, ["perplexity"], corpus=train.corpus, split="validation")["perplexity"].value)
        for each in (model, trained)
    ]
    assert scores[1] < scores[0]
    assert np.exp(outcome.curve["validation"][-1][1]) == pytest.approx(outcome.validation_perplexity)


@pytest.mark.parametrize("tokens", [2, 17, 40, 64])
def test_validation_text_is_scored_token_by_token_without_its_padding(tokens: int, train: Train) -> None:
    model = runs.small()
    recovery = train.finetune(steps=1, validation_tokens=tokens, accumulation=2)
    _, outcome = train(model, recovery)
    ids = runs.train_ids(train.corpus, split="validation")[:tokens]
    nats, scored = 0.0, 0
    for start in range(0, len(ids), 16):
        window = torch.tensor([ids[start : start + 16]])
        if window.shape[1] > 1:
            loss = model.decoder.model(input_ids=window, labels=window).loss
            nats += float(loss.detach()) * (window.shape[1] - 1)
            scored += window.shape[1] - 1
    assert outcome.curve["validation"][0] == [0, pytest.approx(nats / scored, rel=1e-5)]


# What training leaves alone


def image(model: Model) -> dict[str, Any]:
    """All of a model that a caller could notice a change in."""
    module = model.decoder.model
    return {
        "weights": runs.weights(model),
        "config": copy.deepcopy(module.config.to_dict()),
        "generation": copy.deepcopy(module.generation_config.to_dict()),
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "training": {name: each.training for name, each in module.named_modules()},
        "dropout": {name: each.p for name, each in module.named_modules() if isinstance(each, torch.nn.Dropout)},
        "gradients": [name for name, p in module.named_parameters() if p.grad is not None],
        "device": {p.device for p in module.parameters()},
        "provenance": model.provenance,
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert runs.difference(one.pop("weights"), two.pop("weights")) == 0
    assert one == two


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_and_teacher_stay_as_they_are(training: bool, train: Train) -> None:
    base = runs.small(n_layer=4, resid_pdrop=0.1)
    model = layerfold.compress(base, Collapse(n=2, align="none"))
    for each in (base, model):
        each.decoder.model.train(training)
        each.decoder.blocks[0].module.train(not training)
        each.decoder.model.config.use_cache = True
    next(iter(base.decoder.model.parameters())).requires_grad_(False)
    before = image(model), image(base)
    recovery = train.distill(steps=2, hidden_weight=1.0, freeze=("*.wpe.*",))
    trained, _ = train(model, recovery, teacher=base)
    assert_same(before[0], image(model))
    assert_same(before[1], image(base))
    left = image(trained)
    assert left["config"] == before[0]["config"]
    assert left["requires_grad"] == before[0]["requires_grad"], "what was frozen in training is not frozen for good"
    assert left["gradients"] == []
    assert trained.decoder.model is not model.decoder.model


def test_a_model_that_is_its_own_teacher_does_not_move_unless_other_blocks_are_to_answer(
    taught: Model, train: Train
) -> None:
    model = runs.small(resid_pdrop=0.5)  # were the teacher to drop out, it would
    _, outcome = train(model, train.distill(steps=2), teacher=model)
    nats = [value for _, value in outcome.curve["validation"]]
    assert max(nats) - min(nats) < 2e-2
    recovery = train.distill(steps=2, hidden_weight=1.0, counterparts=(1, 1, 3, 3))
    assert train(taught, recovery, "other", teacher=taught)[1].steps == 2


def test_what_is_trained_is_for_the_settings_to_say_and_not_for_the_callers_flags(straight: Any, train: Train) -> None:
    model, frozen = runs.small(), runs.small()
    for parameter in frozen.decoder.model.parameters():
        parameter.requires_grad_(False)
    recovery = train.finetune(steps=2)
    one, outcome = train(frozen, recovery)
    two, other = straight(model, recovery)
    assert runs.difference(one, two) == 0
    assert outcome.parameters_trained == other.parameters_trained
    assert not any(parameter.requires_grad for parameter in frozen.decoder.model.parameters())


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (("*.wte.*",), lambda name: ".wte." in name or name == "lm_head.weight"),
        (("transformer.h.0.*", "*.ln_?.*"), lambda name: ".h.0." in name or ".ln_" in name),
        (("*[!s]",), lambda name: not name.endswith("s")),
    ],
    ids=["embedding", "block and norms", "all but biases"],
)
def test_what_is_frozen_stays_bit_by_bit_and_all_else_moves(
    patterns: tuple[str, ...], frozen: Any, train: Train
) -> None:
    model = runs.small()
    recovery = train.finetune(steps=3, freeze=patterns, weight_decay=0.5, warmup=0.0)
    trained, outcome = train(model, recovery)
    before, after = runs.weights(model), runs.weights(trained)
    held = {name for name in before if frozen(name)}
    assert held
    assert {name for name in before if torch.equal(before[name], after[name])} == held
    sizes = {name: p.numel() for name, p in model.decoder.model.named_parameters()}
    assert outcome.parameters_trained == sum(size for name, size in sizes.items() if name not in held)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("*.wtf.*",), r"freeze '\*\.wtf\.\*';"),
        (("*.wte.*", "ln_f"), r"freeze 'ln_f';"),
        (("*",), r"freeze \* leaves nothing to train"),
        (("*.weight", "*.bias"), r"leaves nothing to train"),
    ],
    ids=str,
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(
    patterns: tuple[str, ...], said: str, train: Train
) -> None:
    with refused(InputError, said):
        train(runs.small(), train.finetune(steps=1, freeze=patterns))


def test_a_recovery_that_is_refused_takes_no_folder(train: Train) -> None:
    # Else the folder would be claimed, and the corrected settings be refused.
    for wrong, said in (({"freeze": ("*.wtf.*",)}, "freeze"), ({"report_to": "tensorbord"}, "report_to 'tensorbord'")):
        with pytest.raises(InputError, match=said):
            train(runs.small(), train.finetune(steps=1, **wrong))
    corrected = train.finetune(steps=1, learning_rate=2e-3)
    trained, outcome = train(runs.small(), corrected)
    assert outcome.steps == 1
    # A decoder view of the result still fits.
    half = layerfold.compress(trained, Collapse(n=2, align="none"))
    assert [step["method"]["name"] for step in half.provenance.steps] == ["finetune", "collapse"]
