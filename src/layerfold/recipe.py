"""Recipes: what a study compares, typed, read from YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from layerfold import defaults
from layerfold.decoder import Decoder
from layerfold.errors import InputError, RecipeError, one_of
from layerfold.evaluators import EVALUATORS, Evaluator
from layerfold.hub import POCKET
from layerfold.methods import METHODS, Collapse, Merge, Method, Prune, Share
from layerfold.records import BASE_LABEL
from layerfold.recovery import RECOVERIES, Recovery
from layerfold.yamlfiles import read_yaml

DEFAULT_EVALUATORS = ("size", "perplexity", "latency", "generation")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


def _build(kind: str, registry: Mapping[str, type[Any]], name: Any, config: Any) -> Any:
    """Build a method or an evaluator from its name and the settings given for it."""
    if not isinstance(name, str) or name not in registry:
        raise InputError(f"unknown {kind} {one_of(str(name), registry)}")
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise InputError(f"{name}: {config!r}; accepted: settings, as {{key: value}}")
    accepted = [field.name for field in fields(registry[name]) if field.init]
    for key in config:
        if key not in accepted:
            raise InputError(f"{name}: unknown key {one_of(str(key), accepted)}")
    try:
        # From JSON types: a list is taken for a tuple, but 2.5 or "2" not for an integer.
        return TypeAdapter(registry[name]).validate_json(_to_json(config), strict=True)
    except ValidationError as error:
        raise InputError(f"{name}{_describe(error)}") from error


def _to_json(config: Any) -> bytes:
    return TypeAdapter(Any).dump_json(config)


@dataclass(frozen=True)
class Load:
    """A variant that somebody else made: any checkpoint, as DistilGPT-2.

    Attributes:
        model: see `hub.load`.
        revision: of a model on the Hub.
    """

    model: str
    revision: str | None = None
    name: ClassVar[str] = "load"

    def to_json(self) -> dict[str, Any]:
        """Return the settings."""
        return {"model": self.model, "revision": self.revision}


_SOURCES: dict[str, type[Any]] = {**METHODS, Load.name: Load}


def _variant(value: Any) -> Any:
    """Turn {label: L, merge: {...}} into {label: L, method: Merge(...)}; ``load`` takes a name as well."""
    if not isinstance(value, dict):
        return value
    names = [key for key in value if key != "label"]
    if len(names) != 1:
        raise InputError(
            f"keys {', '.join(map(str, value)) or 'none'}; accepted: label and one of {', '.join(sorted(_SOURCES))}"
        )
    name, config = names[0], value[names[0]]
    if name == Load.name and isinstance(config, str):
        config = {"model": config}
    rest = {"label": value["label"]} if "label" in value else {}
    return rest | {"method": _build("key or method", _SOURCES, name, config)}


def _evaluator(value: Any) -> Any:
    """Turn ``perplexity`` or {perplexity: {...}} into an evaluator."""
    if isinstance(value, dict):
        if len(value) != 1:
            raise InputError(f"{', '.join(map(str, value)) or 'none'}; accepted: one evaluator an entry")
        return _build("evaluator", EVALUATORS, *next(iter(value.items())))
    return _build("evaluator", EVALUATORS, value, {})


def _recovery(value: Any) -> Any:
    """Turn {distill: {tokens: 100000}} into a recovery."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError(f"{value!r}; accepted: one of {', '.join(sorted(RECOVERIES))}, with its settings")
    return build_recovery(*next(iter(value.items())))


def build_recovery(name: Any, settings: Any) -> Recovery:
    """Build a recovery from its name and settings.

    Raises:
        InputError: an unknown name or setting, or a value that is not accepted.
    """
    recovery: Recovery = _build("recovery", RECOVERIES, name, settings)
    return recovery


class Variant(_Strict):
    """One row of a study: a label and the method that makes it."""

    label: str = Field(min_length=1, max_length=60, pattern=r"^[^\x00-\x1f]+$")
    method: Any

    def to_json(self) -> dict[str, Any]:
        """Return the variant as recipes write it."""
        return {"label": self.label, self.method.name: _settings(self.method)}


class CalibrationText(_Strict):
    """The text that methods read activations from: the ``calibration`` split of a corpus.

    Attributes:
        corpus: None takes the one that fits the base.
        tokens: how many tokens of it.
    """

    corpus: str | None = None
    tokens: int = Field(default=defaults.CALIBRATION_TOKENS, ge=2)


class Recipe(_Strict):
    """What a study compares.

    Attributes:
        base: see `hub.load`.
        revision: of a base on the Hub.
        variants: the rows besides the base.
        evaluate: the columns, in order.
        calibration: see `CalibrationText`.
        recovery: how every row, the base too, is trained before it is measured again; None trains none.
        seed: orders the calibration and the training documents.
    """

    base: str = POCKET
    revision: str | None = None
    variants: list[Annotated[Variant, BeforeValidator(_variant)]]
    evaluate: list[Annotated[Any, BeforeValidator(_evaluator)]] = Field(
        default_factory=lambda: [default_evaluator(name) for name in DEFAULT_EVALUATORS], min_length=1
    )
    calibration: CalibrationText = CalibrationText()
    recovery: Annotated[Recovery | None, BeforeValidator(_recovery)] = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    def model_post_init(self, context: Any) -> None:
        """Check what no single field can."""
        for kind, names in (
            ("label", [variant.label for variant in self.variants]),
            ("evaluator", [evaluator.name for evaluator in self.evaluate]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise InputError(f"duplicate {kind} {twice[0]!r}")
        if any(variant.label == BASE_LABEL for variant in self.variants):
            raise InputError(f"label {BASE_LABEL!r} is the base row's, which is always there")

    def with_base(self, base: str, revision: str | None) -> Recipe:
        """Return this recipe for another base."""
        return self.model_copy(update={"base": base, "revision": revision})

    def with_corpus(self, name: str) -> Recipe:
        """Return this recipe with a corpus wherever it names none."""

        def named(settings: Any) -> Any:
            unnamed = "corpus" in getattr(settings, "__dataclass_fields__", {}) and settings.corpus is None
            return replace(settings, corpus=name) if unnamed else settings

        calibration = self.calibration.model_copy(update={"corpus": self.calibration.corpus or name})
        evaluate = [named(evaluator) for evaluator in self.evaluate]
        return self.model_copy(
            update={"evaluate": evaluate, "calibration": calibration, "recovery": named(self.recovery)}
        )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as it would be written with every default spelled out."""
        return {
            "base": self.base,
            "revision": self.revision,
            "variants": [variant.to_json() for variant in self.variants],
            "evaluate": [{evaluator.name: _settings(evaluator)} for evaluator in self.evaluate],
            "calibration": self.calibration.model_dump(),
            "recovery": None if self.recovery is None else {self.recovery.name: _settings(self.recovery)},
            "seed": self.seed,
        }


def _settings(configured: Any) -> dict[str, Any]:
    values = {field.name: getattr(configured, field.name) for field in fields(configured) if field.init}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def default_evaluator(name: str) -> Evaluator:
    """Return an evaluator as the default recipe sets it."""
    evaluator: Evaluator = _evaluator({name: {"limit_tokens": defaults.LIMIT_TOKENS} if name == "perplexity" else {}})
    return evaluator


def default_recipe(base: str = POCKET, decoder: Decoder | None = None) -> Recipe:
    """Return the published comparison: merged_n and compressed_n for n = 2, 4, 6, 8, 10, pruned_104M and shared_4x8.

    pruned_104M by the fraction of the parameters that this leaves of GPT-2's; shared_4x8 is the best window of four
    blocks with deltas of rank 8.

    Args:
        base: see `hub.load`.
        decoder: the base's, to leave out what it does not admit, as groups larger than its depth.
    """
    methods: list[tuple[str, type[Merge] | type[Collapse]]] = [("merged", Merge), ("compressed", Collapse)]
    variants = [
        Variant(label=f"{prefix}_{n}", method=method(n=n)) for prefix, method in methods for n in defaults.GROUP_SIZES
    ]
    variants.append(Variant(label="pruned_104M", method=Prune(nonzero=defaults.PRUNED)))
    variants.append(Variant(label="shared_4x8", method=Share(window="auto", k=4, rank=8)))
    if decoder is not None:
        variants = [variant for variant in variants if _admits(decoder, variant.method)]
    return Recipe.model_construct(
        base=base,
        revision=None,
        variants=variants,
        evaluate=[default_evaluator(name) for name in DEFAULT_EVALUATORS],
        calibration=CalibrationText(),
        recovery=None,
        seed=0,
    )


def _admits(decoder: Decoder, method: Method) -> bool:
    try:
        method.resolved(decoder)
    except InputError:
        return False
    return True


def read_recipe(source: Path | str | Mapping[str, Any]) -> Recipe:
    """Read a recipe from a YAML file or a mapping.

    Raises:
        RecipeError: it cannot be read, is not YAML, or does not validate.
    """
    if isinstance(source, Mapping):
        where, document = "the recipe", dict(source)
    else:
        where, document = f"recipe {str(source)!r}", read_yaml(Path(source), Recipe.model_fields)
    for key in document:
        if key not in Recipe.model_fields:
            raise RecipeError(f"{where}: unknown key {one_of(str(key), Recipe.model_fields)}")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_describe(error).lstrip('.: ')}") from error


def _describe(error: ValidationError) -> str:
    """Say the first of pydantic's errors in one line, with the place in the recipe."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    message = first["msg"].removeprefix("Value error, ")
    received = first["input"]
    shown = "" if first["type"] in ("value_error", "missing") else f" (received {received!r})"
    return f"{place}: {message}{shown}"
