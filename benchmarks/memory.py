"""Peak memory of `layerfold compress` on the GPT-2 shape, as a multiple of the weights' bytes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from shape import VOCABULARY, Figures, arguments, gpt2_folder, in_fresh_process, report, status_bytes

END_OF_TEXT = "<|endoftext|>"
DOCUMENTS, WORDS = 2000, 300


def write_text_and_tokenizer(folder: Path) -> Path:
    """Add a tokenizer of one id for each generated word to a checkpoint; return a corpus of such words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [f"w{index}" for index in range(VOCABULARY - 1)]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate([*words, END_OF_TEXT])}, END_OF_TEXT))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)
    chosen = random.Random(0)
    corpus = folder / "words.txt"
    corpus.write_text("\n\n".join(" ".join(chosen.choices(words, k=WORDS)) for _ in range(DOCUMENTS)) + "\n")
    return corpus


def peak_bytes(*command: str) -> int:
    """Largest resident set of a command of this interpreter, its high-water mark read until it ends."""
    peak = 0
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, status_bytes("VmHWM", process.pid))
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return peak


def main() -> None:
    options = arguments(__doc__)
    cases = {f"{method} n = {n}": [method, "--n", str(n)] for method in ("merge", "collapse") for n in (2, 4, 10)}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        cases[f"prune {criterion}"] = ["prune", "--sparsity", "0.5", "--criterion", criterion, "--format", "compact"]
    cases["share 4:4 rank 8"] = ["share", "--window", "4:4"]
    cases["share --window auto"] = ["share", "--k", "4"]
    with gpt2_folder() as folder:
        corpus = in_fresh_process(write_text_and_tokenizer, folder)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        bare = peak_bytes("-c", "import torch")
        figures: Figures = {"weights, MB": weights / 1e6, "bare interpreter with torch, MB": bare / 1e6}
        for name in list(cases)[::4] if options.quick else cases:
            command = ["-m", "layerfold.cli", "compress", *cases[name], "--model", str(folder)]
            command += ["--corpus", str(corpus), "--output-dir", str(folder / name.replace(" ", "-"))]
            above = peak_bytes(*command, *(["--tokens", "2048"] if options.quick else [])) - bare
            figures[f"{name}, above it, MB"] = above / 1e6
            figures[f"{name}, above it / weights"] = above / weights
    report("memory", figures, options.json)


if __name__ == "__main__":
    main()
