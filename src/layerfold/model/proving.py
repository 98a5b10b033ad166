"""Proofs of a row on the model that it is of: what it says of the blocks has to be what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from layerfold.errors import InputError, ModelError
from layerfold.model.block import Block
from layerfold.model.decoder import Decoder
from layerfold.model.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOWS, _TOKENS = 2, 8
_CLOSE = 1e-3
"""Largest difference of two logits, as a share of the largest logit, that sums in another order make."""


Change = Callable[[Decoder], None]


class _Proofs:
    """Compares what changed copies of a model compute, on a few tokens.

    Args:
        model: stays as it is; copies share its parameters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(int(model.config.vocab_size), (_WINDOWS, _TOKENS), generator=drawn)
        self.model, self.ids = model, ids.to(model.device)
        self.expected = self.logits(model)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Return a model's logits, (windows, tokens, vocabulary)."""
        found: Tensor = model(input_ids=self.ids, use_cache=False).logits.float()
        return found

    def causal(self) -> bool:
        """Whether no token reads one after it."""
        changed = self.ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % int(self.model.config.vocab_size)
        with torch.no_grad():
            found = self.model(input_ids=changed, use_cache=False).logits.float()
        return _near(found[:, :-1], self.expected[:, :-1])

    def agree(self, family: Family, one: Change, other: Change | None = None) -> bool:
        """Whether a copy that is changed one way computes what one that is changed the other way, or is not, does."""
        try:
            found = self._changed(family, one)
            wanted = self.expected if other is None else self._changed(family, other)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, InputError):
            return False
        return bool((found - wanted).abs().max() <= _CLOSE * wanted.abs().max())

    def _changed(self, family: Family, change: Change) -> Tensor:
        decoder = Decoder(self.model, family).copy(share=True)
        change(decoder)
        return self.logits(decoder.model)

    def refuse(self, why: str) -> NoReturn:
        """Raise ModelError: this could not be proved."""
        kind = self.model.config.model_type
        raise ModelError(f"unsupported architecture {kind!r}, and it cannot be inferred: {why}")


def proved(model: PreTrainedModel, family: Family) -> Family:
    """Return a row with what only a proof decides: which FFN matrix is the gate, how heads lie, how logits are scaled.

    Where neurons or heads cannot be proved, the row says that there are none, or that heads go together.

    Raises:
        ModelError: removing a block, an attention or an FFN is not what the row says.
    """
    proofs = _Proofs(model)
    if not proofs.causal():
        proofs.refuse("tokens read those after them: an encoder")
    family = _with_readout(proofs, _with_scale(proofs, family))
    if Decoder(model, family).n_blocks > 1 and not proofs.agree(family, _dropped, _passed_over):
        proofs.refuse("a model without a block does not compute what it does when that block is passed over")
    for part, output in (("attention", family.attention_output), ("ffn", family.down)):
        if output and not proofs.agree(family, partial(_removed, part), partial(_silent, part)):
            proofs.refuse(f"a block without its {part} does not compute what it does when that writes zeros")
    if family.down:
        rows = (row for row in _gates(family) if proofs.agree(row, _shuffled) and proofs.agree(row, _thinned, _muted))
        family = next(rows, replace(family, up="", gate=None, down=""))
    if family.attention_output:
        rows = (row for row in _layouts(family) if proofs.agree(row, _headless, _headmuted))
        family = next(rows, replace(family, one_group=True))
    return family


def _dropped(decoder: Decoder) -> None:
    decoder.keep_([index for index in range(decoder.n_blocks) if index != 1])


def _passed_over(decoder: Decoder) -> None:
    block, tuples = decoder.blocks[1].module, decoder.family.tuples
    block.forward = lambda hidden, *_args, **_kwargs: (hidden, None) if tuples else hidden


def _removed(part: str, decoder: Decoder) -> None:
    decoder.remove_(part, [0])


def _silent(part: str, decoder: Decoder) -> None:
    output = decoder.blocks[0].output(part)
    assert output is not None
    output.own_()
    for tensor in output.tensors:
        tensor.zero_()


def _gates(family: Family) -> Iterator[Family]:
    """Yield the ways in which an FFN's first matrices may be `up` and the gate."""
    yield family
    if family.gated and not family.fused_gate:
        assert family.gate is not None
        yield replace(family, up=family.gate, gate=family.up)


def _shuffled(decoder: Decoder) -> None:
    """Permute the first block's neurons, and flip half of them where there is a gate: that changes nothing."""
    ffn, drawn = decoder.blocks[0].ffn, torch.Generator().manual_seed(0)
    ffn.own_()
    order = torch.randperm(ffn.d_ffn, generator=drawn)
    signs = torch.where(torch.rand(ffn.d_ffn, generator=drawn) < 0.5, -1.0, 1.0) if decoder.family.gated else None
    ffn.permute_(order.to(decoder.device), None if signs is None else signs.to(decoder.device, decoder.dtype))


def _kept(decoder: Decoder) -> Tensor:
    return torch.arange(0, decoder.d_ffn[0], 2, device=decoder.device)


def _thinned(decoder: Decoder) -> None:
    decoder.keep_neurons_({0: _kept(decoder)})


def _muted(decoder: Decoder) -> None:
    down = decoder.blocks[0].ffn.down
    down.own_()
    gone = torch.ones(down.inputs, dtype=torch.bool, device=decoder.device)
    gone[_kept(decoder)] = False
    down.weight[:, gone] = 0


def _layouts(family: Family) -> Iterator[Family]:
    """Yield the ways in which queries, keys and values of one matrix may lie."""
    yield family
    if len(family.attention_inputs) == 1:
        yield replace(family, layout="by group")
    if family.groups:  # an entry that this architecture does not read
        yield replace(family, groups="")
        yield replace(family, groups="", layout="by group")


def _attending(decoder: Decoder) -> Block:
    found = next((block for block in decoder.blocks if block.heads > 1), None)
    if found is None:
        raise InputError("no attention of several groups of heads")
    return found


def _headless(decoder: Decoder) -> None:
    block = _attending(decoder)
    decoder.keep_heads_({block.index: torch.arange(1, block.heads, device=decoder.device)})


def _headmuted(decoder: Decoder) -> None:
    attention = _attending(decoder).attention
    attention.output.own_()
    attention.output.weight[:, : attention.channels] = 0


def _with_readout(proofs: _Proofs, family: Family) -> Family:
    """Add how logits follow from what the LM head puts out."""
    model, head = proofs.model, proofs.model.get_output_embeddings()
    left, read = _between(proofs, Decoder(model, family))
    decoder = Decoder(model, family)
    with torch.no_grad():
        reached = decoder.norm(left)
        if not torch.allclose(reached, read, rtol=_CLOSE, atol=_CLOSE * float(read.abs().max())):
            proofs.refuse("what the LM head reads is not the last norm of what leaves the last block")
        plain = head(read).float()
    if _near(plain, proofs.expected):
        return family
    ratio = float((proofs.expected * plain).sum() / plain.square().sum())
    if _near(ratio * plain, proofs.expected):
        if name := _setting(model.config, ratio):
            return replace(family, logit_scale=name)
        if name := _setting(model.config, 1 / ratio):
            return replace(family, logit_divisor=name)
    for name, value in _numbers(model.config, "cap"):
        if value > 0 and _near(value * torch.tanh(plain / value), proofs.expected):
            return replace(family, logit_cap=name)
    proofs.refuse("its logits are neither a multiple of what the LM head puts out, nor capped")


@torch.no_grad()
def _between(proofs: _Proofs, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Return what leaves the last block, and what the LM head reads."""
    seen: list[Any] = [None, None]
    block, head = decoder.blocks[-1].module, decoder.model.get_output_embeddings()
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: seen.__setitem__(0, output)),
        head.register_forward_pre_hook(lambda _module, inputs: seen.__setitem__(1, inputs[0])),
    ]
    try:
        proofs.logits(proofs.model)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0], seen[1]


@torch.no_grad()
def _with_scale(proofs: _Proofs, family: Family) -> Family:
    """Add what attention and FFN are multiplied by before they are added to the residual stream."""
    if family.stream_norms or family.adds or not (family.attention and family.ffn):
        return family
    decoder = Decoder(proofs.model, family)
    block, put = decoder.blocks[0], dict[str, Tensor]()

    def keep(name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        put[name] = (output[0] if isinstance(output, tuple) else output).clone()  # some blocks add in place
        if not name:
            put["read"] = args[0] if args else kwargs["hidden_states"]

    names = {"": "", "attention": family.attention_after or family.attention, "ffn": family.ffn_after or family.ffn}
    handles = [
        block.module.get_submodule(path).register_forward_hook(partial(keep, name), with_kwargs=True)
        for name, path in names.items()
    ]
    try:
        proofs.logits(proofs.model)
    finally:
        for handle in handles:
            handle.remove()
    added, both = put[""] - put["read"], put["attention"] + put["ffn"]
    scale = float((added * both).sum() / both.square().sum())
    if not _near(scale * both, added):
        proofs.refuse("what a block adds to the residual stream is not the sum of its attention's and its FFN's output")
    if abs(scale - 1) < _CLOSE:
        return family
    name = _setting(proofs.model.config, scale)
    if not name:
        proofs.refuse(f"attention and FFN are multiplied by {scale:.4g}, which its configuration does not say")
    return replace(family, residual=name)


def _near(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() <= _CLOSE * two.abs().max())


def _numbers(config: Any, *parts: str) -> Iterator[tuple[str, float]]:
    """Yield a configuration's numbers whose names have one of some parts."""
    for name, value in config.to_dict().items():
        if isinstance(value, float | int) and not isinstance(value, bool) and any(part in name for part in parts):
            yield name, float(value)


def _setting(config: Any, value: float) -> str:
    """Return which of a configuration's factors a value is; empty where none is."""
    factors = _numbers(config, "scal", "multiplier", "factor")
    return next((name for name, said in factors if abs(said - value) <= _CLOSE * abs(value)), "")
