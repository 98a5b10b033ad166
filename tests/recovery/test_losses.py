"""The losses: against transformers' own, by hand, and where they must be nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import BLOCKS, VOCABULARY, tiny_model, token_ids
from torch import Tensor

from layerfold.recovery import Distill, Finetune
from layerfold.recovery.base import Outputs

IDS = token_ids(3, 12)
ROWS = range(IDS.shape[0])
POSITIONS = range(IDS.shape[1])


@dataclass
class Given:
    """Outputs made up by a test."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


def outputs(family: str = "gpt2", seed: int = 0, ids: Tensor = IDS, **options: Any) -> Outputs:
    return tiny_model(family, seed)(input_ids=ids, use_cache=False, **options)  # type: ignore[no-any-return]


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Mean over all positions, the last too, of KL(teacher || student), times T^2, term by term."""
    student, teacher = student.detach(), teacher.detach()
    total = 0.0
    for row in ROWS:
        for position in POSITIONS:
            p = torch.softmax(teacher[row, position].double() / temperature, -1)
            q = torch.softmax(student[row, position].double() / temperature, -1)
            total += float((p * (p / q).log()).sum())
    return temperature**2 * total / (len(ROWS) * len(POSITIONS))


def test_finetune_is_the_causal_lm_loss_of_transformers(family: str) -> None:
    model = tiny_model(family)
    theirs = model(input_ids=IDS, labels=IDS).loss
    loss = Finetune(tokens=1).loss(outputs(family), IDS, None, ())
    assert float(loss.objective.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert torch.equal(loss.language_model, loss.objective.detach())
    assert not loss.language_model.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(temperature: float) -> None:
    student = tiny_model("gpt2")
    result = student(input_ids=IDS, use_cache=False, output_hidden_states=True)
    teacher = outputs(output_hidden_states=True)
    recovery = Distill(tokens=1, temperature=temperature, hidden_weight=1.0)
    loss = recovery.loss(result, IDS, teacher, tuple(range(BLOCKS)))
    loss.objective.backward()
    assert abs(float(loss.objective.detach())) < 1e-6
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(student.parameters()))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5


@pytest.mark.parametrize(("temperature", "lm_weight"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.0), (2.0, 0.25), (3.0, 1.0)])
def test_the_divergence_and_the_mixture_by_hand(temperature: float, lm_weight: float) -> None:
    student, teacher = outputs(), outputs(seed=1)
    alone = Finetune(tokens=1).loss(student, IDS, None, ())
    loss = Distill(tokens=1, temperature=temperature, lm_weight=lm_weight).loss(student, IDS, teacher, ())
    hand = by_hand(student.logits, teacher.logits, temperature)
    assert abs(hand - by_hand(teacher.logits, student.logits, temperature)) > 0.01, "the teacher's, not the student's"
    assert hand > 0.1
    expected = (1 - lm_weight) * hand + lm_weight * float(alone.objective.detach())
    assert float(loss.objective.detach()) == pytest.approx(expected, rel=1e-5)
    # What is reported beside it is the loss on the text, whatever the temperature.
    assert float(loss.language_model) == pytest.approx(float(alone.language_model), abs=1e-6)


def test_what_the_last_position_predicts_is_of_no_account_to_the_text_but_to_the_teacher() -> None:
    student, teacher = outputs(), outputs(seed=1)
    changed = Given(student.logits.clone())
    changed.logits[:, -1] += 50 * torch.randn(VOCABULARY)
    for recovery, equal in (
        (Finetune(tokens=1), True),
        (Distill(tokens=1), False),
        (Distill(tokens=1, lm_weight=1), True),
    ):
        before, after = (recovery.loss(each, IDS, teacher, ()) for each in (student, changed))
        assert torch.equal(before.language_model, after.language_model)
        assert torch.equal(before.objective, after.objective) == equal


def test_a_token_that_the_teacher_rules_out_costs_nothing_and_is_finite() -> None:
    """Logits far apart: probabilities that underflow to zero on either side."""
    logits = torch.zeros(3, 12, VOCABULARY)
    logits[..., 0] = 300.0
    certain = Given(logits), Given(logits.roll(1, dims=-1))
    assert abs(float(Distill(tokens=1).loss(certain[0], IDS, certain[0], ()).objective)) < 1e-4
    assert float(Distill(tokens=1).loss(certain[0], IDS, certain[1], ()).objective) == pytest.approx(300.0, rel=1e-4)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = tiny_model("gpt2", seed=1)
    taught = teacher(input_ids=IDS, use_cache=False)
    Distill(tokens=1).loss(outputs(), IDS, taught, ()).objective.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_hidden_term_by_hand() -> None:
    def states(seed: int, blocks: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(3, 12, 8, generator=generator) for _ in range(blocks + 1))

    same = torch.randn(3, 12, 20)
    student, teacher = Given(same, states(0, 2)), Given(same, states(1, 4))
    assert student.hidden_states is not None
    assert teacher.hidden_states is not None
    total = 0.0
    for own, other in ((0, 1), (1, 3)):
        s, t = student.hidden_states[own + 1], teacher.hidden_states[other + 1]
        each = [
            float(((s[r, p] - t[r, p]) ** 2).sum() / (t[r, p] ** 2).sum()) for r in range(3) for p in range(12)
        ]  # every position counts, the last too
        total += sum(each) / len(each)
    loss = Distill(tokens=1, hidden_weight=3.0).loss(student, IDS % 20, teacher, (1, 3))
    assert float(loss.objective) == pytest.approx(3.0 * total / 2, rel=1e-5)
