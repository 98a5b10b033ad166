"""A linear head on a decoder's last real token, trained alone or with the body."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer

from layerfold.errors import TrainingError
from layerfold.evaluators.base import batches_by_length
from layerfold.evaluators.classification import logistic
from layerfold.inference.stepping import fused_activations
from layerfold.model import masks
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.recovery.arguments import half_precision, quiet_arguments
from layerfold.recovery.callbacks import Bar
from layerfold.recovery.trainer import HeldZeros, trainable, without_dropout

_HEAD_DEVIATION = 0.02
_SMALL = 1e-6
"""Added to a feature's standard deviation before the feature is divided by it."""


@dataclass(frozen=True)
class Padding:
    """Padding of rows of different lengths to one batch.

    Attributes:
        side: side of the padding; changes no prediction.
        length: length of every padded row; None takes that of the batch's longest.
        pooled: whether the head reads the last position, padding or not, as in the published run of pruned_104M.
        token: token of the padding; nothing attends to it.
    """

    side: Literal["left", "right"] = "right"
    length: int | None = None
    pooled: bool = False
    token: int = 0

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask``, (rows, tokens) each, and ``last``, (rows,), positions to read."""
        lengths = torch.tensor([len(row) for row in rows])
        width = max(int(lengths.max()), self.length or 0)
        input_ids = torch.full((len(rows), width), self.token)
        real = (
            torch.arange(width) < lengths[:, None]
            if self.side == "right"
            else torch.arange(width) >= (width - lengths[:, None])
        )
        input_ids[real] = torch.tensor([token for row in rows for token in row])
        last = torch.full_like(lengths, width - 1) if self.pooled or self.side == "left" else lengths - 1
        return {"input_ids": input_ids, "attention_mask": real.long(), "last": last}


class Classifier(nn.Module):
    """The body of a causal LM with a linear head, without a bias, on the hidden state of one token after the norm.

    It computes the same as ``AutoModelForSequenceClassification``, for every structure that a decoder may have.

    Args:
        decoder: used in place: give a copy for training.
        classes: number of classes.
        seed: seed of the head's first weights.
    """

    def __init__(self, decoder: Decoder, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.body: Any = decoder.model.base_model
        # skip_init draws no first values, which would advance the caller's random numbers.
        self.head: nn.Linear = nn.utils.skip_init(nn.Linear, decoder.d_model, classes, bias=False)
        with torch.no_grad():
            self.head.weight.normal_(std=_HEAD_DEVIATION, generator=torch.Generator().manual_seed(seed))

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, last: Tensor) -> Tensor:
        """Return the hidden state of each row that the head reads, (rows, d_model)."""
        # In causal attention later tokens change nothing: only padding before the token must be masked.
        masked = {}
        if not attention_mask[:, 0].all():
            masked = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0)}
        elif not attention_mask.gather(1, last[:, None]).all():
            masked = {"attention_mask": attention_mask}
        hidden: Tensor = self.body(input_ids=input_ids, use_cache=False, **masked).last_hidden_state
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, last: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``logits``, (rows, classes), and with labels, (rows,), their mean ``loss`` in nats."""
        logits = self.head(self.pooled(input_ids, attention_mask, last)).float()
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Training:
    """Training of head and body: AdamW, dropout off, warm-up over a tenth of the steps, then linear to zero."""

    learning_rate: float
    epochs: int
    batch_size: int
    seed: int
    clip: float = 1.0


def train(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    classes: int,
    training: Training,
    padding: Padding,
    progress: Progress = SILENT,
) -> Classifier:
    """Train a head and a copy of the decoder's body, in which masked weights stay zero.

    Raises:
        TrainingError: the loss is not finite.
    """
    decoder, half = trainable(decoder)
    without_dropout(decoder.model)
    # Deltas of rank 0 get no gradients.
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(parameter.numel() > 0)
    classifier = Classifier(decoder, classes, training.seed)
    steps = math.ceil(len(rows) / training.batch_size) * training.epochs
    with tempfile.TemporaryDirectory() as folder, fused_activations(decoder.model):
        arguments = quiet_arguments(
            output_dir=folder,
            per_device_train_batch_size=training.batch_size,
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            warmup_steps=round(steps / 10),
            weight_decay=0.0,
            max_grad_norm=training.clip,
            seed=training.seed,
            **half_precision(half),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trainer = _Trainer(
            model=classifier,
            args=arguments,
            train_dataset=cast("Any", [{"row": row, "label": label} for row, label in zip(rows, labels, strict=True)]),
            data_collator=lambda batch: {
                **padding([example["row"] for example in batch]),
                "labels": torch.tensor([example["label"] for example in batch]),
            },
            callbacks=[Bar(progress, "classification, training steps"), HeldZeros(decoder.model, masks.held(decoder))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return classifier


class _Trainer(Trainer):
    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        loss: Tensor = model(**inputs)["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(f"classification diverged: the loss is {loss.item()} at step {self.state.global_step}")
        return loss


def fit_head(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    classes: int,
    padding: Padding,
    batch_size: int,
    progress: Progress = SILENT,
) -> Classifier:
    """Fit the head alone, by logistic regression on the body's hidden states."""
    # A copy of the modules, not of their parameters: the caller's modules keep their training mode.
    classifier = Classifier(decoder.copy(share=True), classes)
    features = pooled_states(classifier, rows, padding, batch_size, progress, "classification, reading rows")
    deviation = features.std(0) + _SMALL
    mean = features.mean(0)
    fitted = logistic.fit((features - mean) / deviation, np.array(labels), classes)
    weights = fitted.weights / deviation[:, None]
    head: nn.Linear = nn.utils.skip_init(nn.Linear, decoder.d_model, classes)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights.T))
        head.bias.copy_(torch.from_numpy(fitted.bias - mean @ weights))
    classifier.head = head
    return classifier


@torch.no_grad()
def pooled_states(
    classifier: Classifier,
    rows: Sequence[Sequence[int]],
    padding: Padding,
    batch_size: int,
    progress: Progress,
    description: str,
) -> NDArray[np.float64]:
    """Return the hidden states that the head reads, (rows, d_model)."""
    classifier.eval()
    device = next(classifier.parameters()).device
    states = np.zeros((len(rows), classifier.head.in_features))
    with fused_activations(classifier.body):
        for chosen in progress.track(batches_by_length(rows, batch_size), description):
            batch = {name: tensor.to(device) for name, tensor in padding([rows[i] for i in chosen]).items()}
            states[chosen] = classifier.pooled(**batch).double().cpu()
    return states


def predict(
    classifier: Classifier,
    rows: Sequence[Sequence[int]],
    padding: Padding,
    batch_size: int,
    progress: Progress = SILENT,
) -> list[int]:
    """Return the class of each row."""
    states = pooled_states(classifier, rows, padding, batch_size, progress, "classification, test rows")
    head = classifier.head
    weight = head.weight.detach().double().cpu()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().double().cpu()
    predicted: list[int] = (torch.from_numpy(states) @ weight.T + bias).argmax(1).tolist()
    return predicted
