"""transformers' Trainer with our loss, order of text, validation and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
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
from layerfold.model.offload import gathered_
from layerfold.recovery.arguments import frozen, training_arguments
from layerfold.recovery.base import IGNORED, Outputs, Recovery, next_tokens
from layerfold.recovery.text import TrainingText, training_windows, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DIVERGED = 3.0
"""A run has diverged where its loss is this many times the first."""


class RecoveryTrainer(Trainer):
    """Trains one model with one recovery.

    Args:
        decoder: trained in place, moved to the device, its dropout and caching off: give a copy.
        learning_rate: highest learning rate.
        folder: folder of the checkpoints ``checkpoint-<step>``.
        checkpoints: whether to score validation text and write checkpoints during training.
        teacher: teacher in evaluation mode, on the device.
        counterparts: see `Recovery.loss`.

    Attributes:
        parameters_trained: number of trained parameters, with shared ones counted once.
        first_loss: first language-model loss, on validation text where checkpoints are written and on the first batch
            in a trial; a multiple of it is divergence.
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
        if recovery.gradient_checkpointing:
            # The switch has another name in newer versions of transformers.
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        for parameter in model.parameters():
            # The recipe alone decides what is trained, whatever the caller froze. Deltas of rank 0 get no gradients,
            # for which processes that train together would wait.
            parameter.requires_grad_(parameter.numel() > 0)
        for name in frozen(decoder, recovery):
            model.get_parameter(name).requires_grad_(False)
        if checkpoints and recovery.patience is not None:
            # First: it must not count the score before training, which `Bookkeeper` sets as the best.
            callbacks = [EarlyStoppingCallback(early_stopping_patience=recovery.patience), *callbacks]
        super().__init__(
            model=model,
            args=training_arguments(recovery, text, learning_rate, folder, checkpoints, autocast),
            train_dataset=cast("Any", training_windows(text)),
            eval_dataset=cast("Any", windows_of(text.validation)),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False  # the name of the same switch in older versions
        kept = masks.held(decoder)
        if self.is_fsdp_enabled and (kept or deltas.ranks(decoder)):
            what = "zeros that are held" if kept else "low-rank deltas"
            raise InputError(f"{what}, and FSDP, which shards the tensors: accepted: one of the two")
        self._zeros = HeldZeros(model, kept)
        self.add_callback(self._zeros)
        self.parameters_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self._decoder = decoder
        self._recovery = recovery
        self._tokenizer = tokenizer
        self._teacher = teacher
        self._counterparts = counterparts
        self.first_loss: float | None = None
        self._recent: list[Tensor] = []

    def _forward(self, model: nn.Module, decoder: Decoder, ids: Tensor) -> Outputs:
        """Run a model; its last hidden state is that before the final norm, unlike in transformers."""
        captured: list[Tensor] = []
        hook = decoder.blocks[-1].module.register_forward_hook(
            lambda _module, _inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            outputs: Any = model(
                input_ids=ids, use_cache=False, output_hidden_states=self._recovery.needs_hidden_states
            )
        finally:
            hook.remove()
        if self._recovery.needs_hidden_states:
            outputs.hidden_states = (*outputs.hidden_states[:-1], captured[0])
        return cast("Outputs", outputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of a batch.

        Raises:
            TrainingError: the loss is not finite, or has diverged.
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
            # The mean, so that all processes stop together: otherwise some would wait for ever.
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
        """Back-propagate; masked weights get no gradient, so that clipping does not count them."""
        loss: Tensor = super().training_step(*arguments, **options)
        self._zeros.clear_gradients()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean language-model loss beside the objective."""
        if "loss" in logs and self._recent:
            logs["lm_loss"] = float(self.accelerator.gather(torch.stack(self._recent)).mean())
            self._recent.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Score the validation text in nats per token, whatever the objective of training.

        Raises:
            TrainingError: the loss is not finite, or has diverged.
        """
        model = self.model_wrapped
        model.eval()
        nats = torch.zeros((), dtype=torch.float64)
        tokens = 0
        for batch in self.get_eval_dataloader():
            ids, lengths = batch["input_ids"], batch["length"]
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
            losses = cross_entropy(logits, next_tokens(ids), ignore_index=IGNORED, reduction="none").view_as(ids)
            real = torch.arange(1, ids.shape[1] + 1, device=ids.device) < lengths[:, None]
            # Without the windows that some processes repeat to have as many as the others.
            sums, counts = self.accelerator.gather_for_metrics(((losses * real).sum(1), real.sum(1)))
            nats += sums.double().sum().cpu()
            tokens += int(counts.sum())
        metrics = {"eval_loss": float(nats) / tokens}
        self._check(metrics["eval_loss"], metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(cast("Sized", self.train_dataset))  # the windows are in order already

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read a checkpoint of `_save`, for every structure of the model."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_training_(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint that plain transformers loads, without pickled files."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_training(self.accelerator.unwrap_model(self.model), folder, state_dict)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)


class HeldZeros(TrainerCallback):
    """Keeps masked weights zero: clears their gradients, and sets them to zero after every step."""

    def __init__(self, model: PreTrainedModel, kept: Mapping[str, Tensor]) -> None:
        self._zeros = [(model.get_parameter(name), ~mask) for name, mask in kept.items()]

    def clear_gradients(self) -> None:
        """Set the gradients of masked weights to zero."""
        for weight, zeros in self._zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(zeros.to(weight.grad.device), 0)

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Set masked weights to zero."""
        for weight, zeros in self._zeros:
            weight.masked_fill_(zeros.to(weight.device), 0)


def trainable(decoder: Decoder) -> tuple[Decoder, bool]:
    """Return a copy with float32 weights, and whether it computes in bfloat16: where the decoder is in half precision.

    Training needs float32 weights: small steps would be rounded away.
    """
    copied, half = decoder.copy(), decoder.dtype in (torch.bfloat16, torch.float16)
    copied.model.float()
    gathered_(block.module for block in copied.blocks)
    return copied, half


def without_dropout(model: PreTrainedModel) -> None:
    """Turn dropout off: one reading of a text does not overfit, and dropout would blur the teacher."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast("Any", module).attention_dropout = 0.0
