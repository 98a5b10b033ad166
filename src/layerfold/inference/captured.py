"""Greedy decoding whose step is recorded once, as a CUDA graph over a cache of fixed size, and then replayed.

At batch 1 a GPU waits for the launches of a small model's kernels: plain `generate` measures the host. Serving engines
replay a graph; what a smaller model saves there is seen here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StaticCache

from layerfold.inference.decoding import check_room
from layerfold.model.decoder import Decoder

_WARM_UPS = 3


class Captured:
    """Continues one prompt greedily; on a processor the same steps run without a graph.

    Args:
        decoder: the model; a weight that is replaced later is not read.
        prompt: (1, tokens) int64.
        new_tokens: how many tokens each call adds.

    Raises:
        InputError: prompt and new tokens exceed the context.
        RuntimeError: the step cannot be captured.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, prompt: Tensor, new_tokens: int) -> None:
        check_room(decoder, [prompt.shape[1]], new_tokens)
        self._model = decoder.model
        self._prompt, self._count = prompt.to(decoder.device), new_tokens
        self._cache = StaticCache(config=self._model.config, max_cache_len=prompt.shape[1] + new_tokens)
        if any(getattr(layer, "is_sliding", False) for layer in self._cache.layers):
            # Its cache counts tokens outside the graph: a replay would write beyond the end.
            raise RuntimeError("a step over a sliding window cannot be captured")
        self._token = self._prompt[:, -1:].clone()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._start()
        if decoder.device.type == "cuda":
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(min(_WARM_UPS, new_tokens - 1)):
                    self._step()
            torch.cuda.current_stream().wait_stream(aside)
            self._start()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the new tokens, (new_tokens,) int64."""
        self._start()
        produced = self._token.new_empty(self._count)
        produced[0] = self._token[0, 0]
        for place in range(1, self._count):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            produced[place] = self._token[0, 0]
        return produced

    def _start(self) -> None:
        """Read the prompt, and choose the first token."""
        self._cache.reset()
        self._choose(self._prompt)

    def _step(self) -> None:
        """Read the last token, and choose the next."""
        self._choose(self._token)

    def _choose(self, ids: Tensor) -> None:
        logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._token.copy_(logits[:, -1:].argmax(-1))
