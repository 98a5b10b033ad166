"""Settings of a recovery: what is refused, and what is said to determine the numbers."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from tiny import refused

from layerfold.errors import InputError
from layerfold.recovery import RECOVERIES, Distill, Finetune, LowRank

BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokens": 0}, "tokens 0; accepted: 1 or more"),
    ({"tokens": -5}, "tokens -5; accepted: 1 or more"),
    ({"batch_size": 0}, "batch_size 0; accepted: 1 or more"),
    ({"accumulation": 0}, "accumulation 0; accepted: 1 or more"),
    ({"accumulation": 3, "batch_size": 8}, "accumulation 3; accepted: a divisor of the batch_size, 8"),
    ({"validation_tokens": 0}, "validation_tokens 0; accepted"),
    ({"validation_tokens": 1}, "validation_tokens 1; accepted: 2 or more"),
    ({"evaluations": 0}, "evaluations 0; accepted: 1 or more"),
    ({"patience": 0}, "patience 0; accepted: 1 or more evaluations"),
    ({"context": 1}, "context 1: at least 2 tokens are needed"),
    ({"context": -4}, "context -4: at least 2 tokens are needed"),
    ({"learning_rate": 0.0}, "learning_rate 0.0; accepted: a number above 0"),
    ({"learning_rate": -1e-3}, "learning_rate -0.001; accepted"),
    ({"learning_rate": math.inf}, "learning_rate inf; accepted"),
    ({"learning_rate": math.nan}, "learning_rate nan; accepted"),
    ({"search_fraction": 0.0}, "search_fraction 0.0; accepted: above 0, at most 1"),
    ({"search_fraction": 1.5}, "search_fraction 1.5; accepted"),
    ({"search_fraction": math.nan}, "search_fraction nan; accepted"),
    ({"warmup": 1.0}, "warmup 1.0; accepted: a fraction"),
    ({"warmup": -0.1}, "warmup -0.1; accepted"),
    ({"warmup": math.nan}, "warmup nan; accepted"),
    ({"weight_decay": -1.0}, "weight_decay -1.0"),
    ({"weight_decay": math.nan}, "weight_decay nan"),
    ({"weight_decay": math.inf}, "weight_decay inf"),
    ({"clip": 0.0}, "clip 0.0"),
    ({"clip": math.inf}, "clip inf"),
    ({"clip": math.nan}, "clip nan"),
    ({"schedule": "linaer"}, "did you mean 'linear'?"),
]
BAD_DISTILL: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature 0.0; accepted: a number above 0"),
    ({"temperature": math.inf}, "temperature inf; accepted"),
    ({"temperature": math.nan}, "temperature nan; accepted"),
    ({"lm_weight": -0.1}, "lm_weight -0.1; accepted: 0 to 1"),
    ({"lm_weight": 1.1}, "lm_weight 1.1; accepted: 0 to 1"),
    ({"lm_weight": math.nan}, "lm_weight nan; accepted"),
    ({"hidden_weight": -1.0}, "hidden_weight -1.0; accepted: 0 or more"),
    ({"hidden_weight": math.inf}, "hidden_weight inf; accepted"),
    ({"counterparts": (0, -1)}, "counterparts [0, -1]; accepted: indices"),
]
BAD_LOWRANK: list[tuple[dict[str, Any], str]] = [
    ({"penalty_weight": -1e-4}, "penalty_weight -0.0001; accepted: 0 or more"),
    ({"penalty_weight": math.inf}, "penalty_weight inf; accepted"),
    ({"penalty_weight": math.nan}, "penalty_weight nan; accepted"),
]


@pytest.mark.parametrize(
    ("kind", "bad", "said"),
    [(kind, *each) for kind in (Finetune, Distill, LowRank) for each in BAD]
    + [(Distill, *each) for each in BAD_DISTILL]
    + [(LowRank, *each) for each in BAD_LOWRANK],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:40],
)
def test_a_bad_value_is_one_clear_line(kind: Any, bad: dict[str, Any], said: str) -> None:
    with refused(InputError, says=said):
        kind(**{"tokens": 100} | bad)


OTHER: dict[str, Any] = {
    "tokens": 101,
    "corpus": "imdb",
    "context": 3,
    "batch_size": 16,
    "accumulation": 2,
    "learning_rate": 0.5,
    "search_fraction": 0.5,
    "warmup": 0.5,
    "schedule": "cosine",
    "weight_decay": 0.5,
    "clip": 0.5,
    "freeze": ("*.wte.*",),
    "validation_tokens": 9,
    "evaluations": 9,
    "patience": 9,
    "temperature": 2.0,
    "lm_weight": 0.5,
    "hidden_weight": 0.5,
    "counterparts": (1,),
    "penalty_weight": 0.5,
}


@pytest.mark.parametrize("kind", RECOVERIES.values(), ids=RECOVERIES)
def test_resolved_holds_all_that_changes_numbers_and_nothing_else(kind: Any) -> None:
    plain = kind(tokens=100)
    names = {field.name for field in fields(kind)} - {"report_to", "gradient_checkpointing"}
    assert plain.resolved().keys() == names | {"name", "version"}
    for name in names:
        changed = replace(plain, **{name: OTHER[name]}).resolved()
        assert {key for key in changed if changed[key] != plain.resolved()[key]} == {name}
        assert json.loads(json.dumps(changed)) == changed
    assert replace(plain, report_to="tensorboard", gradient_checkpointing=True).resolved() == plain.resolved()


def test_recoveries_are_told_apart() -> None:
    names = ["finetune", "distill", "lowrank"]
    assert [kind(tokens=100).resolved()["name"] for kind in (Finetune, Distill, LowRank)] == names
    assert {name: kind.name for name, kind in RECOVERIES.items()} == {name: name for name in names}
