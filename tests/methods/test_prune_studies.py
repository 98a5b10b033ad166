"""`prune` in recipes and studies, and what is left on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_masks_equal, logits, tiny

from layerfold.api import compress
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Prune
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

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
    with pytest.raises(
        InputError, match=r"variant 'p': nonzero '1%' is 603 parameters; accepted: 11,168 \.\.\. 60,320"
    ):
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
