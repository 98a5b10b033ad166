"""Teachers: which are refused, which is taken where none is named, and which block answers to which."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Train
from tiny import MERGED, MERGES, VOCABULARY, byte_level, refused, tiny
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

import layerfold
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError, LayerfoldError, ModelError
from layerfold.methods import Collapse, Merge, Prune
from layerfold.methods.base import Method
from layerfold.recovery import Distill
from layerfold.recovery.run import Run
from layerfold.recovery.teacher import counterparts, default_teacher


def after(base: Model, *methods: Method) -> Model:
    for method in methods:
        base = layerfold.compress(base, method)
    return base


def original(n_blocks: int = 4, seed: int = 0) -> Model:
    """A model as `load` gives it, which knows its own hash."""
    model = tiny("gpt2", seed, n_layer=n_blocks)
    return Model(model.decoder, model.tokenizer, Provenance("original", base_sha256=model.sha256))


def matched(student: Model, teacher: Model, given: tuple[int, ...] | None = None) -> tuple[int, ...]:
    return counterparts(student, teacher, Distill(tokens=1, hidden_weight=1.0, counterparts=given))


@pytest.mark.parametrize(
    ("n_blocks", "methods", "expected"),
    [
        (4, [], (0, 1, 2, 3)),
        (4, [Collapse(n=2, align="none")], (1, 3)),
        (4, [Collapse(n=4, align="none")], (3,)),
        (5, [Collapse(n=2, align="none")], (1, 3, 4)),
        (6, [Collapse(groups="1-3", align="none")], (0, 3, 4, 5)),
        (4, [Merge(n=2, align="none")], (0, 1, 2, 3)),
        (4, [Merge(n=4, align="none", tie=True)], (0, 1, 2, 3)),
        (8, [Collapse(n=2, align="none"), Collapse(n=2, align="none")], (3, 7)),
        (8, [Collapse(groups="0-2", align="none"), Collapse(groups="1-2", align="none")], (2, 4, 5, 6, 7)),
        (8, [Merge(n=2, align="none"), Collapse(n=4, align="none")], (3, 7)),
    ],
    ids=str,
)
def test_each_block_kept_answers_for_those_that_went_after_it(
    n_blocks: int, methods: list[Method], expected: tuple[int, ...]
) -> None:
    base = original(n_blocks)
    student = after(base, *methods)
    assert matched(student, base) == expected
    # What the provenance says of the base's blocks is not said of another teacher's.
    own = student.decoder.n_blocks
    assert matched(student, original(2 * own, seed=1)) == tuple(range(1, 2 * own, 2))


def test_which_blocks_were_kept_survives_saving_and_recovery(tmp_path: Path) -> None:
    base = original()
    after(base, Collapse(groups="1-2", align="none")).save(tmp_path / "half")
    half = load(tmp_path / "half")
    assert matched(half, base) == (0, 2, 3)
    trained = half.with_step({"method": {"name": "distill"}, "notes": {}})
    assert matched(trained, base) == (0, 2, 3)


@pytest.mark.parametrize(("own", "theirs", "expected"), [(2, 4, (1, 3)), (3, 4, (0, 1, 3)), (3, 9, (2, 5, 8))])
def test_a_model_of_unknown_making_divides_the_depth_evenly(own: int, theirs: int, expected: tuple[int, ...]) -> None:
    assert matched(original(own), original(theirs)) == expected
    found = matched(original(own), original(2))  # of fewer blocks each has to answer
    assert (len(found), list(found), set(found)) == (own, sorted(found), {0, 1})


@pytest.mark.parametrize("given", [(0, 2), (), (0,), (0, 1, 2), (0, 4)], ids=str)
def test_counterparts_that_are_given_are_taken_or_refused_where_they_do_not_fit(given: tuple[int, ...]) -> None:
    base = original()
    half = after(base, Collapse(n=2, align="none"))
    if given == (0, 2):
        assert matched(half, base, given) == given
        return
    with pytest.raises(InputError, match=r"counterparts \[.*accepted: 2 indices, one for each block, in 0 \.\.\. 3"):
        matched(half, base, given)


def other_merges() -> PreTrainedTokenizerFast:
    """The same vocabulary, cut otherwise: the merges have another order."""
    return byte_level(sorted(pre_tokenizers.ByteLevel.alphabet()) + MERGED, MERGES[2:3] + MERGES[:1])


def other_ids() -> PreTrainedTokenizerFast:
    """The same words under other numbers."""
    return byte_level(MERGED + sorted(pre_tokenizers.ByteLevel.alphabet()))


def with_tokenizer(model: Model, other: Any) -> Model:
    return Model(model.decoder, other, Provenance("other"))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (lambda: runs.small(vocab_size=VOCABULARY + 1), f"a vocabulary of {VOCABULARY + 1} tokens, the model one of"),
        (lambda: with_tokenizer(runs.small(), other_merges()), "teacher 'other' has another tokenizer"),
        (lambda: with_tokenizer(runs.small(), other_ids()), "teacher 'other' has another tokenizer"),
        (lambda: runs.small(n_embd=32), r"hidden_weight: teacher 'tiny' is 32 wide, the model 16"),
        (lambda: runs.small(n_positions=8), "context 16"),
    ],
    ids=["vocabulary", "merges", "ids", "width", "context"],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    teacher: Any, said: str, tmp_path: Path, train: Train
) -> None:
    recovery = train.distill(steps=1, hidden_weight=1.0)
    with refused(InputError, said):
        train(runs.small(), recovery, teacher=teacher())
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_needed_by_distillation_alone_and_may_have_another_width(tmp_path: Path, train: Train) -> None:
    teacher = runs.small("llama", hidden_size=64)  # welcome where no hidden states are compared
    _, outcome = train(runs.small(), train.distill(steps=1), "wide", teacher=teacher)
    assert outcome.steps == 1
    with pytest.raises(InputError, match="accepted: a teacher with distill"):
        layerfold.recover(runs.small(), train.finetune(), teacher=runs.small())
    with pytest.raises(InputError, match="distill needs a teacher"):
        Run(runs.small(), train.distill(), tmp_path / "run")
    with pytest.raises(ModelError, match="no tokenizer"):
        Run(runs.small(), train.distill(), tmp_path / "run", teacher=with_tokenizer(runs.small(), None))


def plain(model: Model, folder: Path) -> Path:
    """Save as transformers does, without a word of where the model comes from."""
    model.decoder.model.save_pretrained(folder)
    model.require_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_that_went_or_changed_is_no_teacher(tmp_path: Path) -> None:
    changed = r"no teacher was named, .* is no longer what this model was made from; name one with --teacher"
    base = load(plain(tiny("gpt2"), tmp_path / "base"))
    after(base, Collapse(n=2, align="none")).save(tmp_path / "half")
    half = load(tmp_path / "half")
    # Its layerfold.json carries the hash of the weights that it was made from; its own weights are others. Nor is it
    # its own teacher.
    after(base, Prune(sparsity=0.5)).save(tmp_path / "base", overwrite=True)
    for model in (half, load(tmp_path / "base")):
        with pytest.raises(InputError, match=changed):
            default_teacher(model)
    shutil.rmtree(tmp_path / "base")
    plain(tiny("gpt2", seed=1), tmp_path / "base")
    with pytest.raises(InputError, match=changed):
        default_teacher(half)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"no teacher was named, and the base .* cannot be loaded"):
        default_teacher(half)


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_base_is_found_from_another_folder_and_after_both_moved(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    plain(tiny("gpt2"), tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    base = load("base")
    after(base, Collapse(n=2, align="none")).save("made/half", format=form)
    monkeypatch.chdir(tmp_path)
    teacher = default_teacher(load("work/made/half"))
    assert (teacher.sha256, teacher.decoder.n_blocks) == (base.sha256, 4)
    (tmp_path / "work").rename(tmp_path / "moved")
    half = load("moved/made/half")
    assert default_teacher(half).sha256 == base.sha256
    assert half.provenance.base == "base", "the name is as it was typed"
    assert str(tmp_path) not in (tmp_path / "moved" / "made" / "half" / "layerfold.json").read_text()


def test_a_base_out_of_reach_says_what_it_was_wanted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # The user may never have named that model.
    monkeypatch.setattr("layerfold.checkpoint.load.hub_reachable", lambda: False)
    with pytest.raises(LayerfoldError, match="no teacher was named"):
        default_teacher(after(tiny("gpt2"), Collapse(n=2, align="none")))
