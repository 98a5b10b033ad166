"""Text samples, and the fraction of their 4-grams that are repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.evaluators.base import Evaluator, Score, encode
from layerfold.inference.decoding import greedy
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
    """Greedy text of a fixed length after the same prompts, with the mean fraction of 4-grams that are repeats.

    Attributes:
        prompts: texts that the model continues.
        new_tokens: number of tokens that it adds to each prompt; end-of-text is suppressed.
    """

    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 40
    name: ClassVar[str] = "generation"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise InputError(f"generation prompts {list(self.prompts)}; accepted: one or more, none empty")
        check_least(self, "generation", new_tokens=1)

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        prompts = dict(zip(self.prompts, encode(model, self.prompts), strict=True))
        return {"prompts": prompts, "new_tokens": self.new_tokens}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Generate from each prompt."""
        samples = []
        for prompt in progress.track(self.prompts, "generating, prompts"):
            tokens = self._continue(model, prompt)
            text = model.require_tokenizer().decode(tokens)
            samples.append({"prompt": prompt, "text": text, "repeated_fraction": repeated_fraction(tokens)})
        interval = mean_interval(np.array([sample["repeated_fraction"] for sample in samples], dtype=np.float64))
        details = {"new_tokens": self.new_tokens, "samples": samples}
        return Score.of(interval.within(0, 1), "repeated 4-grams", details, lower_is_better=True)

    def _continue(self, model: Model, prompt: str) -> list[int]:
        tokens: list[int] = greedy(model.decoder, torch.tensor(encode(model, [prompt])), self.new_tokens).tolist()
        return tokens


def repeated_fraction(tokens: Sequence[int], n: int = 4) -> float:
    """Fraction of n-grams that occurred before in the same text; 0 for a text shorter than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
