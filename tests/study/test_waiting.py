"""Variants that wait to be compared: what is in memory, what is measured with what, and that nothing is lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from layerfold.checkpoint.model import Model
from layerfold.evaluators import Latency
from layerfold.evaluators.base import Score
from layerfold.memory import room
from layerfold.methods import Collapse, Share
from layerfold.progress import SILENT
from layerfold.records import BASE_LABEL
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.study import Replicate, Study
from layerfold.study.waiting import Waiting

VARIANTS = [
    {"label": "dropped", "drop": {"blocks": [1]}},
    {"label": "merged", "merge": {"n": 2, "tie": True}},
    {"label": "shared", "share": {"window": "1:2", "rank": 2}},
    {"label": "pruned", "prune": {"sparsity": 0.5}},
    {"label": "collapsed", "collapse": {"n": 2}},
]
LABELS = [each["label"] for each in VARIANTS]


def weights_of(model: Model) -> int:
    """Bytes of the distinct tensors of a model, whether they are in memory or not."""
    tensors = {id(each): each for each in (*model.decoder.model.parameters(), *model.decoder.model.buffers())}
    return sum(each.nbytes for each in tensors.values())


def held(model: Model) -> int:
    """Bytes of a model that are in memory."""
    tensors = (*model.decoder.model.parameters(), *model.decoder.model.buffers())
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.fixture(scope="module")
def base() -> Model:
    return tiny("gpt2")


def recipe(corpus: str, **changes: Any) -> Recipe:
    document = {
        "variants": VARIANTS,
        "evaluate": ["size", {"latency": {"rounds": 3, "prompt_tokens": 4, "new_tokens": 2}}],
        "calibration": {"corpus": corpus, "tokens": 512},
    }
    return read_recipe(document | changes)


class Watched:
    """What a study's comparison is given, and what of the built models is in memory then; no time is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_generate", "_prefill"):
            monkeypatch.setattr(Latency, name, lambda *_: 1.0)
        self.groups: list[list[str]] = []
        self.peak = 0
        self.stop_after: int | None = None
        self.logits: dict[str, torch.Tensor] = {}
        self._built: list[weakref.ref[Model]] = []
        build, recover, compare = Replicate.build, Replicate.recover, Latency.compare

        def building(replicate: Replicate, label: str, *args: Any) -> Any:
            model, notes = build(replicate, label, *args)
            if label != BASE_LABEL:
                self._watch(model)
            return model, notes

        def recovering(replicate: Replicate, label: str, *args: Any) -> Any:
            model = recover(replicate, label, *args)
            self._watch(model)
            return model

        def comparing(latency: Latency, models: Mapping[str, Model], *args: Any) -> dict[str, Score]:
            if len(self.groups) == self.stop_after:
                raise KeyboardInterrupt
            self.groups.append(list(models))
            self._look()
            for label, model in models.items():
                self.logits[label] = model.decoder.model(torch.arange(6)[None]).logits.detach()
            return compare(latency, models, *args)

        monkeypatch.setattr(Replicate, "build", building)
        monkeypatch.setattr(Replicate, "recover", recovering)
        monkeypatch.setattr(Latency, "compare", comparing)

    def _watch(self, model: Model) -> None:
        self._look()
        self._built.append(weakref.ref(model))

    def _look(self) -> None:
        gc.collect()
        models = [model for each in self._built if (model := each()) is not None]
        self.peak = max(self.peak, sum(map(held, models)))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def run(study: Study) -> list[tuple[str, str]]:
    return [(record.label, record.evaluator) for record in study.run()]


def test_what_fits_is_timed_in_one_group(base: Model, study_corpus: str, tmp_path: Path, watched: Watched) -> None:
    run(Study(recipe(study_corpus), tmp_path / "run", base=base))
    assert watched.groups == [[BASE_LABEL, *LABELS]]


@pytest.mark.parametrize("models", [0, 1.1, 2.2])
def test_what_does_not_fit_is_timed_in_groups_that_each_hold_the_base(
    base: Model, study_corpus: str, tmp_path: Path, watched: Watched, models: float
) -> None:
    limit = int(models * weights_of(base))
    study = Study(recipe(study_corpus), tmp_path / "run", base=base, waiting_bytes=limit)
    done = run(study)
    assert sorted(done) == sorted((label, name) for label in (BASE_LABEL, *LABELS) for name in ("size", "latency"))
    assert len(watched.groups) > 1
    assert all(group[0] == BASE_LABEL for group in watched.groups)
    assert [label for group in watched.groups for label in group[1:]] == LABELS
    assert (max(map(len, watched.groups)) > 2) == (models > 2)
    # What waits, and one more: the one that is built, or a group of one that is too large.
    largest = max(weights_of(study.replicates[0].build(label)[0]) for label in LABELS)
    assert watched.peak <= limit + largest + 2000  # of what is in a file an element a tensor stays
    results = study.results()
    for label in LABELS:
        score = results.score(label, "latency")
        assert score["speedup"]["low"] <= score["speedup"]["value"] <= score["speedup"]["high"]
        assert score["base_value"] > 0
    base = results.score(BASE_LABEL, "latency")
    assert base["speedup"] == base["same_model"], "of a copy of the base"
    assert "multiplied_out" in results.score("shared", "latency")


def test_what_was_in_a_file_computes_the_same_to_the_bit(
    base: Model, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").save(tmp_path / "other")
    variants = [*VARIANTS, {"label": "loaded", "load": {"model": str(tmp_path / "other")}}]
    logits, sizes = [], []
    for name, limit in (("held", None), ("stowed", 0)):
        watched = Watched(monkeypatch)
        study = Study(recipe(study_corpus, variants=variants), tmp_path / name, base=base, waiting_bytes=limit)
        run(study)
        logits.append(watched.logits)
        sizes.append([study.results().score(label, "size") for label in study.labels])
        monkeypatch.undo()
    assert list(logits[0]) == [BASE_LABEL, *LABELS, "loaded"] == list(logits[1])
    assert all(torch.equal(logits[0][label], logits[1][label]) for label in logits[0])
    assert sizes[0] == sizes[1]


def test_students_and_recovered_rows_wait_in_files_too(
    base: Model, study_corpus: str, tmp_path: Path, watched: Watched
) -> None:
    variants = [VARIANTS[4], {"label": "student", "student": {"every": 2, "tokens": 128}}, VARIANTS[2]]
    settings: dict[str, Any] = {"tokens": 128, "learning_rate": 1e-3, "validation_tokens": 64, "evaluations": 1}
    settings |= {"corpus": study_corpus}
    document = recipe(study_corpus, variants=variants, recovery={"finetune": settings})
    study = Study(document, tmp_path / "run", base=base, waiting_bytes=0)
    run(study)
    assert watched.groups == [[BASE_LABEL, label] for label in ("collapsed", "student", "shared")]
    for label in study.labels:
        model = study.replicates[0].recover(label, base, SILENT)
        assert torch.equal(watched.logits[label], model.decoder.model(torch.arange(6)[None]).logits)


def test_an_interrupted_run_times_only_the_groups_that_are_left(
    base: Model, study_corpus: str, tmp_path: Path, watched: Watched
) -> None:
    watched.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        run(Study(recipe(study_corpus), tmp_path / "run", base=base, waiting_bytes=0))
    watched.stop_after = None
    again = run(Study(recipe(study_corpus), tmp_path / "run", base=base, waiting_bytes=0))
    assert watched.groups == [[BASE_LABEL, label] for label in LABELS]
    assert again == [(label, "latency") for label in LABELS[2:]]
    assert run(Study(recipe(study_corpus), tmp_path / "run", base=base, waiting_bytes=0)) == []


class TestWaiting:
    """The bound by itself."""

    def test_a_model_is_counted_by_its_distinct_tensors_and_by_what_is_multiplied_out_of_it(self, base: Model) -> None:
        plain, tied = base.copy(), base.copy()
        Collapse(n=4, align="none").apply(plain.decoder, None)
        Share(window="0:4", rank=1, align="none", init="svd").apply(tied.decoder, None)
        ffns = sum(matrix.weight.nbytes for block in base.decoder.blocks for matrix in block.ffn.matrices)
        biases = sum(matrix.bias.nbytes for block in base.decoder.blocks for matrix in block.ffn.matrices)  # type: ignore[union-attr]
        needed = weights_of(plain) + weights_of(tied) + ffns + biases
        for limit, groups in ((needed, [["plain", "tied"]]), (needed - 1, [["plain"], ["tied"]])):
            waiting = Waiting(base, limit)
            waiting.add("plain", plain, {})
            waiting.add("tied", tied, {"said": 1})
            assert waiting.groups([BASE_LABEL, "plain", "tied"]) == groups
            assert waiting.notes("tied") == {"said": 1}
            waiting.together(["plain", "tied"])

    def test_the_base_alone_is_one_group(self, base: Model) -> None:
        waiting = Waiting(base, 0)
        waiting.add(BASE_LABEL, base, {"of": "the base"})
        assert waiting.groups([BASE_LABEL]) == [[]]
        assert waiting.together([]) == {BASE_LABEL: base}
        assert waiting.notes(BASE_LABEL) == {"of": "the base"}

    def test_tensors_of_the_base_stay_in_memory(self, base: Model) -> None:
        before = held(base)
        model = Model(base.decoder.copy(share=True), base.tokenizer, base.provenance)
        waiting = Waiting(base, 0)
        waiting.add("the same", model, {})
        assert held(base) == held(model) == before


def test_half_of_the_free_memory_is_taken_by_default(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < room.available() < 2**50
    monkeypatch.setattr(room, "available", lambda: 2 * weights_of(base))
    waiting = Waiting(base)
    for label in ("one", "two"):
        waiting.add(label, base.copy(), {})
    assert waiting.groups(["one", "two"]) == [["one"], ["two"]]
