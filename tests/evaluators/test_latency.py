"""What latency reports, and how it goes about it; never how long anything takes."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import CONTEXT, VOCABULARY, shared, tiny
from torch import nn

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import hash_weights
from layerfold.evaluators import Latency
from layerfold.model import deltas

SHORT = Latency(rounds=4, prompt_tokens=5, new_tokens=6, prefill_tokens=20)


def small() -> Model:
    return tiny("gpt2", n_layer=1)


def sharing(rank: int = 2) -> Model:
    return shared(tiny("gpt2", n_layer=2), rank=rank)


def test_scores_hold_quartiles_and_prefill_for_each_model() -> None:
    scores = SHORT.compare({"a": small(), "b": tiny("llama", num_hidden_layers=1)})
    assert list(scores) == ["a", "b"]
    for score in scores.values():
        assert 0 < score.low <= score.value <= score.high
        prefill = score.details["prefill"]
        assert 0 < prefill["low"] <= prefill["value"] <= prefill["high"]
        assert score.unit == "ms/token"
        assert score.lower_is_better
        expected = {"rounds": 4, "prompt_tokens": 5, "new_tokens": 6, "prefill_tokens": 20, "dtype": "float32"}
        assert score.details.items() >= expected.items()
        assert score.details["threads"] == torch.get_num_threads()


def test_all_have_a_speedup_over_the_first_and_the_first_that_of_its_copy() -> None:
    scores = SHORT.compare({label: small() for label in "abc"})
    assert list(scores) == ["a", "b", "c"]
    same = scores["a"].details["speedup"]
    assert 0 < same["low"] <= same["value"] <= same["high"]
    assert all(score.details["same_model"] == same for score in scores.values())
    for label in "bc":
        speedup = scores[label].details["speedup"]
        assert 0 < speedup["low"] <= speedup["value"] <= speedup["high"]
        assert scores[label].details["base_value"] == scores["a"].value
    assert "speedup" not in SHORT(tiny("gpt2")).details


def orders(monkeypatch: pytest.MonkeyPatch, models: dict[str, Model], seed: int, rounds: int = 20) -> list[str]:
    """In which order models are timed, round by round, the warm-up first; A is the copy of the first."""
    order: list[str] = []

    def note(self: Latency, model: Any) -> float:
        order.append(next((label for label, known in models.items() if known is model), "A"))
        return 1.0 + len(order)

    monkeypatch.setattr(Latency, "_generate", note)
    monkeypatch.setattr(Latency, "_prefill", lambda *_: 1.0)
    Latency(rounds=rounds, prompt_tokens=5, new_tokens=6, seed=seed).compare(models)
    size = len(models) + 1
    return ["".join(order[first : first + size]) for first in range(0, len(order), size)]


def test_every_round_has_an_order_of_its_own_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {label: small() for label in "abc"}
    found = orders(monkeypatch, models, seed=0)
    assert found[0] == "abcA"
    assert {"".join(sorted(each)) for each in found} == {"Aabc"}
    # Whatever runs before the base: each of the others, or what ended the round before.
    before = Counter(text[text.index("a") - 1] for text in found[1:] if text[0] != "a")
    assert set(before) == set("bcA")
    assert max(before.values()) < 10
    assert found == orders(monkeypatch, models, seed=0) != orders(monkeypatch, models, seed=1)


def test_the_copy_is_of_the_first_and_made_like_those_of_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"base": small(), "other": small()}
    timed: dict[int, Model] = {}
    monkeypatch.setattr(Latency, "_generate", lambda self, model: float(bool(timed.setdefault(id(model), model))))
    scores = Latency(rounds=3, prompt_tokens=5, new_tokens=6).compare(models)
    assert list(scores) == ["base", "other"]
    (copy,) = [model for model in timed.values() if model not in list(models.values())]
    assert hash_weights(copy.decoder.model) == hash_weights(models["base"].decoder.model)
    own = {parameter.data_ptr() for parameter in models["base"].decoder.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in copy.decoder.model.parameters()}


def test_speedups_are_medians_of_the_ratios_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {label: small() for label in "ab"}
    # A drifting machine: b takes half as long as a within each round, though later rounds take ten times as long.
    times = {
        "a": iter([0, 10.0, 100.0, 1000.0]),
        "b": iter([0, 5.0, 50.0, 500.0]),
        "A": iter([0, 8.0, 80.0, 800.0]),
    }

    def scripted(self: Latency, model: Any) -> float:
        return next(times[next((label for label, known in models.items() if known is model), "A")])

    monkeypatch.setattr(Latency, "_generate", scripted)
    scores = Latency(rounds=3, prompt_tokens=5, new_tokens=6).compare(models)
    assert scores["b"].details["speedup"] == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0})
    assert scores["b"].details["same_model"] == pytest.approx({"value": 1.25, "low": 1.25, "high": 1.25})
    assert (scores["a"].low, scores["a"].value, scores["a"].high) == (55.0, 100.0, 550.0)
    assert (scores["b"].value, scores["b"].details["base_value"]) == (50.0, 100.0)


def test_a_model_that_wants_to_stop_is_timed_over_as_many_tokens() -> None:
    model = tiny("llama")
    head = nn.Linear(32, VOCABULARY)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.data[VOCABULARY - 1] = 5.0
    model.decoder.model.set_output_embeddings(head)
    generated: list[int] = []
    generate = model.decoder.model.generate
    model.decoder.model.generate = lambda *a, **k: generated.append((out := generate(*a, **k)).shape[1]) or out
    SHORT(model)
    assert generated == [5 + 6] * 5
    generated.clear()
    published = Latency(protocol="published")(model)
    assert set(generated) == {8 + 1}  # free to stop, as the published measurement was
    assert published.details["lengths"] == generated


def test_the_published_protocol_times_twenty_generations_of_each_model_deltas_as_they_are() -> None:
    models = {"a": small(), "shared": sharing()}
    scores = Latency(protocol="published").compare(models)
    assert list(scores) == list(models)
    for score in scores.values():
        assert score.unit == "ms/sample"
        assert len(score.details["lengths"]) == 20
        assert max(score.details["lengths"]) <= CONTEXT
        assert 0 < score.low <= score.value <= score.high
        assert score.details.keys() == scores["a"].details.keys()
        assert not [key for key in score.details if "multiplied" in key]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        SHORT(small())
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_settings_name_what_fits_the_context() -> None:
    assert Latency().settings(tiny("gpt2"))["prefill_tokens"] == CONTEXT
    assert Latency(seed=3).settings(tiny("gpt2"))["seed"] == 3
    assert Latency().protocol_id == "latency-2"


# Low-rank deltas


def test_a_model_with_deltas_is_timed_multiplied_out_too() -> None:
    again = shared(tiny("llama", num_hidden_layers=2))
    models = {"base": small(), "shared": sharing(), "merged": small(), "again": again}
    before = {label: hash_weights(model.decoder.model) for label, model in models.items()}
    scores = SHORT.compare(models)
    assert list(scores) == list(models)
    for label, score in scores.items():
        has = label in ("shared", "again")
        found = {key for key in score.details if "multiplied" in key}
        assert found == ({"multiplied_out", "multiplied_out_speedup"} if has else set())
    for key in ("multiplied_out", "multiplied_out_speedup"):
        figure = scores["shared"].details[key]
        assert 0 < figure["low"] <= figure["value"] <= figure["high"]
    assert {label: hash_weights(model.decoder.model) for label, model in models.items()} == before
    assert deltas.ranks(models["shared"].decoder)


def test_the_first_may_have_deltas() -> None:
    """What is multiplied out has a speed-up over it, and it none over itself."""
    scores = SHORT.compare({"shared": sharing(), "base": small()})
    assert scores["shared"].details["speedup"] == scores["base"].details["same_model"]
    assert scores["shared"].details["multiplied_out_speedup"]["value"] > 0
    assert scores["base"].details["base_value"] == scores["shared"].value
    alone = SHORT(sharing()).details
    assert "same_model" not in alone
    assert alone["multiplied_out"]["value"] > 0
    assert alone["multiplied_out_speedup"]["value"] > 0
    # With deltas of rank 0 too: what is shared is each block's own in plain matrices.
    assert "multiplied_out" in SHORT(sharing(rank=0)).details


def test_what_is_multiplied_out_takes_turns_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Names as a recipe could have them, to be taken for the others' own.
    models = {"a": small(), "b": sharing(), "b multiplied out": small()}
    places = {id(model): place for place, model in enumerate(models.values())}
    own = hash_weights(models["a"].decoder.model)
    order: list[int] = []
    # Plain, b, the other and b multiplied out: each twice as fast as the one before, on a machine that
    # drifts. Last, the copy of a.
    times = [8.0, 4.0, 2.0, 1.0, 8.0]

    def scripted(self: Latency, model: Model) -> float:
        place = places.get(id(model), 4 if hash_weights(model.decoder.model) == own else 3)
        assert bool(deltas.ranks(model.decoder)) == (place == 1)
        order.append(place)
        return times[place] * 10 ** ((len(order) - 1) // 5)

    monkeypatch.setattr(Latency, "_generate", scripted)
    scores = Latency(rounds=4, prompt_tokens=5, new_tokens=6).compare(models)
    assert [sorted(order[first : first + 5]) for first in range(0, 25, 5)] == [[0, 1, 2, 3, 4]] * 5
    assert list(scores) == list(models)
    speedups = {label: score.details.get("speedup", {}).get("value") for label, score in scores.items()}
    assert speedups == pytest.approx({"a": 1.0, "b": 2.0, "b multiplied out": 4.0})
    assert scores["b"].details["multiplied_out_speedup"] == pytest.approx({"value": 8.0, "low": 8.0, "high": 8.0})
    assert 8 * scores["b"].details["multiplied_out"]["value"] == scores["a"].value
