"""Print what transformers, of whatever version it is, makes of checkpoints: one JSON line each."""

from __future__ import annotations

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "the river in winter, naïve 映画"


def main() -> None:
    transformers.logging.set_verbosity_error()
    print(json.dumps({"version": transformers.__version__}))
    for folder in sys.argv[1:]:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = torch.arange(1, 25)[None]
        with torch.no_grad():
            logits = model.float()(input_ids=ids).logits
        found = {
            "dtype": str(model.config.dtype),
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "logits": logits[0, ::6, ::7].tolist(),
            "tokens": tokenizer(TEXT, add_special_tokens=False).input_ids,
            "text": tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids),
            "end": tokenizer.eos_token_id,
            "special": sorted(tokenizer.all_special_tokens),
        }
        print(json.dumps(found))


main()
