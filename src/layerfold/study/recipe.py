"""Recipes: what a study compares, typed, read from YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from layerfold import defaults
from layerfold.checkpoint.model import POCKET, Model, default_corpus
from layerfold.environment import VARIABLES
from layerfold.errors import InputError, RecipeError, one_of
from layerfold.evaluators import EVALUATORS
from layerfold.evaluators.generation import PROMPTS
from layerfold.methods import METHODS, Method, Steps
from layerfold.model.decoder import Decoder
from layerfold.records import BASE_LABEL
from layerfold.recovery import RECOVERIES, Recovery
from layerfold.repair.repair import check_level
from layerfold.settings import build, describe, read_yaml, settings_of
from layerfold.study.rows import Budgeted, Built, Load, Row, Student, Trained

_EXTENDS = "extends"
_BESIDE = ("label", "repair", "recovery")
_ROWS: dict[str, type[Row]] = {each.name: each for each in (Load, Student, Budgeted)}

DEFAULT_EVALUATORS = ("size", {"perplexity": {"limit_tokens": defaults.LIMIT_TOKENS}}, "latency", "generation")

_PUBLISHED = [
    *({"label": f"merged_{n}", "merge": {"n": n}} for n in defaults.GROUP_SIZES),
    *({"label": f"compressed_{n}", "collapse": {"n": n}} for n in defaults.GROUP_SIZES),
    # The fraction of the parameters that the published model leaves of GPT-2's.
    {"label": "pruned_104M", "prune": {"nonzero": defaults.PRUNED}},
    {"label": "shared_4x8", "share": {"window": "auto", "k": 4, "rank": 8}},
]
_FITTED = [
    {"label": f"{label}_{n}_fitted", method: {"n": n, "average": "fitted"}}
    for label, method in (("merged", "merge"), ("compressed", "collapse"))
    for n in (2, 4)
]
_REPAIRED = {"label": "repaired_drop_6", "drop": {"every": 2}, "repair": "refit+attention"}
_DISTILLED = {
    **_REPAIRED,
    "label": "distilled_drop_6",
    "recovery": {"distill": {"tokens": 12_288, "learning_rate": 3e-4}},
}
_DEMO = {"merged_2", "compressed_2", "pruned_104M", "shared_4x8"}
_PLANNED = {"label": "planned_82M", "plan": {"parameters": defaults.PLANNED}}
_DISTILGPT2 = {"gpt2": "distilgpt2", "openai-community/gpt2": "distilbert/distilgpt2"}

_FEW_PROMPTS = {"generation": {"prompts": [*PROMPTS[:3]]}}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # A row of each method on little text, in minutes.
    "demo": {
        "variants": [*(each for each in _PUBLISHED if each["label"] in _DEMO), _REPAIRED, _DISTILLED],
        "evaluate": ["size", {"perplexity": {"limit_tokens": 16_384}}, {"latency": {"rounds": 6}}, _FEW_PROMPTS],
        "calibration": {"tokens": 8_192, "repair_tokens": 8_192},
    },
    # The published comparison, averages that are fitted instead, half of the blocks with a repair, and a plan; nothing
    # trained.
    "published": {"variants": [*_PUBLISHED, *_FITTED, _REPAIRED, _PLANNED], "evaluate": list(DEFAULT_EVALUATORS)},
    # All of the published study: a distilled model beside the others, every row trained alike, and all the tasks. IMDb
    # takes most of the time, so each row's classifier is trained on half of the default's texts.
    "full": {
        "variants": [{"label": "distilled", "student": {"published": _DISTILGPT2}}, *_PUBLISHED],
        "evaluate": [*DEFAULT_EVALUATORS, {"imdb": {"train_rows": 512}}, "rouge"],
        "recovery": {"finetune": {"tokens": 24_576}},
    },
}


class Strict(BaseModel):
    """Part of a recipe: what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Variant(Strict):
    """One row of a study: a label, what makes it, and the repair and the recovery that follow.

    Attributes:
        method: a `Method`, or a row of another kind with its settings, as `Load`.
        recovery: how this row is trained; None trains it only where the recipe trains all rows.
    """

    label: str = Field(min_length=1, max_length=60, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    method: Any
    repair: Any = "none"
    recovery: Annotated[Recovery | None, BeforeValidator(lambda value: _recovery(value))] = None

    def model_post_init(self, context: Any) -> None:
        """Check that the method admits the repair."""
        check_level(self.repair, self.method)

    @property
    def row(self) -> Row:
        """What the study makes of it."""
        row: Row = Built(self.method, self.repair) if isinstance(self.method, Method) else self.method
        return row if self.recovery is None else Trained(row, self.recovery)

    def for_base(self, base: str) -> Variant:
        """Return this variant, or what takes its place for a base."""
        row = self.row.for_base(base)
        if row == self.row:
            return self
        return self.model_copy(update={"method": row.row if isinstance(row, Trained) else row})

    def to_json(self) -> dict[str, Any]:
        """Return the variant as recipes write it."""
        repair = {} if self.repair == "none" else {"repair": self.repair}
        return {"label": self.label, **self.row.to_json(), **repair}


def _variant(value: Any) -> Any:
    """Turn {label: L, merge: {...}} into {label: L, method: Merge(...)}; ``load`` takes a name as well."""
    if not isinstance(value, dict):
        return value
    names = [key for key in value if key not in _BESIDE]
    if len(names) != 1:
        raise InputError(
            f"keys {', '.join(map(str, value)) or 'none'}; accepted: label, repair, recovery and one of "
            f"{', '.join(sorted([*METHODS, *_ROWS, Steps.name]))}"
        )
    name, config = names[0], value[names[0]]
    if name == Load.name and isinstance(config, str):
        config = {"model": config}
    made = _steps(config) if name == Steps.name else build("key or method", {**METHODS, **_ROWS}, name, config)
    return {key: value[key] for key in _BESIDE if key in value} | {"method": made}


def _steps(config: Any) -> Steps:
    """Turn [{drop: {...}}, {prune: {...}}] into steps."""
    if not isinstance(config, list) or not all(isinstance(each, dict) and len(each) == 1 for each in config):
        raise InputError("steps; accepted: a list of methods, each with its settings, as - drop: {blocks: 3}")
    return Steps(tuple(build("method", METHODS, *next(iter(each.items()))) for each in config))


def _evaluator(value: Any) -> Any:
    """Turn ``perplexity`` or {perplexity: {...}} into an evaluator."""
    if isinstance(value, dict):
        if len(value) != 1:
            raise InputError(f"{', '.join(map(str, value)) or 'none'}; accepted: one evaluator an entry")
        return build("evaluator", EVALUATORS, *next(iter(value.items())))
    return build("evaluator", EVALUATORS, value, {})


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
    recovery: Recovery = build("recovery", RECOVERIES, name, settings)
    return recovery


class CalibrationText(Strict):
    """The text that methods read activations from: the ``calibration`` split of a corpus.

    Attributes:
        corpus: None takes the one that fits the base.
        tokens: how many tokens of it.
        repair_tokens: how many a repair is fitted to.
    """

    corpus: str | None = None
    tokens: int = Field(default=defaults.CALIBRATION_TOKENS, ge=2)
    repair_tokens: int = Field(default=defaults.REPAIR_TOKENS, ge=2)


class Recipe(Strict):
    """What a study compares.

    Attributes:
        base: see `load`.
        revision: of a base on the Hub.
        device, dtype, offload: where and in what all models compute, and whether their weights wait in files: see
            `load`. None takes what the command is told.
        variants: the rows besides the base.
        evaluate: the columns, in order.
        calibration: see `CalibrationText`.
        recovery: how every row, the base too, is trained before it is measured again; None trains none.
        seed: orders the calibration and the training documents, and whatever else is drawn.
        seeds: in its place, several: all that depends on the seed is done with each, and the figures are the means.
    """

    base: str = POCKET
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    variants: list[Annotated[Variant, BeforeValidator(_variant)]]
    evaluate: list[Annotated[Any, BeforeValidator(_evaluator)]] = Field(
        default_factory=lambda: [_evaluator(each) for each in DEFAULT_EVALUATORS], min_length=1
    )
    calibration: CalibrationText = CalibrationText()
    recovery: Annotated[Recovery | None, BeforeValidator(_recovery)] = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(default=None, min_length=1)

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
        for evaluator in self.evaluate:
            taken = set(getattr(evaluator, "baseline_labels", ())) & {variant.label for variant in self.variants}
            if taken:
                raise InputError(f"label {min(taken)!r} is that of a baseline row of {evaluator.name}")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds {self.seeds}; accepted: each once")
        if self.seeds is not None and "seed" in self.model_fields_set:
            raise InputError("seed and seeds; accepted: one of the two")

    def with_seed(self, seed: int) -> Recipe:
        """Return this recipe with one seed, which its evaluators have too where they name none."""
        drawing = [each for each in self.evaluate if getattr(each, "seed", 0) is None]
        evaluate = [replace(each, seed=seed) if each in drawing else each for each in self.evaluate]
        return self.model_copy(update={"seed": seed, "seeds": None, "evaluate": evaluate})

    def with_base(self, base: str, revision: str | None) -> Recipe:
        """Return this recipe for another base."""
        return self.model_copy(update={"base": base, "revision": revision})

    def for_base(self, base: Model) -> Recipe:
        """Return this recipe with what fits a base wherever it names no text, and a published student where one is."""
        name = default_corpus(base)

        def named(settings: Any) -> Any:
            names = getattr(settings, "__dataclass_fields__", {})
            if "corpus" in names and settings.corpus is None:
                return replace(settings, corpus=name)
            return replace(settings, data=settings.default_data(base)) if _lacks_data(settings) else settings

        calibration = self.calibration.model_copy(update={"corpus": self.calibration.corpus or name})
        return self.model_copy(
            update={
                "variants": [variant.for_base(self.base) for variant in self.variants],
                "evaluate": [named(evaluator) for evaluator in self.evaluate],
                "calibration": calibration,
                "recovery": named(self.recovery),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as it would be written with every default spelled out."""
        return {
            "base": self.base,
            "revision": self.revision,
            **{name: value for name in VARIABLES if (value := getattr(self, name)) is not None},
            "variants": [variant.to_json() for variant in self.variants],
            "evaluate": [{evaluator.name: settings_of(evaluator)} for evaluator in self.evaluate],
            "calibration": self.calibration.model_dump(),
            "recovery": None if self.recovery is None else {self.recovery.name: settings_of(self.recovery)},
            **({"seed": self.seed} if self.seeds is None else {"seeds": self.seeds}),
        }


def _lacks_data(settings: Any) -> bool:
    return hasattr(settings, "default_data") and settings.data is None


def default_recipe(base: str = POCKET, decoder: Decoder | None = None, preset: str = "demo") -> Recipe:
    """Return one of `PRESETS`: ``demo``, ``published`` or ``full``.

    The published rows are merged_n and compressed_n for n = 2, 4, 6, 8, 10, pruned_104M, by the fraction of the
    parameters that this leaves of GPT-2's, and shared_4x8, the best window of four blocks with deltas of rank 8.
    ``published`` also has groups of two and four with fitted averages, repaired_drop_6, every second block, repaired,
    and planned_82M. ``full`` also has a student, and trains all rows.
    ``demo`` has one row of each method, and distilled_drop_6: every second block, repaired and then distilled.

    Args:
        base: see `load`.
        decoder: the base's, to leave out what it does not admit, as groups larger than its depth.

    Raises:
        InputError: no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown preset {one_of(preset, PRESETS)}")
    recipe = read_recipe({**PRESETS[preset], "base": base})
    if decoder is None:
        return recipe
    return recipe.model_copy(update={"variants": [each for each in recipe.variants if _admits(decoder, each)]})


def _admits(decoder: Decoder, variant: Variant) -> bool:
    try:
        variant.row.resolved(decoder)
    except InputError:
        return False
    return True


def read_recipe(source: Path | str | Mapping[str, Any]) -> Recipe:
    """Read a recipe from a YAML file or a mapping.

    ``extends`` names a preset, or another file beside this one, whose keys hold where this one gives none.

    Raises:
        RecipeError: it cannot be read, is not YAML, does not validate, or extends itself.
    """
    where = _name(source)
    try:
        return Recipe.model_validate(_extended(source, ()))
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe(error).lstrip('.: ')}") from error


def _name(source: Path | str | Mapping[str, Any]) -> str:
    return "the recipe" if isinstance(source, Mapping) else f"recipe {str(source)!r}"


def _extended(source: Path | str | Mapping[str, Any], seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe's document with that of what it extends under it."""
    where, accepted = _name(source), [*Recipe.model_fields, _EXTENDS]
    if isinstance(source, Mapping):
        document, folder = dict(source), Path()
    else:
        path = Path(source)
        if path.resolve() in seen:
            raise RecipeError(f"{where}: {_EXTENDS} comes back to {str(source)!r}")
        seen, folder = (*seen, path.resolve()), path.parent
        document = read_yaml(path, accepted)
    for key in document:
        if key not in accepted:
            raise RecipeError(f"{where}: unknown key {one_of(str(key), accepted)}")
    if _EXTENDS not in document:
        return document
    other = document.pop(_EXTENDS)
    if not isinstance(other, str) or (other not in PRESETS and Path(other).suffix not in (".yaml", ".yml")):
        raise RecipeError(f"{where}: {_EXTENDS} {one_of(str(other), [*PRESETS, 'a .yaml file'])}")
    under = dict(PRESETS[other]) if other in PRESETS else _extended(folder / other, seen)
    if {"seed", "seeds"} & document.keys():
        under = {key: value for key, value in under.items() if key not in ("seed", "seeds")}
    return under | document
