"""Recipes: what a study compares, typed, read from YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from layerfold import defaults
from layerfold.checkpoint.model import POCKET, Model, default_corpus
from layerfold.errors import InputError, RecipeError, one_of
from layerfold.evaluators import EVALUATORS
from layerfold.methods import Method, Steps
from layerfold.model.decoder import Decoder
from layerfold.records import BASE_LABEL
from layerfold.recovery import RECOVERIES, Recovery
from layerfold.settings import build, describe, read_yaml, settings_of
from layerfold.study.presets import DEFAULT_EVALUATORS, PRESETS
from layerfold.study.rows import Load, Planned, Strict, Student, Variant, read_row

_EXTENDS = "extends"


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
        base: see `hub.load`.
        revision: of a base on the Hub.
        variants: the rows besides the base.
        evaluate: the columns, in order.
        calibration: see `CalibrationText`.
        recovery: how every row, the base too, is trained before it is measured again; None trains none.
        seed: orders the calibration and the training documents, and whatever else is drawn.
        seeds: in its place, several: all that depends on the seed is done with each, and the figures are the means.
    """

    base: str = POCKET
    revision: str | None = None
    variants: list[Annotated[Variant, BeforeValidator(read_row)]]
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
        variants = [
            variant.model_copy(update={"method": variant.method.source(self.base)})
            if isinstance(variant.method, Student)
            else variant
            for variant in self.variants
        ]
        return self.model_copy(
            update={
                "variants": variants,
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
            "variants": [variant.to_json() for variant in self.variants],
            "evaluate": [{evaluator.name: settings_of(evaluator)} for evaluator in self.evaluate],
            "calibration": self.calibration.model_dump(),
            "recovery": None if self.recovery is None else {self.recovery.name: settings_of(self.recovery)},
            **({"seed": self.seed} if self.seeds is None else {"seeds": self.seeds}),
        }


def _lacks_data(settings: Any) -> bool:
    return hasattr(settings, "default_data") and settings.data is None


def default_recipe(base: str = POCKET, decoder: Decoder | None = None, preset: str = "default") -> Recipe:
    """Return one of `PRESETS`: ``default``, the published comparison, or ``full``, all of the published study.

    That is merged_n and compressed_n for n = 2, 4, 6, 8, 10, pruned_104M, by the fraction of the parameters that this
    leaves of GPT-2's, and shared_4x8, the best window of four blocks with deltas of rank 8. The default has
    repaired_drop_6 as well: every second block, repaired.

    Args:
        base: see `hub.load`.
        decoder: the base's, to leave out what it does not admit, as groups larger than its depth.

    Raises:
        InputError: no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown preset {one_of(preset, PRESETS)}")
    recipe = read_recipe({**PRESETS[preset], "base": base})
    if decoder is None:
        return recipe
    return recipe.model_copy(
        update={"variants": [variant for variant in recipe.variants if _admits(decoder, variant.method)]}
    )


def _admits(decoder: Decoder, source: Method | Steps | Planned | Load | Student) -> bool:
    try:
        if not isinstance(source, Load):
            (source.drop(decoder) if isinstance(source, Student) else source).resolved(decoder)
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
