"""Settings of `prune`: how they are refused, what they resolve to; studies of them, and what is left on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import HEADS, NEURONS, fresh, prune
from tiny import assert_masks_equal, logits, refused, tiny, unchanged

from layerfold.api import compress
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Prune
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

# Refused


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "nonzero None and sparsity None; accepted: one of the two"),
    ({"nonzero": "50%", "sparsity": 0.5}, "nonzero '50%' and sparsity 0.5; accepted: one of the two"),
    ({"sparsity": 1.0}, "sparsity 1.0; accepted: from 0 to below 1"),
    ({"sparsity": -0.1}, "sparsity -0.1; accepted: from 0 to below 1"),
    ({"sparsity": float("nan")}, "sparsity nan; accepted: from 0 to below 1"),
    ({"sparsity": float("inf")}, "sparsity inf; accepted: from 0 to below 1"),
    *(
        ({"nonzero": wrong}, f"nonzero {wrong!r}; accepted: a count, as 104690000 or 104.69M, or a percentage, as")
        for wrong in ("12X", "-5", "", " ", "nan%", "nan", "%", "M", "1.M", "1e6", "5 0", "½", True, -5, "9" * 400)
    ),
    ({"structure": "2:4", "sparsity": 0.3}, "sparsity 0.3 with structure 2:4, which leaves half; accepted: neither"),
    ({"structure": "2:4", "nonzero": "50%"}, "nonzero '50%' and sparsity None with structure 2:4, which leaves hal"),
    ({"structure": "2:4", "scope": "row"}, "scope 'row' with structure 2:4, which chooses among four; accepted: no"),
    (HEADS | {"structure": "2:4"}, "criterion taylor with structure 2:4; accepted: taylor with neurons or"),
]
WRONG_BESIDE_A_SPARSITY: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "magnitud"}, "criterion 'magnitud'; did you mean 'magnitude'? accepted: magnitude, publi"),
    ({"structure": "neuron"}, "structure 'neuron'; did you mean 'neurons'? accepted: 2:4, neurons, neur"),
    ({"scope": "globl"}, "scope 'globl'; did you mean 'global'? accepted: global, matrix, row"),
    ({"parts": "atention"}, "part 'atention'; did you mean 'attention'? accepted: attention, embeddings"),
    ({"parts": "ffn,"}, "part ''; accepted: attention, embeddings, ffn, head"),
    ({"parts": ""}, "part ''; accepted: attention, embeddings, ffn, head"),
    ({"parts": "ffn, ffn"}, "parts 'ffn, ffn' name one twice"),
    ({"structure": "neurons", "scope": "row"}, "scope 'row' for magnitude of neurons; accepted: global, mat"),
    ({"structure": "neurons", "parts": "attention"}, "parts 'attention' with structure neurons; accepted: f"),
    ({"criterion": "sparsegpt", "scope": "global"}, "scope 'global' for sparsegpt of unstructured; accepted: m"),
    ({"criterion": "published", "scope": "row"}, "scope 'row' for published of unstructured; accepted: glob"),
    ({"criterion": "published", "structure": "neurons"}, "criterion published prunes every nn.Linear, unst"),
    ({"criterion": "published", "parts": "ffn"}, "criterion published prunes every nn.Linear, unstructured"),
    ({"criterion": "wanda", "parts": "embeddings"}, "parts 'embeddings' with criterion wanda; accepted: atte"),
    ({"criterion": "sparsegpt", "parts": "ffn,head"}, "parts 'ffn,head' with criterion sparsegpt; accepted: "),
    *(
        (HEADS | {"criterion": other}, f"criterion {other} with structure neurons+heads; accepted: taylor wi")
        for other in ("magnitude", "wanda", "sparsegpt", "published")
    ),
    (HEADS | {"structure": "unstructured"}, "criterion taylor with structure unstructured; accepted: taylor"),
    *(
        (HEADS | {"scope": scope}, f"scope '{scope}' for taylor of neurons+heads; accepted: global")
        for scope in ("row", "matrix")
    ),
    (NEURONS | {"scope": "row"}, "scope 'row' for taylor of neurons; accepted: global, matrix"),
    *(
        (HEADS | {"parts": parts}, f"parts '{parts}' with structure neurons+heads; accepted: attention,ffn")
        for parts in ("ffn", "attention", "ffn,head")
    ),
    (NEURONS | {"parts": "attention"}, "parts 'attention' with structure neurons; accepted: ffn"),
    (HEADS | {"structure": "heads"}, "structure 'heads'; "),
    (HEADS | {"criterion": "tailor"}, "criterion 'tailor'; did you mean 'taylor'? accepted: "),
]
WRONG += [({"sparsity": 0.5} | settings, said) for settings, said in WRONG_BESIDE_A_SPARSITY]


@pytest.mark.parametrize(("settings", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_setting_says_what_was_received_and_what_is_accepted(settings: dict[str, Any], said: str) -> None:
    with refused(InputError, says=said):
        Prune(**settings)


READING = [(criterion, each) for criterion in ("wanda", "sparsegpt") for each in ("unstructured", "2:4", "neurons")]


@pytest.mark.parametrize(("criterion", "structure"), [*READING, ("taylor", "neurons"), ("taylor", "neurons+heads")])
def test_what_is_read_or_felt_needs_text(criterion: Any, structure: Any) -> None:
    decoder = fresh("gpt2")
    method = Prune(sparsity=0.5, criterion=criterion, structure=structure)
    assert method.needs_calibration
    other = "" if structure == "neurons+heads" else ", or take magnitude"
    said = rf"^criterion '{criterion}' needs calibration text; give a corpus{other}"
    with unchanged(decoder), pytest.raises(InputError, match=said + ("$" if criterion == "taylor" else "")):
        method.apply(decoder, None)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_four_needs_fours(criterion: Any) -> None:
    decoder = fresh("llama", intermediate_size=6)
    said = r"structure 2:4, and 'model.layers.0.mlp.down_proj.weight' has 6 inputs; accepted: a multiple of 4"
    method = Prune(structure="2:4", criterion=criterion)
    for act in (method.resolved, lambda decoder: prune(decoder, structure="2:4", criterion=criterion)):
        with unchanged(decoder), pytest.raises(InputError, match=said):
            act(decoder)
    prune(decoder, structure="2:4", criterion=criterion, parts="attention")


# What settings mean


@pytest.mark.parametrize(
    ("count", "spellings"),
    [
        (50_000, ["50000", 50_000, "50,000", "50_000", " 50k ", "0.05M", "0.00005B"]),
        (50_250, ["50.25K"]),
        (round(0.8 * 60_320), ["80%"]),
        (round(0.8001 * 60_320), ["80.01 %"]),
        (60_320, ["100%"]),
    ],
)
def test_a_budget_is_a_count_or_a_percentage_of_the_parameters(count: int, spellings: list[Any]) -> None:
    for nonzero in spellings:
        decoder = fresh("gpt2")
        assert decoder.size().parameters == 60_320
        prune(decoder, nonzero=nonzero)
        assert decoder.size().nonzero == count, nonzero


NARROWED: dict[str, Any] = {"structure": "neurons", "sparsity": 0.25}
ALIKE: list[list[dict[str, Any]]] = [
    [
        *({"nonzero": 40_740} | each for each in ({}, {"nonzero": "40.74k"}, {"scope": "global"})),
        {"sparsity": 19_580 / 49_152},
    ],
    [{"nonzero": 40_740, "parts": each} for each in ("attention,ffn", "ffn,attention", " ffn , attention ")],
    [{"structure": "2:4"}, {"structure": "2:4", "sparsity": 0.5}],
    [{"criterion": "wanda", "sparsity": 0.5, "scope": scope} for scope in (None, "row")],
    [{"criterion": "sparsegpt", "sparsity": 0.5, "scope": scope} for scope in (None, "matrix")],
    [{"criterion": "published", "sparsity": 0.5, "parts": each} for each in ("attention,ffn", "ffn,attention")],
    [
        *(NARROWED | each for each in ({}, {"scope": "matrix"}, {"parts": "ffn"}, {"parts": "ffn,attention"})),
        {"structure": "neurons", "nonzero": 60_320 - 128 * 65},
    ],
]


@pytest.mark.parametrize("alike", ALIKE, ids=str)
def test_settings_that_prune_the_same_resolve_to_the_same(alike: list[dict[str, Any]]) -> None:
    decoder = fresh("gpt2")
    first, *others = [Prune(**settings).resolved(decoder) for settings in alike]
    assert others
    assert all(other == first for other in others)
    assert json.loads(json.dumps(first)) == first


def test_settings_that_prune_otherwise_resolve_to_something_else() -> None:
    decoder = fresh("gpt2")
    ways: list[dict[str, Any]] = [{}, {"scope": "row"}, {"parts": "ffn"}, {"criterion": "wanda"}]
    ways += [{"structure": "neurons"}]
    found = [json.dumps(Prune(sparsity=0.5, **way).resolved(decoder)) for way in ways]
    assert len(set(found)) == len(ways)


VARIANTS = [
    {"label": "p", "prune": {"nonzero": "84.13%"}},
    {"label": "w", "prune": {"sparsity": 0.5, "criterion": "wanda"}},
    {"label": "n", "prune": {"nonzero": "80%", "structure": "neurons"}},
]


def study(corpus: str, folder: Path, base: Model, **changes: Any) -> Study:
    document = {"variants": VARIANTS, "evaluate": ["size", {"perplexity": {"corpus": corpus}}]}
    return Study(
        read_recipe(document | {"calibration": {"corpus": corpus, "tokens": 256}} | changes), folder, base=base
    )


def test_a_study_compares_what_is_pruned(study_corpus: str, tmp_path: Path) -> None:
    base = tiny("gpt2")
    before, parameters = base.sha256, base.decoder.size().parameters

    def measured(name: str) -> list[Any]:
        run = study(study_corpus, tmp_path / name, base)
        assert len(list(run.run())) == 8
        assert list(study(study_corpus, tmp_path / name, base).run()) == []
        results = run.results()
        return [results.score(label, kind) for label in ("base", "p", "w", "n") for kind in ("size", "perplexity")]

    one = measured("one")
    assert one == measured("two")
    assert [one[i]["nonzero"] for i in (0, 2)] == [parameters, round(0.8413 * parameters)]
    assert [one[i]["parameters"] for i in (0, 2, 4)] == [parameters] * 3
    assert one[6]["parameters"] == one[6]["nonzero"] < parameters
    assert Model(base.decoder, base.tokenizer, base.provenance).sha256 == before


def test_a_budget_that_the_base_does_not_admit_names_its_variant(study_corpus: str, tmp_path: Path) -> None:
    said = r"variant 'p': nonzero '1%' is 603 parameters; accepted: 11,168 \.\.\. 60,320"
    with pytest.raises(InputError, match=said):
        study(study_corpus, tmp_path / "run", tiny("gpt2"), variants=[{"label": "p", "prune": {"nonzero": "1%"}}])


def test_training_keeps_the_zeros(study_corpus: str, tmp_path: Path) -> None:
    base = tiny("gpt2", n_layer=2, n_embd=16, n_head=2)
    training = {"tokens": 64, "context": 16, "batch_size": 4, "validation_tokens": 64, "corpus": study_corpus}
    run = study(study_corpus, tmp_path / "run", base, recovery={"finetune": training}, variants=VARIANTS[:1])
    list(run.run())
    untrained, _ = run.replicates[0].build("p")
    left, masks = untrained.decoder.size().nonzero, held(untrained.decoder)
    models = [load(folder).decoder for folder in (tmp_path / "run" / "models").iterdir()]
    (trained,) = [decoder for decoder in models if held(decoder)]
    assert run.results().score("p", "size")["nonzero"] == trained.size().nonzero == left  # type: ignore[index]
    assert_masks_equal(held(trained), masks)
    assert not torch.equal(logits(trained), logits(untrained.decoder))


def test_the_step_says_what_was_done() -> None:
    model = compress(tiny("gpt2"), Prune(sparsity=0.3))
    step = model.provenance.steps[-1]
    assert step["method"] == Prune(sparsity=0.3).resolved(tiny("gpt2").decoder)
    assert step["notes"]["sparsity"].keys() == {"attention", "ffn"}
    assert step["calibration"] is None
    again = compress(model, Prune(structure="neurons", sparsity=0.5))
    assert [each["method"]["structure"] for each in again.provenance.steps] == ["unstructured", "neurons"]
    assert isinstance(again.decoder, Decoder)
