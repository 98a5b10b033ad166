"""A device that every machine has: tensors that say they are on a GPU, held and computed by the processor.

What meets a tensor of the processor fails as it would on a GPU, and so does what asks for numpy. So the suite finds
where devices meet on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")

_PUT = {"index_put", "index_put_", "_index_put_impl_"}
_MAY_MEET = {"index", "copy_", "_to_copy"}
"""Operations that take tensors of the processor beside those of a GPU: indices, and what copies."""


class Elsewhere(Tensor):
    """A tensor that says it is on a GPU. torch's own code takes it for one without values, which needs no device."""

    held: Tensor
    at = DEVICE
    """Where it is: on the processor while its weights wait there."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **layout)
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return self.at

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        made: Any = Elsewhere(self.held.clone())
        made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        made.at = self.at
        memo[id(self)] = made
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        if name in _PUT:  # indices may be of the processor, values may not
            tensors = [args[0], args[2]]
        apart = [each for each in tensors if each.device != DEVICE and each.dim()]
        if apart and len(apart) < len(tensors) and name not in _MAY_MEET:
            raise RuntimeError(f"{func}: tensors on cpu and {DEVICE}: {[tuple(each.shape) for each in apart]}")
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type != "cpu":
            kwargs["device"] = _CPU
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if tensors and all(each.device != DEVICE for each in tensors):
            return found  # weights that wait are tensors of the processor
        if name == "_local_scalar_dense" or (wanted is not None and torch.device(wanted).type == "cpu"):
            return found
        if name == "copy_" and args[0].device != DEVICE:
            return args[0]
        made = tree_map(lambda each: Elsewhere(each) if isinstance(each, Tensor) else each, found)
        return return_and_correct_aliasing(func, args, kwargs, made)


def _held(each: Any) -> Any:
    return each.held if isinstance(each, Elsewhere) else each


class elsewhere(TorchFunctionMode):
    """Lets tensors be made on, and moved to, that device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            like = next((each for each in args[1:] if isinstance(each, Elsewhere)), None)
            rest = [each for each in args[1:] if not _is_gpu(each) and not isinstance(each, Elsewhere)]
            options = {name: each for name, each in kwargs.items() if not _is_gpu(each)}
            if like is not None:
                rest.append(like.dtype)
            if like is not None or len(rest) < len(args) - 1 or len(options) < len(kwargs):
                moved = torch.Tensor.to(args[0], *rest, **options) if rest or options else args[0]
                return moved if moved.device == DEVICE else Elsewhere(moved.detach().clone())
        elif func is nn.functional.scaled_dot_product_attention and isinstance(args[0], Elsewhere):
            return _attention(*args, **kwargs)
        elif func is torch.Tensor.__setitem__ and isinstance(args[0], Elsewhere) and not isinstance(args[2], Tensor):
            # torch makes a tensor of a number itself.
            return func(args[0], args[1], Elsewhere(torch.tensor(args[2], dtype=args[0].dtype)))
        elif func is torch.where and isinstance(args[0], Elsewhere):
            args = tuple(torch.tensor(each) if isinstance(each, int | float) else each for each in args)
        elif func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        elif _is_gpu(kwargs.get("device")) and not any(isinstance(each, Elsewhere) for each in args):
            return Elsewhere(func(*args, **{**kwargs, "device": _CPU}))
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention written out: torch's own makes its mask where no tensor of ours is seen."""
    assert dropout_p == 0
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(repeats, -3) for each in (key, value))
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = Elsewhere(torch.ones(logits.shape[-2:], dtype=torch.bool).tril())
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
    return logits.softmax(-1).nan_to_num() @ value  # nothing is read where all is masked


def _is_gpu(each: Any) -> bool:
    return isinstance(each, torch.device | str) and str(each).startswith("cuda")


def put_(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor of this kind other values, there or on the processor: what `offload.put_` does to real ones."""
    if not isinstance(tensor, Elsewhere):
        tensor.data = values
        return
    tensor.held, tensor.at = (values.held, DEVICE) if isinstance(values, Elsewhere) else (values, _CPU)


def adopted(module: nn.Module) -> nn.Module:
    """Make tensors of this kind, on the processor, of a module's parameters that are plain: `put_` can move them."""
    known: dict[int, Any] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and not isinstance(parameter, Elsewhere):
                made: Any = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
                made.at = _CPU
                each._parameters[name] = known.setdefault(id(parameter), made)
    return module


def moved(model: nn.Module) -> nn.Module:
    """Move a model there, in place; what is tied stays tied."""
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}  # kept, so that no id is another's
    known: dict[int, Any] = {
        key: nn.Parameter(Elsewhere(each.detach()), each.requires_grad)
        if isinstance(each, nn.Parameter)
        else Elsewhere(each)
        for key, each in tensors.items()
    }
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, each in place.items():
                if each is not None:
                    place[name] = known[id(each)]
    return model
