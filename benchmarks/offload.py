"""Memory of commands on a 1B Llama shape in bfloat16 whose weights wait in files, beside the same held in memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import write_text_and_tokenizer
from shape import Figures, arguments, in_fresh_process, report, status_bytes

SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QUICK = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
TOKENS = 1024


def write_llama(folder: Path, shape: dict[str, int]) -> None:
    """Write a checkpoint of random weights, in bfloat16 and in files of a gigabyte."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder, max_shard_size="1GB")


def peak(*command: str) -> int:
    """Run a command of this interpreter; return its largest resident memory that is no mapped file, in bytes."""
    highest = 0
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            held = status_bytes("RssAnon", process.pid) + status_bytes("RssShmem", process.pid)
            highest = max(highest, held)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return highest


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory(prefix="layerfold-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(write_llama, folder / "model", SHAPE | (QUICK if options.quick else {}))
        corpus = str(in_fresh_process(write_text_and_tokenizer, folder / "model"))
        model, text = str(folder / "model"), ["--corpus", corpus]
        weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        out = ["--model", model, "--output-dir", str(folder / "out"), "--overwrite"]
        repair = ["--blocks", "1" if options.quick else "3-14", "--repair", "refit", "--repair-tokens", str(TOKENS)]
        wanda = ["--sparsity", "0.5", "--criterion", "wanda", "--tokens", str(TOKENS)]
        commands = {
            "eval perplexity": ["eval", model, "--metrics", "perplexity", "--limit-tokens", str(TOKENS), *text],
            "compress prune, wanda": ["compress", "prune", *wanda, *text, *out],
            "compress drop, repair refit": ["compress", "drop", *repair, *text, *out],
        }
        bare = peak("-c", "import torch")
        figures: Figures = {"weights, MB": weights / 1e6, "bare interpreter with torch, MB": bare / 1e6}
        figures["tokens"] = TOKENS
        for command, words in commands.items():
            for offload in ("always", "never"):
                held = peak("-m", "layerfold.cli", *words, "--device", "cpu", "--offload", offload)
                figures[f"{command}, offload {offload}, above it, MB"] = (held - bare) / 1e6
    report("offload", figures, options.json)


if __name__ == "__main__":
    main()
