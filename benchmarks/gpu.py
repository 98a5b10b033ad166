"""What a GPU does: scoring, a whole plan, recovery and decoding, each beside the plain way, in one run.

Models have random weights: GPT-2's shape unless said, with pocket's tokenizer where text is read.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shape import random_windows
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.cli.doctor import matrix_product_rate
from layerfold.environment import device_of, environment
from layerfold.evaluators import Latency
from layerfold.files import write_text
from layerfold.inference.scoring import window_nats
from layerfold.methods import Drop
from layerfold.model.decoder import Decoder
from layerfold.planning import Plan
from layerfold.recovery import Finetune
from layerfold.recovery.run import Run
from layerfold.recovery.text import training_text
from layerfold.text.windows import TokenWindows

GPT2: dict[str, Any] = {"name": "gpt2"}
SMOLLM2: dict[str, Any] = {
    "name": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LLAMA_1B: dict[str, Any] = SMOLLM2 | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
BATCHES = (8, 16, 32, 64, 128)
Figures = dict[str, Any]


def made(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Model:
    """Return a model of random weights with pocket's tokenizer."""
    settings = dict(shape)
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("name"), **settings)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    network.to(device)
    tokenizer = load("pocket", device="cpu").tokenizer
    return Model(Decoder(network), tokenizer, Provenance("random"))


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median time of some runs, after one that warms up."""
    run()
    times = []
    for _ in range(rounds):
        synchronise()
        started = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def loop_nats(decoder: Decoder, windows: TokenWindows, batch: int) -> float:
    """Score windows the straightforward way; the loss is the mean over the tokens that have one before them."""
    total = 0.0
    for ids in windows.input_ids.split(batch):
        here = ids.to(decoder.device)
        total += decoder.model(here, labels=here).loss.item() * (ids.numel() - len(ids))
    return total


def scoring(device: torch.device, count: int, rounds: int) -> Figures:
    """Tokens a second, beside the plain loop at its best batch."""
    found: Figures = {}
    windows = random_windows(count)
    tokens = windows.input_ids.numel()
    for dtype in (torch.bfloat16, torch.float32):
        decoder = made(GPT2, dtype, device).decoder
        loops = {}
        for batch in BATCHES if dtype == torch.bfloat16 else BATCHES[:3]:
            loops[batch] = tokens / seconds(partial(loop_nats, decoder, windows, batch), rounds)
        own = tokens / seconds(partial(window_nats, decoder, windows), rounds)
        best = max(loops, key=loops.__getitem__)
        difference = abs(float(window_nats(decoder, windows).sum()) / loop_nats(decoder, windows, best) - 1)
        found[str(dtype).removeprefix("torch.")] = {
            "tokens/s": own,
            "plain loop, tokens/s by batch": loops,
            "times the plain loop at its best batch": own / loops[best],
            "relative difference of the nats": difference,
        }
    return found


def plans(device: torch.device, shapes: dict[str, dict[str, Any]]) -> Figures:
    """Seconds of a whole plan for 66 % of the parameters, everything read and repaired."""
    found = {}
    for name, shape in shapes.items():
        model = made(shape, torch.bfloat16, device)
        plan = Plan(parameters="66%", corpus="imdb")
        synchronise()
        started = time.perf_counter()
        planned, smaller = plan(model, None)
        synchronise()
        found[name] = {
            "seconds": time.perf_counter() - started,
            "trials": len(planned.trials),
            "parameters": smaller.decoder.size().parameters / model.decoder.size().parameters,
        }
        del model, smaller, planned
        gc.collect()
    return found


def training(device: torch.device, tokens: int) -> Figures:
    """Tokens a second of recovery in bfloat16, beside a bare loop of the same model, batch and optimiser."""
    import tempfile

    model = made(GPT2, torch.bfloat16, device)
    recovery = Finetune(tokens=tokens, learning_rate=1e-4, corpus="imdb", evaluations=1)
    text = training_text(model, recovery, 0)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        _, outcome = Run(model, recovery, Path(folder) / "run", teacher=None, text=text)()
        rates["recovery, whole run, tokens/s"] = text.tokens / (time.perf_counter() - started)
        rates["recovery, training alone, tokens/s"] = text.tokens / outcome.seconds
    network = made(GPT2, torch.float32, device).decoder.model.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    ids = torch.cat([each.input_ids for each in [text.train]])[:, : text.train.context]
    batches = [each.to(device) for each in ids.split(recovery.batch_size)]

    def step(batch: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = network(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    step(batches[0])
    synchronise()
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    synchronise()
    rates["bare loop, tokens/s"] = ids.numel() / (time.perf_counter() - started)
    ratio = rates["recovery, training alone, tokens/s"] / rates["bare loop, tokens/s"]
    return rates | {"recovery / bare loop": ratio, "batch": recovery.batch_size, "context": text.train.context}


def decoding(device: torch.device, rounds: int) -> Figures:
    """Milliseconds a token of GPT-2's shape with 12, 6 and 2 blocks: plain generate, and a captured step."""
    base = made(GPT2, torch.bfloat16, device)
    models = {"12 blocks": base}
    for kept in (6, 2):
        smaller = base.copy()
        Drop(every=12 // kept).apply(smaller.decoder, None) if kept == 6 else smaller.decoder.keep_(range(kept))
        models[f"{kept} blocks"] = smaller
    scores = Latency(rounds=rounds, prompt_tokens=32, new_tokens=64).compare(models)
    wanted = ("speedup", "captured", "captured_speedup", "prefill")
    return {
        label: {"ms/token": score.value, **{key: score.details[key] for key in wanted if key in score.details}}
        for label, score in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: a look, not a figure")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment here")
    parser.add_argument("--parts", default="rates,scoring,decoding,training,plans", help="which parts to run")
    options = parser.parse_args()
    device = device_of(options.device)
    quick, rounds = options.quick, 3
    parts: dict[str, Callable[[], Figures]] = {
        "rates": lambda: {
            f"{name} matrix products, TFLOP/s": matrix_product_rate(getattr(torch, name), 4096, device=device) / 1e12
            for name in ("float32", "bfloat16", "float16")
        },
        "scoring": lambda: scoring(device, 16 if quick else 256, rounds),
        "decoding": lambda: decoding(device, 3 if quick else 12),
        "training": lambda: training(device, 8_192 if quick else 262_144),
        "plans": lambda: plans(device, {"GPT-2": GPT2} if quick else {"GPT-2": GPT2, "SmolLM2-135M": SMOLLM2}),
        "large": lambda: plans(device, {"Llama 1B": LLAMA_1B}),
    }
    document: Figures = {"benchmark": "gpu", "figures": {}, "environment": environment()}
    document["environment"]["device"] = (
        str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    )
    for name in options.parts.split(","):
        document["figures"][name] = parts[name]()
        print(json.dumps({name: document["figures"][name]}, indent=1), flush=True)
        gc.collect()
        if options.json is not None:
            write_text(options.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
