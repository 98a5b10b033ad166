"""The row of an architecture that has none, read off a loaded model and proved on it.

One forward pass is traced: which modules run in the first block, in which order, on which tensors. That says where
attention and FFN are, which matrices write into the residual stream, and what the norms read. Nothing is believed that
the model itself does not confirm: see `prove`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from layerfold.errors import ModelError, first_line
from layerfold.model.decoder import Decoder
from layerfold.model.families import FAMILIES, Family, remember_
from layerfold.model.matrix import is_matrix
from layerfold.model.proving import proved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "hidden_dim")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_COUNTS = {
    "num_heads": "queries",
    "num_attention_heads": "queries",
    "n_heads": "queries",
    "n_head": "queries",
    "num_key_value_heads": "groups",
    "num_kv_heads": "groups",
}
"""What attentions call their numbers of heads."""
_TOKENS = 8


@dataclass(frozen=True)
class _Run:
    """A module's run.

    Attributes:
        path: from the block, or from the causal LM.
        read: the first tensor that it was given; `given`: how many.
        put: the first tensor that it returned.
    """

    path: str
    module: nn.Module
    read: Tensor
    given: int
    put: Tensor


def view(model: PreTrainedModel) -> Decoder:
    """Return a view of a model, whose row is inferred where its architecture has none.

    Raises:
        ModelError: it cannot be inferred.
    """
    if model.config.model_type not in FAMILIES and type(model).__name__.endswith("ForCausalLM"):
        remember_(model, inferred(model))
    return Decoder(model)


def inferred(model: PreTrainedModel) -> Family:
    """Return the row of a model whose architecture has none, proved on the model.

    Raises:
        ModelError: it is not a decoder of blocks, each of which adds to a residual stream, or that cannot be proved.
    """
    was = model.training
    model.eval()
    try:
        return proved(model, read_off(model))
    except ModelError:
        raise
    except Exception as error:  # of the model's own code, on what no known architecture does
        return _refuse(model.config.model_type, f"{type(error).__name__}: {first_line(error)[:120]}")
    finally:
        model.train(was)


def read_off(model: PreTrainedModel) -> Family:
    """Return what a trace of one forward pass says, which nothing has proved yet.

    Raises:
        ModelError: it does not look like a decoder of blocks.
    """
    kind = model.config.model_type
    path, blocks = _blocks(model)
    ids = torch.arange(_TOKENS, device=model.device)[None] % int(model.config.vocab_size)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"unsupported architecture {kind!r}: it has no LM head")
    inside, outside = _traced(model, path, blocks[0], ids)
    last = outside[f"{path}.{len(blocks) - 1}"]
    family = Family(
        blocks=path,
        readout=_readout(model, outside, last.put, outside[_path_of(model, head)].read),
        depth=_named(model.config, _DEPTHS, len(blocks)) or _refuse(kind, "its configuration says no depth"),
        tuples=isinstance(_returned(model, blocks[0], ids), tuple),
    )
    return _with_sublayers(model, family, inside, blocks[0])


def _refuse(kind: str, why: str) -> NoReturn:
    raise ModelError(f"unsupported architecture {kind!r}, and it cannot be inferred: {why}")


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of blocks, the one with most parameters whose entries are of few kinds, and its path."""
    lists = [(path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)]
    sizes = {path: sum(weight.numel() for weight in each.parameters()) for path, each in lists}
    if not lists:
        _refuse(model.config.model_type, "no list of blocks")
    path, found = max(lists, key=lambda each: (sizes[each[0]], -len(each[0])))
    return path, found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


@torch.no_grad()
def _traced(
    model: PreTrainedModel, path: str, block: nn.Module, ids: Tensor
) -> tuple[dict[str, _Run], dict[str, _Run]]:
    """Run a model; return the runs inside its first block and those of all modules, by path, in order of their end."""
    inside: dict[str, _Run] = {}
    outside: dict[str, _Run] = {}
    with ExitStack() as stack:
        for into, root in ((inside, block), (outside, model)):
            for name, module in root.named_modules():

                def hook(
                    module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, into: Any = into
                ) -> None:
                    read = list(_tensors((*args, *(kwargs.get(key) for key in ("hidden_states", "x", "input")))))
                    put = next(_tensors(output if not hasattr(output, "to_tuple") else output.to_tuple()), None)
                    if read and put is not None:
                        into[name] = _Run(name, module, read[0], len(list(_tensors(args))), put)

                stack.enter_context(_removed(module.register_forward_hook(hook, with_kwargs=True)))
        model(input_ids=ids, use_cache=False)
    return inside, outside


class _removed:
    """Removes a hook at the end."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@torch.no_grad()
def _returned(model: PreTrainedModel, block: nn.Module, ids: Tensor) -> Any:
    found: list[Any] = []
    with _removed(block.register_forward_hook(lambda _module, _inputs, output: found.append(output))):
        model(input_ids=ids, use_cache=False)
    return found[0]


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return one.data_ptr() == two.data_ptr() and one.numel() == two.numel()


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(path for path, module in model.named_modules() if module is wanted))


def _named(config: Any, names: tuple[str, ...], value: int) -> str:
    """Return which of a configuration's entries has a value; empty where none has."""
    return next((name for name in names if getattr(config, name, None) == value), "")


def _readout(model: PreTrainedModel, outside: dict[str, _Run], left: Tensor, wanted: Tensor) -> tuple[str, ...]:
    """Return the modules that lead from what leaves the last block to what the LM head reads."""
    found: list[str] = []
    while not _same(left, wanted):
        following = [run for run in outside.values() if _same(run.read, left) and not _same(run.put, left)]
        if not following or len(found) > 3:
            _refuse(model.config.model_type, "what stands between the last block and the LM head is no row of modules")
        run = min(following, key=lambda each: len(each.path))  # the outermost
        found.append(run.path)
        left = run.put
    return tuple(found)


def _with_sublayers(model: PreTrainedModel, family: Family, inside: dict[str, _Run], block: nn.Module) -> Family:
    """Add what is inside a block."""
    attention = next((name for name, child in block.named_children() if _attends(name, child)), "")
    matrices = [run for run in inside.values() if is_matrix(run.module)]
    mine = [run for run in matrices if attention and run.path.startswith(f"{attention}.")]
    theirs = [run for run in matrices if run not in mine]
    family = replace(
        family, attention=attention, attention_output="", attention_inputs=(), ffn="", up="", down="", gate=None
    )
    if attention:
        family = _with_attention(model, family, mine, block)
    family, first = _with_ffn(model, family, inside, theirs, block)
    others = list(model.get_submodule(family.blocks).children())
    if family.down and not all(_has(each, family.ffn, (family.up, family.down)) for each in others):
        family = replace(family, up="", gate=None, down="")  # other blocks have FFNs of another kind
    there = [each for each in others if hasattr(each, attention)] if attention else []
    if family.attention_output and not all(_has(each, attention, (family.attention_output,)) for each in there):
        family = replace(family, attention_inputs=(), attention_output="")
    return _with_norms(family, inside, first)


def _has(block: nn.Module, part: str, names: tuple[str, ...]) -> bool:
    """Whether a block's part has matrices of these names."""
    known = dict(block.named_modules())
    found = [known.get(f"{part}.{name}" if part else name) for name in names]
    return all(each is not None and is_matrix(each) for each in found)


def _with_attention(model: PreTrainedModel, family: Family, runs: list[_Run], block: nn.Module) -> Family:
    """Add an attention's matrices, where they are those of one."""
    width, start = int(model.config.hidden_size), f"{family.attention}."
    outputs = [run for run in runs if run.put.shape[-1] == width]
    inputs = [run for run in runs if run is not outputs[-1] and run.read.shape[-1] == width] if outputs else []
    if len(inputs) not in (1, 3):
        return family
    return replace(
        family,
        attention_inputs=tuple(run.path.removeprefix(start) for run in inputs),
        attention_output=outputs[-1].path.removeprefix(start),
        layout="apart" if len(inputs) > 1 else "stacked",
        groups=next((name for name in _GROUPS if getattr(model.config, name, None)), ""),
        counts=_counts(block, family.attention, outputs[-1].path),
    )


def _with_ffn(
    model: PreTrainedModel, family: Family, inside: dict[str, _Run], runs: list[_Run], block: nn.Module
) -> tuple[Family, Tensor | None]:
    """Add an FFN, with its matrices where it is plain or gated; return what it reads as well."""
    width = int(model.config.hidden_size)
    others = [
        name
        for name, child in block.named_children()
        if name != family.attention and next(child.parameters(), None) is not None
    ]
    apart = [name for name in others if "norm" not in type(block.get_submodule(name)).__name__.lower()]
    if len(apart) == 1 and apart[0] in inside:  # a module of its own, of whatever kind
        family = replace(family, ffn=apart[0], adds=inside[apart[0]].given > 1)
    read = inside[family.ffn].read if family.ffn else None
    if not 2 <= len(runs) <= 3 or runs[-1].put.shape[-1] != width:
        return family, read
    *first, down = runs
    inner = down.read.shape[-1]
    parents = {run.path.rpartition(".")[0] for run in runs}
    wide = [run.put.shape[-1] for run in first]
    if parents != {family.ffn} or any(run.read.shape[-1] != width for run in first):
        return family, read
    if wide not in ([inner], [2 * inner], [inner, inner]):
        return family, read
    names = [run.path.removeprefix(f"{family.ffn}.") if family.ffn else run.path for run in runs]
    gate = names[0] if wide == [2 * inner] else names[1] if len(first) == 2 else None
    between = (run.path for run in inside.values() if run.path and _same(run.put, down.read))
    act = "" if family.ffn else next(between, "")
    said = _named(model.config, _WIDTHS, inner)
    if not said and inner == 4 * width:
        said = next((name for name in _WIDTHS if getattr(model.config, name, 0) is None), "")
    return replace(family, up=names[0], gate=gate, down=names[-1], act=act, d_ffn=said), first[0].read


def _attends(name: str, module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower() or "attn" in name.lower()
    return named and any(map(is_matrix, module.modules()))


def _counts(block: nn.Module, attention: str, output: str) -> tuple[tuple[str, str], ...]:
    holder = output.rpartition(".")[0]
    inner = holder.removeprefix(attention).removeprefix(".")
    module = block.get_submodule(holder)
    there = [(name, which) for name, which in _COUNTS.items() if isinstance(getattr(module, name, None), int)]
    return tuple((f"{inner}.{name}" if inner else name, which) for name, which in there)


def _with_norms(family: Family, inside: dict[str, _Run], read: Tensor | None) -> Family:
    """Add the norms: those that attention and FFN read, those of what they put out, and what both add to the stream.

    Args:
        read: what the FFN reads.
    """
    parts = [path for path in (family.attention, family.ffn) if path]
    norms = [
        run
        for run in inside.values()
        if run.path
        and "norm" in type(run.module).__name__.lower()
        and not any(run.path.startswith(f"{path}.") for path in parts)
    ]

    def of(which: str, tensor: Tensor | None) -> str:
        same = (run.path for run in norms if tensor is not None and _same(getattr(run, which), tensor))
        return next(same, "")

    attention = inside.get(family.attention) if family.attention else None
    ffn = inside.get(family.ffn or family.down) if family.ffn or family.down else None
    before, own = of("put", attention.read if attention else None), of("put", read)
    return replace(
        family,
        attention_norm=before,
        attention_after="" if family.adds else of("read", attention.put if attention else None),
        ffn_norm="" if own == before else own,
        ffn_after=of("read", ffn.put if ffn else None),
        stream_norms=bool(of("put", inside[""].put)),
    )
