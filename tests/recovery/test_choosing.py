"""Which weights are kept, when training stops, which learning rate is taken, and what is said when it diverges."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from tiny import Write, prose, refused
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import layerfold
from layerfold.checkpoint.model import Model
from layerfold.errors import TrainingError
from layerfold.recovery import trainer as training
from layerfold.recovery.base import LEARNING_RATES
from layerfold.recovery.rates import Trial, search

INF = math.inf


# The best weights


@pytest.mark.parametrize(
    ("patience", "nats", "stops", "best"),
    [
        (None, [5.0, 4.0, 3.0, 3.5, 4.5, 6.0, 7.0], 6, 2),
        (None, [5.0, 6.0, 7.0, 8.0, 9.0, 4.9, 5.5], 6, 5),
        (None, [5.0, 4.0, 3.0, 2.9, 2.8, 2.7, 2.6], 6, 6),
        (None, [5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0], 6, 1),
        (None, [5.0, 6.0, 5.5, 5.1, 5.01, 5.0, 5.0], 6, 0),
        # Patience counts the evaluations without a better one; the score before training is none of them.
        (1, [5.0, 4.0, 3.0, 3.5, 1.0, 1.0, 1.0], 3, 2),
        (1, [5.0, 6.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1, 0),
        (2, [5.0, 6.0, 4.0, 4.5, 4.6, 1.0, 1.0], 4, 2),
        (3, [5.0, 4.0, 4.1, 4.2, 3.0, 3.1, 3.2], 6, 4),
    ],
    ids=str,
)
def test_the_weights_that_did_best_before_patience_ended_are_kept(
    patience: int | None, nats: list[float], stops: int, best: int, validation: Any, tmp_path: Path, train: Train
) -> None:
    validation(nats)
    model, recovery = runs.small(), train.finetune(evaluations=6, warmup=0.0, patience=patience)
    trained, outcome = train(model, recovery)
    assert (outcome.best_step, outcome.steps, outcome.tokens) == (best, stops, stops * runs.STEP)
    assert outcome.validation_perplexity == pytest.approx(math.exp(nats[best]))
    assert [value for _, value in outcome.curve["validation"]] == nats[: stops + 1]
    hand = runs.by_hand(
        model,
        train.batches(best) if best else [],
        warmup=0,
        schedule=lambda optimizer, warmup: get_linear_schedule_with_warmup(optimizer, warmup, 6),
    )
    assert runs.difference(trained, runs.weights(hand)) <= (1e-5 if best else 0)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 3, "checkpoints are not hoarded"


def test_a_model_that_training_makes_worse_stays_bit_by_bit(taught: Model, write: Write, train: Train) -> None:
    write("junk/train.txt", "\n\n".join("0123456789 " * 9 + str(i) for i in range(9)))
    write("junk/test.txt", prose(40, 5))
    corpus = str(write("junk/validation.txt", prose(60, 6)).parent)
    recovery = runs.finetune(corpus, steps=8, learning_rate=1e-2, schedule="constant")
    trained, outcome = train(taught, recovery)
    nats = [value for _, value in outcome.curve["validation"]]
    assert min(nats[1:]) > nats[0], "the text is of another kind"
    assert outcome.best_step == 0
    assert outcome.validation_perplexity == pytest.approx(math.exp(nats[0]))
    assert runs.difference(trained, taught) == 0
    assert trained.provenance.steps[-1]["notes"]["best_step"] == 0


def test_where_training_overfits_it_is_the_lowest_point_that_is_kept(write: Write, train: Train) -> None:
    write("over/train.txt", "calibration\n\n" + "the storm in the river, " * 20)
    write("over/test.txt", prose(40, 5))
    corpus = str(write("over/validation.txt", prose(60, 6)).parent)
    recovery = runs.finetune(corpus, steps=24, learning_rate=1e-2, schedule="constant", evaluations=8)
    trained, outcome = train(runs.small(), recovery)
    nats = {round(tokens / runs.STEP): value for tokens, value in outcome.curve["validation"]}
    assert outcome.best_step == min(nats, key=lambda step: nats[step])
    assert 0 < outcome.best_step < 24
    assert nats[24] > nats[outcome.best_step] + 0.5
    # The weights are those that the score is of.
    _, again = train(trained, runs.finetune(corpus, steps=1), "again")
    assert again.curve["validation"][0][1] == pytest.approx(nats[outcome.best_step], rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"), [(6, 2, [0, 3, 6]), (5, 2, [0, 3, 5]), (3, 9, [0, 1, 2, 3])]
)
def test_validation_text_is_scored_before_along_the_way_and_at_the_end(
    steps: int, evaluations: int, expected: list[int], train: Train
) -> None:
    recovery = train.finetune(steps=steps, evaluations=evaluations)
    _, outcome = train(runs.small(), recovery)
    assert [tokens // runs.STEP for tokens, _ in outcome.curve["validation"]] == expected


# The learning rate


@pytest.mark.parametrize(
    ("nats", "tried", "chosen"),
    [
        ([9.0, 9.0, 5.0, 4.0, 5.0], {3e-4, 1e-3, 3e-3}, 1e-3),
        ([9.0, 9.0, 5.0, 4.0, 3.0], {3e-4, 1e-3, 3e-3}, 3e-3),
        ([9.0, 4.0, 3.0, 4.0, 5.0], {1e-4, 3e-4, 1e-3, 3e-3}, 3e-4),
        ([9.0, 2.0, 3.0, 4.0, 5.0], set(LEARNING_RATES), 1e-4),
        ([1.0, 2.0, 3.0, 4.0, 5.0], set(LEARNING_RATES), 3e-5),
        ([9.0, 9.0, 5.0, 4.0, INF], {3e-4, 1e-3, 3e-3}, 1e-3),
        ([9.0, 6.0, 5.0, INF, INF], {1e-4, 3e-4, 1e-3, 3e-3}, 3e-4),
        ([6.0, INF, INF, INF, INF], set(LEARNING_RATES), 3e-5),
        ([9.0, 9.0, INF, INF, 4.0], {3e-4, 1e-3, 3e-3}, 3e-3),
    ],
    ids=str,
)
def test_the_learning_rate_goes_downhill_tries_few_and_none_twice_though_killed(
    nats: list[float], tried: set[float], chosen: float, tmp_path: Path
) -> None:
    known = dict(zip(LEARNING_RATES, nats, strict=True))
    asked: list[float] = []

    def trial(rate: float) -> Trial:
        asked.append(rate)
        return Trial(rate, known[rate], 128, 0.1)

    def killed_at_the_third(rate: float) -> Trial:
        if len(asked) == 2:
            raise runs.Killed
        return trial(rate)

    with pytest.raises(runs.Killed):
        search(killed_at_the_third, tmp_path / "search.json", writes=True)
    found = search(trial, tmp_path / "search.json", writes=True)
    assert len(asked) == len(set(asked)), "none twice"
    assert set(asked) == tried
    assert [each.learning_rate for each in found] == sorted(tried)
    assert min(found, key=lambda each: each.nats).learning_rate == chosen


def test_all_rates_diverging_is_said_in_one_line(tmp_path: Path) -> None:
    with refused(TrainingError, r"diverged at every learning rate tried: .*0\.001"):
        search(lambda rate: Trial(rate, INF, 128, 0.1), tmp_path / "search.json", writes=False)
    assert not list(tmp_path.iterdir())


def test_a_search_takes_short_runs_and_changes_nothing_of_the_long_one(
    straight: Any, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    model = runs.small()
    original = training.RecoveryTrainer.train

    def diverging(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.args.learning_rate == 3e-3:
            raise TrainingError("diverged")
        return original(self, *arguments, **options)

    monkeypatch.setattr(training.RecoveryTrainer, "train", diverging)
    searched, outcome = train(model, train.finetune(steps=8, learning_rate=None), "one")
    rates = {each["learning_rate"]: each["validation"] for each in outcome.learning_rates}
    assert 3 <= len(rates) <= 5
    assert [rate for rate, validation in rates.items() if validation is None] == [3e-3]
    assert outcome.learning_rate == min(rates, key=lambda rate: rates[rate] or INF)
    assert outcome.search_tokens == len(rates) * 2 * runs.STEP
    assert outcome.tokens == 8 * runs.STEP
    json.dumps(outcome.to_json(), allow_nan=False)
    given, other = straight(model, train.finetune(steps=8, learning_rate=outcome.learning_rate))
    assert runs.difference(searched, given) == 0
    assert outcome.curve == other.curve
    assert searched.provenance.steps[-1]["method"]["learning_rate"] == outcome.learning_rate


# Divergence


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], pytest.MonkeyPatch]:
    """Put a value into the weights after a step."""

    def at(step: int, value: float) -> pytest.MonkeyPatch:
        class Poisoned(training.HeldZeros):
            def __init__(self, model: Any, names: Any) -> None:
                super().__init__(model, names)
                self._model = model

            @torch.no_grad()
            def on_optimizer_step(self, args: Any, state: Any, *rest: Any, **options: Any) -> None:
                if state.global_step + 1 == step:
                    list(self._model.parameters())[-1].mul_(value)

        monkeypatch.setattr(training, "HeldZeros", Poisoned)
        return monkeypatch

    return at


def good_checkpoint(error: BaseException) -> Path:
    message = str(error)
    assert "\n" not in message
    found = re.search(r"the last good checkpoint is (.*)$", message)
    assert found, message
    return Path(found[1])


@pytest.mark.parametrize(("step", "last", "value"), [(4, 2, math.nan), (5, 4, math.inf), (4, 2, 1e6)], ids=str)
def test_divergence_names_a_checkpoint_that_is_good(
    step: int, last: int, value: float, straight: Any, poison: Any, tmp_path: Path, train: Train
) -> None:
    model, recovery = runs.small(), train.finetune(evaluations=3)
    patched = poison(step, value)
    with pytest.raises(TrainingError, match=r"diverged at learning rate 0\.001: .* step") as caught:
        train(model, recovery)
    kept = good_checkpoint(caught.value)
    assert kept == tmp_path / "run" / f"checkpoint-{last}"
    loaded: Any = AutoModelForCausalLM.from_pretrained(kept, output_loading_info=True)
    assert not any(loaded[1].values())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded[0].state_dict().values())
    # And it is of use: what made it diverge gone, the run goes on from there.
    patched.undo()
    trained, outcome = train(model, recovery)
    assert outcome.steps == 6
    assert runs.difference(trained, straight(model, recovery)[0]) < 1e-5


def test_divergence_before_any_checkpoint_says_so(train: Train) -> None:
    recovery = train.finetune(learning_rate=1e4, warmup=0.0, clip=1e9)
    with refused(TrainingError, r"learning rate 10000: .*no checkpoint had been written yet"):
        train(runs.small(), recovery)
    model = runs.small()
    with torch.no_grad():
        model.decoder.model.transformer.wte.weight[3, 3] = math.nan
    with pytest.raises(TrainingError, match="no checkpoint had been written yet"):
        train(model, train.finetune(steps=2), "not finite at the start")


def test_the_good_checkpoint_outlives_a_call_without_a_training_folder(
    poison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    layerfold.recover(runs.small(), train.finetune(steps=1))
    assert not list(tmp_path.glob("layerfold-*")), "where all went well nothing is left"
    poison(5, math.nan)
    with pytest.raises(TrainingError) as caught:
        layerfold.recover(runs.small(), train.finetune(evaluations=3))
    assert (good_checkpoint(caught.value) / "model.safetensors").is_file()
