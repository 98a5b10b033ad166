"""transformers' Trainer with our loss, our order of text, our validation and our checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

from layerfold.checkpoint.save import read_training_, write_training
from layerfold.errors import InputError, TrainingError
from layerfold.model import deltas, masks
from layerfold.model.decoder import Decoder, check_precision
from layerfold.recovery.arguments import frozen, training_arguments
from layerfold.recovery.base import IGNORED, Outputs, Recovery, next_tokens
from layerfold.recovery.text import TrainingText, TrainingWindows, ValidationWindows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DIVERGED = 3.0
"""A loss this many times the first is a run that has diverged."""


class RecoveryTrainer(Trainer):
    """Trains one model by one recovery.

    Args:
        decoder: trained in place, moved to the device, its dropout and caching off: hand over a copy.
        learning_rate: the highest.
        folder: where checkpoints go, as ``checkpoint-<step>``.
        checkpoints: whether to score validation text and write checkpoints along the way.
        teacher: on the device already, in evaluation mode.
        counterparts: see `Recovery.loss`.

    Attributes:
        parameters_trained: how many, those shared counted once.
        first_loss: language-model loss that was measured first, on validation text where checkpoints are written and on
            the first batch in a trial: what tells later whether the run has diverged.
    """

    def __init__(
        self,
        decoder: Decoder,
        recovery: Recovery,
        text: TrainingText,
        *,
        learning_rate: float,
        folder: Path,
        checkpoints: bool,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: Decoder | None,
        counterparts: tuple[int, ...],
        callbacks: list[TrainerCallback],
        autocast: bool = False,
    ) -> None:
        check_precision(decoder)
        model = decoder.model
        without_dropout(model)
        for parameter in model.parameters():
            # Whatever the caller had frozen: the recipe says what is trained. Deltas of rank 0 get no gradients, which
            # processes that train together would wait for.
            parameter.requires_grad_(parameter.numel() > 0)
        for name in frozen(decoder, recovery):
            model.get_parameter(name).requires_grad_(False)
        super().__init__(
            model=model,
            args=training_arguments(recovery, text, learning_rate, folder, checkpoints, autocast),
            train_dataset=TrainingWindows(text),
            eval_dataset=ValidationWindows(text.validation),
            # Patience first: it is not to count the score before training, which `Bookkeeper` sets as the best.
            callbacks=[*(_patience(recovery) if checkpoints else []), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False  # what the line above was called before
        kept = masks.held(decoder)
        if self.is_fsdp_enabled and (kept or deltas.ranks(decoder)):
            what = "zeros that are held" if kept else "low-rank deltas"
            raise InputError(f"{what}, and FSDP, which shards the tensors: accepted: one of the two")
        self._zeros = HeldZeros(model, kept)
        self.add_callback(self._zeros)
        self.parameters_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        self._decoder = decoder
        self._recovery = recovery
        self._tokenizer = tokenizer
        self._teacher = teacher
        self._counterparts = counterparts
        self.first_loss: float | None = None
        self._recent: list[Tensor] = []

    def _forward(self, model: nn.Module, decoder: Decoder, ids: Tensor) -> Outputs:
        """Run a model; its last hidden state is taken before the final norm, where transformers takes it after."""
        captured: list[Tensor] = []
        hook = decoder.blocks[-1].module.register_forward_hook(
            lambda _module, _inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            found: Any = model(input_ids=ids, use_cache=False, output_hidden_states=self._recovery.needs_hidden_states)
        finally:
            hook.remove()
        if self._recovery.needs_hidden_states:
            found.hidden_states = (*found.hidden_states[:-1], captured[0])
        return cast("Outputs", found)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of a batch.

        Raises:
            TrainingError: it is not finite, or beyond all bounds.
        """
        ids = inputs["input_ids"]
        outputs, taught = self._forward(model, self._decoder, ids), None
        if self._teacher is not None:
            with torch.no_grad():
                taught = self._forward(self._teacher.model, self._teacher, ids)
        loss = self._recovery.loss(outputs, ids, taught, self._counterparts)
        objective = loss.objective
        if (penalty := self._recovery.penalty(self._decoder)) is not None:
            objective = objective + penalty
        both = torch.stack([loss.language_model, objective.detach()]).float()
        if self.accelerator.num_processes > 1:
            # Their mean, so that all processes stop together: one that stopped alone would leave the others waiting.
            both = self.accelerator.gather(both[None]).mean(0)
        self._check(*both.tolist())
        self._recent.append(loss.language_model)
        return objective

    def _check(self, language_model: float, objective: float) -> None:
        if self.first_loss is None:
            self.first_loss = language_model
        if not math.isfinite(objective) or not language_model <= _DIVERGED * self.first_loss:
            raise TrainingError(
                f"the loss went from {self.first_loss:.3g} to {language_model:.3g} nats per token "
                f"after step {self.state.global_step} of {self.state.max_steps}"
            )

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Back-propagate; a held zero gets no gradient, which clipping would count with those of weights that move."""
        loss: Tensor = super().training_step(*arguments, **options)
        self._zeros.clear_gradients()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean language-model loss beside the objective's."""
        if "loss" in logs and self._recent:
            logs["lm_loss"] = float(self.accelerator.gather(torch.stack(self._recent)).mean())
            self._recent.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Score the validation text: nats per token, whatever is minimised in training.

        Raises:
            TrainingError: it is not finite, or beyond all bounds.
        """
        model = self.model_wrapped
        model.eval()
        nats = torch.zeros((), dtype=torch.float64)
        tokens = 0
        for batch in self.get_eval_dataloader():
            ids, lengths = batch["input_ids"], batch["length"]
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
            each = cross_entropy(logits, next_tokens(ids), ignore_index=IGNORED, reduction="none").view_as(ids)
            real = torch.arange(1, ids.shape[1] + 1, device=ids.device) < lengths[:, None]
            # Processes that run out of windows repeat some; those are left out here.
            sums, counts = self.accelerator.gather_for_metrics(((each * real).sum(1), real.sum(1)))
            nats += sums.double().sum().cpu()
            tokens += int(counts.sum())
        metrics = {"eval_loss": float(nats) / tokens}
        self._check(metrics["eval_loss"], metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(cast("TrainingWindows", self.train_dataset))  # the text has its order already

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read what `_save` wrote, whatever of the model is gone."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_training_(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint that loads anywhere, tensors tied between blocks included, and nothing pickled."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_training(self.accelerator.unwrap_model(self.model), folder, state_dict)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)


class HeldZeros(TrainerCallback):
    """Keeps the zeros of some weights zero: takes their gradients, and sets them again after every step."""

    def __init__(self, model: PreTrainedModel, kept: Mapping[str, Tensor]) -> None:
        self._zeros = [(model.get_parameter(name), ~mask) for name, mask in kept.items()]

    def clear_gradients(self) -> None:
        """Set their gradients to zero."""
        for weight, zeros in self._zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(zeros.to(weight.grad.device), 0)

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Set them."""
        for weight, zeros in self._zeros:
            weight.masked_fill_(zeros.to(weight.device), 0)


def _patience(recovery: Recovery) -> list[TrainerCallback]:
    return [] if recovery.patience is None else [EarlyStoppingCallback(early_stopping_patience=recovery.patience)]


def without_dropout(model: PreTrainedModel) -> None:
    """Turn dropout off: over one reading of a text there is nothing to overfit, and it would blur the teacher."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast("Any", module).attention_dropout = 0.0
