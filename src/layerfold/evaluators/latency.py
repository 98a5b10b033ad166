"""Latency of generation and of prefill, with models timed in turn."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weights import dtype_name
from layerfold.environment import environment
from layerfold.errors import InputError
from layerfold.evaluators.base import Protocols, Published, Score
from layerfold.inference.captured import Captured
from layerfold.inference.decoding import greedy
from layerfold.maths.intervals import Interval, exponential, median_interval
from layerfold.model.deltas import multiplied_out
from layerfold.progress import SILENT, Progress
from layerfold.settings import check_least

_PUBLISHED_GENERATIONS, _PUBLISHED_LENGTH = 20, 64
_SETTLED = 0.02
_PLAIN = "\0multiplied out"
"""Suffix of the label of a model whose deltas are multiplied out; no other label can hold it."""
_AGAIN = "\0again"
"""Label of the copy of the first model that is timed beside it."""


@dataclass(frozen=True)
class Latency(Published):
    """Milliseconds per generated token: greedy, batch 1, a fixed number of tokens, end-of-text suppressed.

    Models are timed in turn, in a new random order each round, after a warm-up of each. The figure is the median over
    rounds with its quartiles; the speed-up over the first model is the median of the per-round ratios with its 95 %
    interval. Where several models are timed, a copy of the first is timed too. Its speed-up (the first model's
    ``speedup`` and ``same_model`` in every score) shows how far equal models differ here; its interval should contain
    1. A model with low-rank deltas is timed twice: with its deltas, and with the deltas multiplied out. On a GPU
    decoding is timed once more with its step captured: see `Captured`.

    Attributes:
        rounds: number of timings of each model.
        seed: seed of the order in each round.
        prompt_tokens, new_tokens: number of tokens in each generation.
        prefill_tokens: length of the prompt whose forward pass is timed alone; at most the context.
        protocol: ``published`` repeats the published measurement instead: 20 generations to a length of 64, free to
            stop early, one model after another.
    """

    rounds: int = 12
    prompt_tokens: int = 32
    new_tokens: int = 32
    prefill_tokens: int = 256
    seed: int = 0
    protocol: Protocols = "sound"
    name: ClassVar[str] = "latency"
    task: ClassVar[str] = name
    published_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "latency", rounds=3, prompt_tokens=1, new_tokens=1, prefill_tokens=1)

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model, this machine included."""
        run = environment()
        machine = {key: run[key] for key in ("threads", "processor", "device")}
        machine |= {name: run["versions"].get(name) for name in ("torch", "transformers")}
        machine["dtype"] = dtype_name(model.decoder.dtype)
        machine |= model.decoder.computed
        if model.decoder.offloaded:
            machine["offloaded"] = True  # each token may wait for all weights to be read or copied
        if self.published:
            amount = {"generations": _PUBLISHED_GENERATIONS, "length": _PUBLISHED_LENGTH}
        else:
            amount = {
                "rounds": self.rounds,
                "prompt_tokens": self.prompt_tokens,
                "new_tokens": self.new_tokens,
                "prefill_tokens": min(self.prefill_tokens, model.decoder.context),
                "seed": self.seed,
            }
        return {"protocol": self.protocol, **amount, **machine}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Measure one model."""
        return self.compare({"": model}, progress)[""]

    def compare(self, models: Mapping[str, Model], progress: Progress = SILENT) -> dict[str, Score]:
        """Time models in turn; speed-ups are over the first."""
        if self.published:
            return self._published_times(models, progress)
        wanted, room = self.prompt_tokens + self.new_tokens, min(model.decoder.context for model in models.values())
        if wanted > room:
            raise InputError(f"latency prompt and new tokens {wanted}; accepted: {room} in all, the context")
        plain = {f"{label}{_PLAIN}": _multiplied_out(model) for label, model in models.items()}
        first = next(iter(models))
        again = {_AGAIN: models[first].copy()} if len(models) > 1 else {}
        models = {**models, **{label: model for label, model in plain.items() if model is not None}, **again}
        labels = list(models)
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
        captured: dict[str, Captured] = {}
        replayed: dict[str, list[float]] = {label: [] for label in labels}
        for label in progress.track(labels, "latency, warming up"):
            _settle(partial(self._generate, models[label]), models[label].decoder.device)
            self._prefill(models[label])
            if models[label].decoder.device.type == "cuda":
                with suppress(RuntimeError):  # a step that cannot be captured has no such figure
                    prompt = _prompt(models[label], self.prompt_tokens)
                    captured[label] = Captured(models[label].decoder, prompt, self.new_tokens)
        collecting = gc.isenabled()
        gc.disable()
        try:
            orders = random.Random(self.seed)
            for _ in progress.track(range(self.rounds), "latency, rounds"):
                # A new order: no model always runs after the same other one.
                for label in orders.sample(labels, len(labels)):
                    times[label].append((self._generate(models[label]), self._prefill(models[label])))
                    if label in captured:
                        took = _milliseconds(models[label].decoder.device, captured[label])
                        replayed[label].append(took / self.new_tokens)
                gc.collect()
        finally:
            if collecting:
                gc.enable()
        scores = {
            label: self._score(models[label], label, first, times, replayed) for label in labels if label != _AGAIN
        }
        for label in plain.keys() & scores.keys():
            own, timed = label.removesuffix(_PLAIN), scores.pop(label)
            beside = {
                "multiplied_out": {"value": timed.value, "low": timed.low, "high": timed.high, "interval": "quartiles"},
                "multiplied_out_speedup": timed.details.get("speedup"),
            }
            scores[own] = replace(scores[own], details={**scores[own].details, **beside})
        return scores

    def _score(
        self,
        model: Model,
        label: str,
        first: str,
        times: Mapping[str, list[tuple[float, float]]],
        replayed: Mapping[str, list[float]],
    ) -> Score:
        decode = {label: [generated for generated, _ in rounds] for label, rounds in times.items()}
        details: dict[str, Any] = {
            **self.settings(model),
            "interval": "quartiles",
            "prefill": _quartiles([prefilled for _, prefilled in times[label]]).to_json() | {"interval": "quartiles"},
        }
        if _AGAIN in decode:
            details["same_model"] = _speedup(decode, first, _AGAIN).to_json()
            details["speedup"] = details["same_model"]
        if replayed[label]:
            details["captured"] = _quartiles(replayed[label]).to_json() | {"interval": "quartiles"}
        if replayed[label] and replayed[first] and label != first:
            details["captured_speedup"] = _speedup(replayed, first, label).to_json()
        if label != first:
            details["speedup"] = _speedup(decode, first, label).to_json()
            details["base_value"] = float(np.median(decode[first]))
        return Score.of(_quartiles(decode[label]), "ms/token", details, lower_is_better=True)

    def _generate(self, model: Model) -> float:
        """Milliseconds per new token."""
        prompt = _prompt(model, self.prompt_tokens)
        produced: list[Tensor] = []
        elapsed = _milliseconds(
            model.decoder.device, lambda: produced.append(greedy(model.decoder, prompt, self.new_tokens))
        )
        assert len(produced[0]) == self.new_tokens, "a fixed number of tokens is what makes times comparable"
        return elapsed / self.new_tokens

    @torch.no_grad()
    def _prefill(self, model: Model) -> float:
        """Milliseconds of one forward pass over the prompt."""
        prompt = _prompt(model, min(self.prefill_tokens, model.decoder.context))
        return _milliseconds(
            model.decoder.device, lambda: model.decoder.model(prompt, use_cache=True, logits_to_keep=1)
        )

    @torch.no_grad()
    def _published_times(self, models: Mapping[str, Model], progress: Progress) -> dict[str, Score]:
        scores = {}
        for label in progress.track(list(models), "published latency, models"):
            model = models[label]
            times, lengths = [], []
            prompt = _prompt(model, min(8, model.decoder.context // 2))
            for _ in range(_PUBLISHED_GENERATIONS):
                started = time.perf_counter()
                produced = model.decoder.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_length=min(_PUBLISHED_LENGTH, model.decoder.context),
                    pad_token_id=0,
                )
                times.append(1000 * (time.perf_counter() - started))
                lengths.append(produced.shape[1])
            mean = float(np.mean(times))
            details = {**self.settings(model), "interval": "quartiles", "mean": mean, "lengths": lengths}
            scores[label] = Score.of(_quartiles(times), "ms/sample", details, lower_is_better=True)
        return scores


def _milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    """Time a piece of work: by the GPU's own events where it runs there."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - started)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def _settle(run: Callable[[], float], device: torch.device) -> None:
    """Run once, and on a GPU until two times in a row differ by less than 2 %, or 8 times."""
    last = run()
    for _ in range(0 if device.type == "cpu" else 7):
        now = run()
        if abs(now / last - 1) < _SETTLED:
            return
        last = now


def _multiplied_out(model: Model) -> Model | None:
    """The model with its low-rank deltas multiplied out; None where it has none."""
    plain = multiplied_out(model.decoder)
    return None if plain is model.decoder else model.of(plain)


def _speedup(times: Mapping[str, list[float]], first: str, label: str) -> Interval:
    """Speed-up over the first model, from the ratios within rounds; logarithms make it symmetric in the two models."""
    return median_interval(np.log(np.array(times[first]) / np.array(times[label]))).map(exponential)


def _prompt(model: Model, tokens: int) -> Tensor:
    """A fixed prompt; its tokens do not affect the time."""
    prompt = torch.arange(1, tokens + 1, device=model.decoder.device)
    return (prompt % int(model.decoder.model.config.vocab_size))[None]


def _quartiles(times: Sequence[float]) -> Interval:
    """The median, with the quartiles as its bounds."""
    low, value, high = (float(q) for q in np.quantile(times, [0.25, 0.5, 0.75]))
    return Interval(value, low, high)
