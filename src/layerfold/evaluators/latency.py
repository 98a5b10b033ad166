"""Latency of generation and of prefill, models timed in turn."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.environment import environment
from layerfold.errors import InputError
from layerfold.evaluators.base import Evaluator, Protocols, Score, check_protocol
from layerfold.inference.captured import Captured
from layerfold.inference.decoding import greedy
from layerfold.maths.intervals import Floats, Interval, exponential, median_interval
from layerfold.model.deltas import multiplied_out
from layerfold.progress import SILENT, Progress

_PUBLISHED_GENERATIONS, _PUBLISHED_LENGTH = 20, 64
_SETTLED = 0.02
_PLAIN = "\0multiplied out"
"""Follows the label of a model with deltas, where they are multiplied out: nothing that a label can hold."""
_AGAIN = "\0again"
"""Label of the copy of the first model that is timed beside it."""


@dataclass(frozen=True)
class Latency(Evaluator):
    """Milliseconds a generated token: greedy, batch 1, a fixed number of tokens, end-of-text suppressed.

    Models are timed in turn, in a new random order each round, after a warm-up of each. The figure is the median over
    rounds with its quartiles; the speed-up over the first model is the median of the per-round ratios with its 95 %
    interval. Beside others the first model is timed twice, once as a copy. The copy's speed-up, the first model's
    ``speedup`` and ``same_model`` in every score, says how far equal models differ here; its interval should hold 1. A
    model with low-rank deltas is timed as it is and, beside it, with them multiplied out. On a GPU decoding is timed a
    second time with its step captured: see `Captured`.

    Attributes:
        rounds: how often each model is timed.
        seed: draws the order of each round.
        prompt_tokens, new_tokens: of each generation.
        prefill_tokens: length of the prompt whose single forward pass is timed on its own; at most the context.
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

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        for name, least in (("rounds", 3), ("prompt_tokens", 1), ("new_tokens", 1), ("prefill_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"latency {name} {getattr(self, name)}; accepted: {least} or more")

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol."""
        return "latency-2" if self.protocol == "sound" else "latency-published-1"

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model, this machine included."""
        found = environment()
        machine = {key: found[key] for key in ("threads", "processor", "device")}
        machine |= {name: found["versions"].get(name) for name in ("torch", "transformers")}
        machine["dtype"] = str(model.decoder.dtype).removeprefix("torch.")
        machine |= model.decoder.computed
        if self.protocol == "published":
            return {
                "protocol": self.protocol,
                "generations": _PUBLISHED_GENERATIONS,
                "length": _PUBLISHED_LENGTH,
                **machine,
            }
        return {
            "protocol": self.protocol,
            "rounds": self.rounds,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens": min(self.prefill_tokens, model.decoder.context),
            "seed": self.seed,
            **machine,
        }

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Measure one model."""
        return self.compare({"": model}, progress)[""]

    def compare(self, models: Mapping[str, Model], progress: Progress = SILENT) -> dict[str, Score]:
        """Measure models side by side; the first is what the others' speed-up is over."""
        if self.protocol == "published":
            return self._published(models, progress)
        wanted, room = self.prompt_tokens + self.new_tokens, min(model.decoder.context for model in models.values())
        if wanted > room:
            raise InputError(f"latency prompt and new tokens {wanted}; accepted: {room} in all, the context")
        plain = {f"{label}{_PLAIN}": _multiplied_out(model) for label, model in models.items()}
        first = next(iter(models))
        again = {_AGAIN: models[first].copy()} if len(models) > 1 else {}
        models = {**models, **{label: model for label, model in plain.items() if model is not None}, **again}
        labels = list(models)
        decode: dict[str, list[float]] = {label: [] for label in labels}
        prefill: dict[str, list[float]] = {label: [] for label in labels}
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
                # No model always runs in another's wake.
                for label in orders.sample(labels, len(labels)):
                    decode[label].append(self._generate(models[label]))
                    prefill[label].append(self._prefill(models[label]))
                    if label in captured:
                        took = _milliseconds(models[label].decoder.device, captured[label])
                        replayed[label].append(took / self.new_tokens)
                gc.collect()
        finally:
            if collecting:
                gc.enable()
        scores = {
            label: self._score(models[label], label, first, decode, prefill, replayed)
            for label in labels
            if label != _AGAIN
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
        decode: Mapping[str, list[float]],
        prefill: Mapping[str, list[float]],
        replayed: Mapping[str, list[float]],
    ) -> Score:
        times = np.array(decode[label])
        details: dict[str, Any] = {
            **self.settings(model),
            "interval": "quartiles",
            "prefill": _quartiles(np.array(prefill[label])) | {"interval": "quartiles"},
        }
        if _AGAIN in decode:
            details["same_model"] = _speedup(decode, first, _AGAIN).to_json()
            details["speedup"] = details["same_model"]
        if replayed[label]:
            details["captured"] = _quartiles(np.array(replayed[label])) | {"interval": "quartiles"}
        if replayed[label] and replayed[first] and label != first:
            details["captured_speedup"] = _speedup(replayed, first, label).to_json()
        if label != first:
            details["speedup"] = _speedup(decode, first, label).to_json()
            details["base_value"] = float(np.median(decode[first]))
        return Score(**_quartiles(times), unit="ms/token", lower_is_better=True, details=details)

    def _generate(self, model: Model) -> float:
        """Milliseconds a new token."""
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
    def _published(self, models: Mapping[str, Model], progress: Progress) -> dict[str, Score]:
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
            details = {
                **self.settings(model),
                "interval": "quartiles",
                "mean": float(np.mean(times)),
                "lengths": lengths,
            }
            scores[label] = Score(
                **_quartiles(np.array(times)), unit="ms/sample", lower_is_better=True, details=details
            )
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
    """The model with plain matrices; None where it has no others."""
    plain = multiplied_out(model.decoder)
    return None if plain is model.decoder else model.of(plain)


def _speedup(times: Mapping[str, list[float]], first: str, label: str) -> Interval:
    """How many times as fast as the first, from the ratios within rounds; in logarithms both ways come out alike."""
    return median_interval(np.log(np.array(times[first]) / np.array(times[label]))).map(exponential)


def _prompt(model: Model, tokens: int) -> Tensor:
    """A fixed prompt; which tokens it holds does not matter to the time."""
    prompt = torch.arange(1, tokens + 1, device=model.decoder.device)
    return (prompt % int(model.decoder.model.config.vocab_size))[None]


def _quartiles(times: Floats) -> dict[str, Any]:
    low, value, high = (float(q) for q in np.quantile(times, [0.25, 0.5, 0.75]))
    return {"value": value, "low": low, "high": high}
