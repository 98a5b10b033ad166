"""Text samples, greedy and drawn, and the fraction of their 4-grams that are repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.evaluators.base import Evaluator, Score, encode
from layerfold.inference.decoding import greedy, sampled
from layerfold.maths.intervals import mean_interval
from layerfold.progress import SILENT, Progress
from layerfold.settings import check_least

PROMPTS = (
    "The film opens with a quiet scene in which",
    "I went to see this with my brother, and",
    "What surprised me most about the story was",
    "The acting is",
    "In the last ten minutes everything",
    "If you have ever lived in a small town,",
    "The director has made several",
    "There is one good reason to watch it:",
)


def published_prompts() -> tuple[str, ...]:
    """Return the prompts of the published study's text samples."""
    text = (Path(__file__).parents[1] / "published" / "prompts.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@dataclass(frozen=True)
class Generation(Evaluator):
    """Texts of a fixed length after the same prompts: one greedy, one drawn (nucleus sampling).

    The figure is the mean fraction of 4-grams in the greedy texts that are repeats. All models draw with the same
    random numbers.

    Attributes:
        prompts: texts that the model continues.
        new_tokens: number of tokens that it adds to each prompt; end-of-text is suppressed.
        temperature: divides the logits before a token is drawn.
        top_p: a token is drawn from the likeliest ones that hold this share of the probability (Holtzman et al., "The
            Curious Case of Neural Text Degeneration", 2020).
        seed: of the random numbers; each prompt has its own.
    """

    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 40
    temperature: float = 0.8
    top_p: float = 0.9
    seed: int = 0
    name: ClassVar[str] = "generation"
    version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise InputError(f"generation prompts {list(self.prompts)}; accepted: one or more, none empty")
        check_least(self, "generation", new_tokens=1, seed=0)
        if not 0.01 <= self.temperature <= 100:
            raise InputError(f"generation temperature {self.temperature}; accepted: 0.01 ... 100")
        if self.seed >= 2**32:
            raise InputError(f"generation seed {self.seed}; accepted: 0 ... {2**32 - 1}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"generation top_p {self.top_p}; accepted: above 0, at most 1")

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        prompts = dict(zip(self.prompts, encode(model, self.prompts), strict=True))
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {"prompts": prompts, "new_tokens": self.new_tokens, **drawn}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Generate from each prompt."""
        samples = []
        for number, prompt in enumerate(progress.track(self.prompts, "generating, prompts")):
            ids = torch.tensor(encode(model, [prompt]))
            drawn = sampled(model.decoder, ids, self.new_tokens, self.temperature, self.top_p, seed=self.seed + number)
            likeliest = _written(model, greedy(model.decoder, ids, self.new_tokens))
            samples.append({"prompt": prompt, **likeliest, "sampled": _written(model, drawn)})
        interval = mean_interval(np.array([sample["repeated_fraction"] for sample in samples], dtype=np.float64))
        drawn_with = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        details = {"new_tokens": self.new_tokens, **drawn_with, "samples": samples}
        return Score.of(interval.within(0, 1), "repeated 4-grams", details, lower_is_better=True)


def _written(model: Model, tokens: Tensor) -> dict[str, Any]:
    """Return tokens as text, and the share of them that is repeated."""
    ids = tokens.tolist()
    return {"text": model.require_tokenizer().decode(ids), "repeated_fraction": repeated_fraction(ids)}


def repeated_fraction(tokens: Sequence[int], n: int = 4) -> float:
    """Fraction of n-grams that occurred before in the same text; 0 for a text shorter than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
