"""Small recoveries: models of two blocks, texts of a few hundred tokens, and the same training written out by hand."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Write, prose, tiny, tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from layerfold.checkpoint.model import Model
from layerfold.model import deltas
from layerfold.model.masks import held
from layerfold.recovery import Distill, Finetune, LowRank, Recovery, callbacks
from layerfold.recovery.run import Outcome, Run
from layerfold.text.corpora import load_corpus

CONTEXT = 16
BATCH = 4
STEP = CONTEXT * BATCH
"""Tokens a step."""


def small(family: str = "gpt2", seed: int = 0, **changes: Any) -> Model:
    """A model of two blocks."""
    if family == "gpt2":
        return tiny(family, seed, **{"n_layer": 2, "n_embd": 16, "n_head": 2} | changes)
    return tiny(family, seed, **{"num_hidden_layers": 2} | changes)


def assert_shared(model: Model, like: Model) -> None:
    """One tensor for all matrices of a kind that share, and of each delta the rank that it had."""
    assert deltas.ranks(model.decoder) == deltas.ranks(like.decoder) != {}
    kinds: dict[str, set[int]] = {}
    for path, module in deltas.factored(model.decoder).items():
        kinds.setdefault(path.rpartition(".")[2], set()).add(id(module.weight))
    assert {len(found) for found in kinds.values()} == {1}
    assert model.decoder.size().parameters == like.decoder.size().parameters


def _settings(corpus: str, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    few = {"context": CONTEXT, "batch_size": BATCH, "learning_rate": 1e-3, "validation_tokens": 64, "evaluations": 2}
    return {"tokens": steps * STEP, "corpus": corpus} | few | changes


def finetune(corpus: str, steps: int = 6, **changes: Any) -> Finetune:
    return Finetune(**_settings(corpus, steps, changes))


def distill(corpus: str, steps: int = 6, **changes: Any) -> Distill:
    return Distill(**_settings(corpus, steps, changes))


def lowrank(corpus: str, steps: int = 6, **changes: Any) -> LowRank:
    return LowRank(**_settings(corpus, steps, changes))


class Killed(BaseException):
    """What no layer may catch, as none can catch a signal."""


Patch = Callable[[pytest.MonkeyPatch], None]


def at_the_end_of(step: int) -> Patch:
    """Kill after a step has been taken, before anything of it is logged, scored or written."""

    def on_step_end(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == step:
            raise Killed

    return lambda monkeypatch: monkeypatch.setattr(callbacks.Bar, "on_step_end", on_step_end)


class Train:
    """Train on a corpus, in folders below one."""

    def __init__(self, corpus: str, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.finetune, self.distill, self.lowrank, self.batches = (
            functools.partial(each, corpus) for each in (finetune, distill, lowrank, batches)
        )

    def __call__(
        self, model: Model, recovery: Recovery, name: str | Path = "run", **options: Any
    ) -> tuple[Model, Outcome]:
        return Run(model, recovery, self.folder / name, **options)()

    def killed(self, where: int | Patch, *arguments: Any, **options: Any) -> None:
        """Train until the training is killed, at the end of a step or where a patch says."""
        with pytest.MonkeyPatch.context() as inner:
            (at_the_end_of(where) if isinstance(where, int) else where)(inner)
            with pytest.raises(Killed):
                self(*arguments, **options)


def assert_equal(one: tuple[Model, Outcome], two: tuple[Model, Outcome], drifted: float = 1e-5) -> None:
    """The same weights, but for rounding where the optimiser magnifies it, and the same course."""
    assert drift(one[0], two[0]) <= drifted
    for name in ("train", "validation"):
        assert np.array(one[1].curve[name]).shape == np.array(two[1].curve[name]).shape
        assert np.allclose(one[1].curve[name], two[1].curve[name], atol=drifted)
    for name in ("tokens", "steps", "best_step", "learning_rate", "search_tokens", "parameters_trained"):
        assert getattr(one[1], name) == getattr(two[1], name), name
    assert one[1].validation_perplexity == pytest.approx(two[1].validation_perplexity, rel=1e-5)


def weights(model: Model | nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor."""
    module = model.decoder.model if isinstance(model, Model) else model
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def difference(one: Any, two: Any) -> float:
    """The largest absolute difference between the tensors of two models, or of two dictionaries of them."""
    first, second = (each if isinstance(each, dict) else weights(each) for each in (one, two))
    assert first.keys() == second.keys()
    # A delta of rank 0 has no elements.
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel())


def drift(one: Any, two: Any) -> float:
    """As `difference`, but for GPT-2's key biases.

    No output depends on those: their gradient is rounding alone, of which AdamW makes whole steps, each time another.
    """
    first, second = (dict(each) if isinstance(each, dict) else weights(each) for each in (one, two))
    for each in (first, second):
        for name, tensor in each.items():
            if name.endswith("attn.c_attn.bias"):
                query, _, value = tensor.chunk(3)
                each[name] = torch.cat([query, value])
    return difference(first, second)


def train_ids(corpus: str, seed: int = 0, split: Any = "train") -> list[int]:
    """The training text, or another, as one stream of tokens, joined here by hand."""
    documents = list(load_corpus(corpus, split).documents)
    random.Random(seed).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer().eos_token_id] * bool(ids) + tokenizer()(document)["input_ids"]
    return ids


def batches(corpus: str, steps: int, seed: int = 0) -> list[Tensor]:
    """The first `steps` batches of windows, (BATCH, CONTEXT) each."""
    ids = train_ids(corpus, seed)
    assert len(ids) >= steps * STEP, "this text is read more than once"
    return list(torch.tensor(ids[: steps * STEP]).view(steps, BATCH, CONTEXT))


def by_hand(
    model: Model,
    texts: Sequence[Tensor],
    *,
    rate: float = 1e-3,
    warmup: int = 1,
    decay: float = 0.0,
    clip: float = 1.0,
    schedule: Any = None,
) -> PreTrainedModel:
    """Fine-tune a copy by a plain loop; the schedule is transformers' linear one unless another is given.

    Where zeros are held, gradients before each step and weights after it are multiplied by the mask.
    """
    trained: PreTrainedModel = model.decoder.copy().model.eval()  # eval: no dropout
    named, kept = dict(trained.named_parameters()), held(model.decoder)
    exempt = [p for name, p in named.items() if name.endswith("bias") or "norm" in name or ".ln_" in name]
    decayed = [p for p in named.values() if not any(p is other for other in exempt)]
    assert exempt
    assert decayed
    groups = [{"params": decayed, "weight_decay": decay}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    scheduler = (schedule or get_linear_schedule_with_warmup)(optimizer, warmup, *([] if schedule else [len(texts)]))
    for ids in texts:
        loss = trained(input_ids=ids, labels=ids).loss
        loss.backward()
        for name, mask in kept.items():
            named[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, mask in kept.items():
                named[name].mul_(mask)
        scheduler.step()
        optimizer.zero_grad()
    return trained


LINE = "the same words stand in both of the texts"


def shared_text(write: Write, where: str) -> tuple[str, str]:
    """A corpus with a document, in its `where` split, that stands in the test text of another."""
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        own = [prose(20, seed) for seed in range(first, first + 30)]
        write(f"one/{split}.txt", "\n\n".join([*own, LINE] if split == where else own))
    other = write("two/test.txt", "\n\n".join([prose(20, 900), LINE.replace(" ", "  ")]))
    return str(other.parent.parent / "one"), str(other.parent)
