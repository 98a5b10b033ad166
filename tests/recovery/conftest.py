"""A teacher that knows the text, so that learning from it helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from tiny import prose, tokenizer

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held
from layerfold.recovery import Recovery
from layerfold.recovery import trainer as training
from layerfold.recovery.run import Outcome


@pytest.fixture(scope="session")
def _taught() -> Model:
    ids = tokenizer()(prose(3000, seed=77))["input_ids"]
    model = runs.small(n_layer=4)
    texts = list(torch.tensor(ids[: 50 * 8 * 32]).view(50, 8, 32))
    trained = runs.by_hand(model, texts, rate=1e-2, warmup=4)
    done = Model(Decoder(trained), model.tokenizer, Provenance("taught"))
    return Model(done.decoder, done.tokenizer, Provenance("taught", base_sha256=done.sha256))


@pytest.fixture
def taught(_taught: Model) -> Model:
    """Four blocks of 16, trained on the kind of text that `prose` makes."""
    return _taught.copy()


@pytest.fixture
def train(study_corpus: str, tmp_path: Path) -> runs.Train:
    """Train on the corpus of all tests, in folders of the test's own."""
    return runs.Train(study_corpus, tmp_path)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Model, Outcome]]:
    """Train a model in one go, once for all tests that compare with it; what is returned is to be looked at only."""
    done: dict[Any, tuple[Model, Outcome]] = {}

    def straight(model: Model, recovery: Recovery, teacher: Model | None = None) -> tuple[Model, Outcome]:
        key = model.sha256, tuple(held(model.decoder)), recovery, teacher and teacher.sha256
        if key not in done:
            folder = tmp_path_factory.mktemp("straight")
            done[key] = runs.Train("", folder)(model, recovery, teacher=teacher)
        return done[key]

    return straight


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the validation text score what a test says, by step."""

    def script(nats: dict[int, float] | list[float]) -> None:
        def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": nats[self.state.global_step]}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        monkeypatch.setattr(training.RecoveryTrainer, "evaluate", evaluate)

    return script
