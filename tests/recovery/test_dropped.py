"""Training models of which blocks, attention or FFNs were dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from tiny import logits, token_ids
from transformers import AutoModelForCausalLM

import layerfold
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.methods import Drop


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_what_was_dropped_stays_away(family: str, tmp_path: Path, train: Train) -> None:
    base = runs.small(family)
    model = layerfold.compress(
        layerfold.compress(base, Drop(blocks="0", part="attention")), Drop(blocks="1", part="ffn")
    )
    recovered, outcome = train(model, train.finetune(steps=4, learning_rate=3e-3))
    assert outcome.best_step == 4
    assert outcome.parameters_trained == model.decoder.size().parameters == recovered.decoder.size().parameters
    assert recovered.decoder.removed_parts == {"attention": (0,), "ffn": (1,)}
    by_hand = runs.by_hand(model, train.batches(4), rate=3e-3, warmup=0)
    assert runs.drift(recovered, by_hand) < 1e-5
    # Its checkpoint is one that plain transformers loads.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(plain(token_ids()).logits, logits(recovered.decoder, token_ids()))


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
    assert torch.equal(logits(loaded.decoder, token_ids()), logits(recovered.decoder, token_ids()))
