"""Prune: weights become zeros, to a budget, and stay zeros; or whole neurons of FFNs, and heads of attentions, go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

from layerfold.calibration import Calibration
from layerfold.errors import InputError, one_of
from layerfold.methods.base import Method, Notes
from layerfold.methods.prune import neurons, units, weights
from layerfold.model.block import Projection
from layerfold.model.decoder import Decoder, Size

Criterion = Literal["magnitude", "wanda", "sparsegpt", "taylor", "published"]
Structure = Literal["unstructured", "2:4", "neurons", "neurons+heads"]
Scope = Literal["global", "matrix", "row"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
SCOPES: tuple[Scope, ...] = get_args(Scope)
PARTS = ("attention", "ffn", *weights.TABLES)

_MULTIPLE = 64
_DEFAULT_PARTS = "attention,ffn"
_OWN_SCOPE: dict[str, Scope] = {"magnitude": "global", "wanda": "row", "sparsegpt": "matrix", "published": "global"}
_SCOPES: dict[str, tuple[Scope, ...]] = {
    "magnitude": SCOPES,
    "wanda": SCOPES,
    "sparsegpt": ("matrix",),
    "taylor": ("global", "matrix"),
    "published": ("global",),
}
_OF_STRUCTURE: dict[str, Scope] = {"2:4": "row", "neurons": "matrix", "neurons+heads": "global"}
_SPEED = {
    "unstructured": "zeros make nothing faster on dense kernels; the compact checkpoint stores only what is kept",
    "2:4": "GPUs with sparse tensor cores (NVIDIA, compute capability 8.0 and above, half precision or int8) profit, "
    "through runtimes with kernels for it (PyTorch's semi-structured sparse tensors, cuSPARSELt, TensorRT, vLLM); "
    "dense kernels and CPUs do not",
    "neurons": "smaller matrices, which every kernel profits from",
    "neurons+heads": "smaller matrices, which every kernel profits from",
}


@dataclass(frozen=True, kw_only=True)
class Prune(Method):
    """Set weights to zero, or remove neurons and heads, to a budget.

    Weights that are zero stay zero. `nonzero` may be a number too. It is met exactly; by neurons to the nearest whole
    number of them, at what they hold on average; by neurons and heads it is not exceeded. `sparsity`, from 0 to below
    1, is the share of the neurons, or of the parameters of neurons and heads, where these go.

    ``magnitude`` reads the weights alone; ``wanda`` and ``sparsegpt`` read activations; ``taylor``, for neurons and
    heads, reads gradients; ``published`` is the magnitude over every ``nn.Linear``, which in a GPT-2 is the LM head
    alone, and with it the token embedding. ``2:4`` is two of every four neighbours in a row, which leaves half;
    ``neurons+heads`` ranks both together. The default scope is global for magnitude, rows for wanda, matrices for
    sparsegpt and for neurons (one FFN each), and global for neurons and heads.

    Attributes:
        nonzero: number of non-zero parameters that the whole model keeps, as ``104.69M``, or their percentage, as
            ``84.13%``.
        sparsity: instead of `nonzero`, the share of the weights in `parts` that becomes zero, as 0.3.
        criterion: which weights go first; ``wanda``, ``sparsegpt`` and ``taylor`` read calibration text.
        structure: remove single weights, two of every four, whole FFN neurons, or FFN neurons and attention heads.
        scope: where weights are compared: in the whole model, in each matrix, or in each row; by default as the
            criterion was published.
        parts: matrices to prune: some of ``attention``, ``ffn``, ``embeddings`` and ``head``, separated by commas.
        uniform: leave every block as many neurons, and as many heads where its configuration can say that, so that a
            dense checkpoint is as small as the model.
        multiple_of: with `uniform`, the number of neurons that an FFN keeps is a multiple of this.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015 (magnitude); Sun et
    al., 2023 (Wanda); Frantar and Alistarh, 2023 (SparseGPT); Molchanov et al., 2019 (Taylor).
    """

    nonzero: str | int | None = None
    sparsity: float | None = None
    criterion: Criterion = "magnitude"
    structure: Structure = "unstructured"
    scope: Scope | None = None
    parts: str = _DEFAULT_PARTS
    uniform: bool = False
    multiple_of: int = _MULTIPLE
    name: ClassVar[str] = "prune"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for kind, accepted in (("criterion", CRITERIA), ("structure", STRUCTURES)):
            if getattr(self, kind) not in accepted:
                raise InputError(f"{kind} {one_of(str(getattr(self, kind)), accepted)}")
        if self.structure == "2:4":
            if self.nonzero is not None or self.sparsity not in (None, 0.5):
                raise InputError(
                    f"nonzero {self.nonzero!r} and sparsity {self.sparsity} with structure 2:4, which leaves half; "
                    "accepted: neither"
                )
        elif (self.nonzero is None) == (self.sparsity is None):
            raise InputError(f"nonzero {self.nonzero!r} and sparsity {self.sparsity}; accepted: one of the two")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity}; accepted: from 0 to below 1")
        if self.nonzero is not None:
            parse_count("nonzero", self.nonzero)
        if (self.criterion == "taylor") != (self.structure == "neurons+heads") and self.structure != "neurons":
            raise InputError(
                f"criterion {self.criterion} with structure {self.structure}; accepted: taylor with neurons or "
                "neurons+heads, other criteria with unstructured, 2:4 or neurons"
            )
        self._check_scope()
        self._check_parts()
        if self.uniform and self.structure not in ("neurons", "neurons+heads"):
            raise InputError(f"uniform with structure {self.structure}; accepted: neurons, neurons+heads")
        if self.uniform and self.structure == "neurons" and self.scope == "global":
            raise InputError("uniform with scope global, which leaves some FFNs more neurons; accepted: matrix")
        if self.multiple_of < 1 or (self.multiple_of != _MULTIPLE and not self.uniform):
            raise InputError(f"multiple_of {self.multiple_of}; accepted: 1 or more, with uniform")

    def _check_scope(self) -> None:
        if self.scope is None:
            return
        if self.scope not in SCOPES:
            raise InputError(f"scope {one_of(self.scope, SCOPES)}")
        accepted: tuple[str, ...] = _SCOPES[self.criterion]
        if self.structure == "2:4":
            raise InputError(f"scope {self.scope!r} with structure 2:4, which chooses among four; accepted: none")
        if self.structure in ("neurons", "neurons+heads"):
            coarsest = ("global", "matrix") if self.structure == "neurons" else ("global",)
            accepted = tuple(each for each in accepted if each in coarsest)
        if self.scope not in accepted:
            raise InputError(
                f"scope {self.scope!r} for {self.criterion} of {self.structure}; accepted: {', '.join(accepted)}"
            )

    def _check_parts(self) -> None:
        chosen = self._parts
        for part in chosen:
            if part not in PARTS:
                raise InputError(f"part {one_of(part, PARTS)}")
        if len(set(chosen)) < len(chosen):
            raise InputError(f"parts {self.parts!r} name one twice")
        default = set(chosen) == set(_DEFAULT_PARTS.split(","))
        if self.criterion == "published" and (self.structure != "unstructured" or not default):
            raise InputError(
                "criterion published prunes every nn.Linear, unstructured; accepted: no structure, no parts"
            )
        if self.structure == "neurons" and not default and chosen != ("ffn",):
            raise InputError(f"parts {self.parts!r} with structure neurons; accepted: ffn, which has them")
        if self.structure == "neurons+heads" and not default:
            raise InputError(f"parts {self.parts!r} with structure neurons+heads; accepted: {_DEFAULT_PARTS}")
        if set(chosen) & set(weights.TABLES) and self.needs_calibration:
            raise InputError(f"parts {self.parts!r} with criterion {self.criterion}; accepted: attention, ffn")

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.parts.split(","))

    @property
    def _own_scope(self) -> str:
        if self.scope is not None:
            return self.scope
        if self.uniform:
            return "matrix"
        return _OF_STRUCTURE.get(self.structure) or _OWN_SCOPE[self.criterion]

    @property
    def needs_calibration(self) -> bool:
        """Whether the criterion reads activations, or gradients."""
        return self.criterion in ("wanda", "sparsegpt", "taylor")

    def check_repair(self, level: str) -> None:
        """Raise InputError for a repair that would fill zeros, or that the result does not admit."""
        if self.structure not in ("neurons", "neurons+heads"):
            raise InputError(
                f"repair {level!r} with structure {self.structure!r}, whose zeros it would fill; accepted: neurons, "
                "neurons+heads"
            )
        super().check_repair(level)

    @property
    def said(self) -> str:
        """The method in a phrase."""
        if self.sparsity is None:
            return super().said
        return f"prune {100 * self.sparsity:.0f}% of {self.structure.replace('+', ' and ')}"

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say how much is zero, or has gone, and what that makes faster."""
        if "zeros" in notes:
            parts = ", ".join(f"{100 * share:.1f}% of {part}" for part, share in notes["sparsity"].items())
            yield f"{notes['zeros']:,} of {notes['weights']:,} weights are zero: {parts}"
        if "removed" in resolved:
            kind, of = ("neurons",) * 2 if "neurons" in resolved else ("parameters", "parameters of neurons and heads")
            yield f"removed {resolved['removed']:,} of {resolved[kind]:,} {of}"
        if "heads_left" in notes:
            neurons, heads = sum(notes["neurons_left"]), sum(notes["heads_left"])
            yield f"{neurons:,} neurons and {heads:,} groups of heads are left"
        yield notes["speed"]

    def _matrices(self, decoder: Decoder) -> list[Projection]:
        if self.criterion == "published":
            return weights.linear_modules(decoder)
        return weights.matrices(decoder, self._parts)

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the configuration with the budget as a count: weights that are zero in the end, or neurons that go."""
        settings: dict[str, Any] = {"name": self.name, "criterion": self.criterion, "structure": self.structure}
        settings |= {"scope": self._own_scope}
        if self.uniform:
            settings |= {"uniform": True, "multiple_of": self.multiple_of}
        if self.structure == "neurons":
            removed, neurons = self._removed_neurons(decoder)
            return settings | {"neurons": neurons, "removed": removed}
        if self.structure == "neurons+heads":
            removed, parameters = self._removed_parameters(decoder)
            return settings | {"parameters": parameters, "removed": removed}
        found = self._matrices(decoder)
        zeros, total = self._zeros(decoder, found)
        return settings | {"parts": sorted({each.part for each in found}), "weights": total, "zeros": zeros}

    def settings(self) -> dict[str, Any]:
        """Return the settings, without those of a uniform width where there is to be none."""
        return self._apart(super().settings())

    def to_json(self) -> dict[str, Any]:
        """Return the method as recipes write it."""
        return {self.name: self._apart(super().to_json()[self.name])}

    def _apart(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings if self.uniform else {k: v for k, v in settings.items() if k not in ("uniform", "multiple_of")}

    def _zeros(self, decoder: Decoder, found: list[Projection]) -> tuple[int, int]:
        """How many of the weights are to be zero, and how many weights there are."""
        if not found:
            raise InputError(f"the model has no matrices to prune in parts {self.parts!r}")
        total, left = weights.sizes(found)
        if self.structure == "2:4":
            return weights.zeros_of_fours(found), total
        if self.sparsity is not None:
            return max(round(self.sparsity * total), total - left), total
        size = decoder.size()
        wanted = self._wanted(size, size.nonzero - left)
        return total + (size.nonzero - left) - wanted, total

    def _removed_neurons(self, decoder: Decoder) -> tuple[int, int]:
        """How many neurons go, and how many there are."""
        removed, total = self._any_neurons(decoder)
        if not self.uniform or not removed:
            return removed, total
        each, ffns = units.equal(decoder.d_ffn), len(decoder.blocks_by_ffn)
        left = (total - removed) // ffns // self.multiple_of * self.multiple_of
        if not left:
            raise InputError(
                f"{removed:,} of {total:,} neurons to remove, which leaves no {self.multiple_of} in each FFN; "
                f"accepted: at most {ffns * (each - self.multiple_of):,}, or a smaller multiple_of"
            )
        return total - left * ffns, total

    def _any_neurons(self, decoder: Decoder) -> tuple[int, int]:
        held, removable = neurons.sizes(decoder)
        total = len(held)
        if not total:
            raise InputError("the model has no FFN to remove neurons from")
        if self.criterion == "sparsegpt":
            neurons.check_refit(decoder)
        if self.sparsity is not None:
            removed = round(self.sparsity * total)
            if removed > removable:
                most = removable / total
                raise InputError(f"sparsity {self.sparsity} leaves an FFN without neurons; accepted: 0 ... {most:.6f}")
            return removed, total
        size, each = decoder.size(), float(held.double().mean())
        if float((held - each).clamp_min(0).sum()) > each:
            raise InputError(
                f"nonzero {self.nonzero!r} for neurons, some of which hold many more zeros than others; accepted: "
                "sparsity"
            )
        wanted = self._wanted(size, round(size.nonzero - removable * each))
        return round((size.nonzero - wanted) / each) if each else 0, total

    def _removed_parameters(self, decoder: Decoder) -> tuple[int, int]:
        """How many parameters go with neurons and heads, and how many go with all of them."""
        found = units.sublayers(decoder, nonzero=self.nonzero is not None)
        parameters, removable = sum(int(each.sizes.sum()) for each in found), units.removable(found)
        if not parameters:
            raise InputError("the model has no FFN and no attention to remove neurons and heads from")
        if self.sparsity is not None:
            removed = round(self.sparsity * parameters)
            if removed > removable:
                most = removable * 10**6 // parameters / 10**6  # rounded down, so that what is told is accepted
                raise InputError(f"sparsity {self.sparsity} leaves an FFN without neurons; accepted: 0 ... {most:.6f}")
            return removed, parameters
        size = decoder.size()
        return size.nonzero - self._wanted(size, size.nonzero - removable), parameters

    def _wanted(self, size: Size, least: int) -> int:
        """The budget as a count.

        Raises:
            InputError: it cannot be met.
        """
        kind, value = parse_count("nonzero", cast("str | int", self.nonzero))
        wanted = round(value * size.parameters) if kind == "fraction" else round(value)
        if not least <= wanted <= size.nonzero:
            raise InputError(
                f"nonzero {self.nonzero!r} is {wanted:,} parameters; accepted: {least:,} ... {size.nonzero:,}"
            )
        return wanted

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        if self.needs_calibration and calibration is None:
            other = "" if self.structure == "neurons+heads" else ", or take magnitude"
            raise InputError(f"criterion {self.criterion!r} needs calibration text; give a corpus{other}")
        text = calibration if self.needs_calibration else None
        notes: Notes = {"speed": _SPEED[self.structure]}
        if self.structure == "neurons":
            removed, _ = self._removed_neurons(decoder)
            neurons.narrow_(decoder, removed, self.criterion, self._own_scope, text)
            return notes | {"neurons_left": list(decoder.d_ffn)}
        if self.structure == "neurons+heads":
            assert text is not None
            removed, _ = self._removed_parameters(decoder)
            counted = self.nonzero is not None
            if self.uniform:
                units.thin_alike_(decoder, removed, text, self.multiple_of, nonzero=counted)
            else:
                units.thin_(decoder, removed, text, nonzero=counted)
            return notes | {"neurons_left": list(decoder.d_ffn), "heads_left": list(decoder.heads)}
        found = self._matrices(decoder)
        zeros, total = self._zeros(decoder, found)
        two_of_four = self.structure == "2:4"
        weights.zero_(decoder, found, None if two_of_four else zeros, self.criterion, self._own_scope, text)
        notes |= {"weights": total, "zeros": total - weights.sizes(found)[1], "sparsity": _by_part(found)}
        return notes | _warning(decoder, found)


def _by_part(found: list[Projection]) -> dict[str, float]:
    """What share of each part's weights is zero."""
    shares = {}
    for part in dict.fromkeys(each.part for each in found):
        total, left = weights.sizes([each for each in found if each.part == part])
        shares[part] = round(1 - left / total, 6)
    return shares


def _warning(decoder: Decoder, found: list[Projection]) -> Notes:
    embeddings, head = decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings()
    pruned = {each.matrix.module.weight for each in found}
    if embeddings.weight is head.weight and head.weight in pruned:
        return {"warning": "the token embedding and the LM head are one matrix: what is zeroed in it is lost to both"}
    if embeddings.weight in pruned or head.weight in pruned:
        return {"warning": "a row of an embedding or an LM head is all that stands for its token"}
    return {}


def parse_count(name: str, nonzero: str | int) -> tuple[Literal["count", "fraction"], float]:
    """Read a number of parameters, or a share of them.

    Raises:
        InputError: it is neither; the message has it under this name.
    """
    match = re.fullmatch(r"\s*(\d[\d,_]{0,30}(?:\.\d+)?)\s*([kKmMbB%]?)\s*", str(nonzero))
    if isinstance(nonzero, bool) or not match:
        raise InputError(f"{name} {nonzero!r}; accepted: a count, as 104690000 or 104.69M, or a percentage, as 84.13%")
    value = float(match[1].replace(",", "").replace("_", ""))
    if match[2] == "%":
        return "fraction", value / 100
    return "count", value * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]
