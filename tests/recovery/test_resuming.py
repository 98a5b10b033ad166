"""Runs that are killed, anywhere, and called again: the same weights, the same curve, nothing done twice."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from tiny import tiny

import layerfold
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, OutputError
from layerfold.methods import Collapse, Drop, Merge
from layerfold.model.masks import hold_
from layerfold.recovery import Recovery, callbacks
from layerfold.recovery import trainer as training
from layerfold.recovery.arguments import training_arguments
from layerfold.recovery.run import Outcome, Run
from layerfold.recovery.text import training_text

MARKER = "layerfold-training.json"


class Killed(BaseException):
    """What no layer may catch, as none can catch a signal."""


Patch = Callable[[pytest.MonkeyPatch], None]


def before_saving(step: int) -> Patch:
    """After a step has been taken, before anything of it is logged, scored or written."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def on_step_end(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == step:
                raise Killed

        monkeypatch.setattr(callbacks.Bar, "on_step_end", on_step_end)

    return patch


def in_method(owner: Any, name: str, step: int, before: Callable[[Any], None] | None = None) -> Patch:
    """Where a method of the trainer is called at a step; `before` leaves something half-done."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            state = self.state if hasattr(self, "state") else arguments[1]
            if state.global_step != step:
                return original(self, *arguments, **options)
            if before is not None:
                before(Path((self.args if hasattr(self, "args") else arguments[0]).output_dir) / f"checkpoint-{step}")
            raise Killed

        monkeypatch.setattr(owner, name, method)

    return patch


def after_marking(step: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = callbacks.Bookkeeper.on_save

        def on_save(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
            original(self, args, state, control, **rest)
            if state.global_step == step:
                raise Killed

        monkeypatch.setattr(callbacks.Bookkeeper, "on_save", on_save)

    return patch


def half_a_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"\x00" * 1000)


def half_a_marker(folder: Path) -> None:
    (folder / f".{MARKER}.abc.tmp").write_text('{"secon')


def removing(lost: str) -> Patch:
    """In the midst of removing an older checkpoint, once one of its files has gone."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = shutil.rmtree

        def rmtree(path: Any, *arguments: Any, **options: Any) -> None:
            if not Path(path).name.startswith("checkpoint-"):
                return original(path, *arguments, **options)
            (Path(path) / lost).unlink(missing_ok=True)
            raise Killed

        monkeypatch.setattr(shutil, "rmtree", rmtree)

    return patch


Trainer = training.RecoveryTrainer
Bookkeeper = callbacks.Bookkeeper


def killed(monkeypatch: pytest.MonkeyPatch, patch: Patch, *arguments: Any, **options: Any) -> None:
    with monkeypatch.context() as inner:
        patch(inner)
        with pytest.raises(Killed):
            runs.train(*arguments, **options)


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every step that is begun."""
    taken: list[int] = []
    original = training.RecoveryTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.args.save_strategy != "no":
            taken.append(self.state.global_step + 1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(training.RecoveryTrainer, "compute_loss", compute_loss)
    return taken


def assert_equal(one: tuple[Model, Outcome], two: tuple[Model, Outcome]) -> None:
    assert runs.drift(one[0], two[0]) < 1e-5
    for name in ("train", "validation"):
        assert np.array(one[1].curve[name]).shape == np.array(two[1].curve[name]).shape
        assert np.allclose(one[1].curve[name], two[1].curve[name], atol=1e-5)
    for name in ("tokens", "steps", "best_step", "learning_rate", "search_tokens", "parameters_trained"):
        assert getattr(one[1], name) == getattr(two[1], name), name
    assert one[1].validation_perplexity == pytest.approx(two[1].validation_perplexity, rel=1e-5)


def three_checkpoints(corpus: str, **changes: Any) -> Recovery:
    return runs.finetune(corpus, steps=6, evaluations=3, **changes)


def test_a_run_killed_at_every_step_ends_as_if_it_never_was(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus, weight_decay=0.1, learning_rate=3e-3)
    whole = runs.train(model, recovery, tmp_path / "whole")
    assert whole[1].best_step == 6
    steps_taken.clear()
    for step in range(1, 7):
        killed(monkeypatch, before_saving(step), model, recovery, tmp_path / "run")
    assert_equal(runs.train(model, recovery, tmp_path / "run"), whole)
    # Step 2 was lost before it was written, and step 3 went on after it had been done again.
    assert steps_taken == [1, 1, 2, 1, 2, 3, 3, 4, 3, 4, 5, 5, 6, 5, 6]


@pytest.mark.parametrize(
    ("patch", "goes_on_from"),
    [
        (in_method(Trainer, "_save", 2, half_a_file), 0),
        (in_method(Trainer, "_save", 4, half_a_file), 2),
        (in_method(Trainer, "_save_optimizer_and_scheduler", 4), 2),
        (in_method(Trainer, "_save_rng_state", 4), 2),
        (in_method(Bookkeeper, "on_save", 4), 2),
        (in_method(Bookkeeper, "on_save", 4, half_a_marker), 2),
        (in_method(Bookkeeper, "on_save", 6), 4),
        (after_marking(2), 2),
        (after_marking(6), 6),
    ],
    ids=[
        "first weights",
        "weights",
        "optimizer",
        "generators",
        "marker",
        "half a marker",
        "last marker",
        "after the first",
        "after the last",
    ],
)
def test_a_checkpoint_counts_once_it_is_whole(
    patch: Patch,
    goes_on_from: int,
    study_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps_taken: list[int],
) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    killed(monkeypatch, patch, model, recovery, tmp_path / "run")
    steps_taken.clear()
    again = runs.train(model, recovery, tmp_path / "run")
    assert steps_taken == list(range(goes_on_from + 1, 7))
    assert_equal(again, runs.train(model, recovery, tmp_path / "whole"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"], "the newest and best"


def script(monkeypatch: pytest.MonkeyPatch, nats: list[float]) -> None:
    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": nats[self.state.global_step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(training.RecoveryTrainer, "evaluate", evaluate)


@pytest.mark.parametrize("lost", ["optimizer.pt", "model.safetensors", "trainer_state.json", MARKER])
def test_a_checkpoint_that_was_being_removed_is_not_gone_on_from(
    lost: str, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without its optimizer training would silently go on with a fresh one.
    script(monkeypatch, [5.0, 5.0, 1.0, 5.0, 4.0, 5.0, 4.0, 5.0, 0.5])  # the first checkpoint stays till the last
    model, recovery = runs.small(), runs.finetune(study_corpus, steps=8, evaluations=4, learning_rate=1e-2)
    whole = runs.train(model, recovery, tmp_path / "whole")
    assert whole[1].best_step == 8
    killed(monkeypatch, removing(lost), model, recovery, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint-4" / lost).exists()
    assert_equal(runs.train(model, recovery, tmp_path / "run"), whole)


def masked(model: Model) -> Model:
    with torch.no_grad():
        weight = model.decoder.model.transformer.h[0].mlp.c_fc.weight
        weight[:, ::2] = 0
    hold_(model.decoder, {"transformer.h.0.mlp.c_fc.weight": weight != 0})
    return model


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda base: runs.small("llama"), {"accumulation": 2}),
        (lambda base: layerfold.compress(base, Merge(n=2, align="none", tie=True)), {}),
        (lambda base: layerfold.compress(base, Drop(blocks="0,2", part="attention")), {}),
        (lambda base: masked(runs.small()), {"weight_decay": 0.1}),
        (lambda base: runs.small(), {"freeze": ("*.wte.*",), "schedule": "cosine", "warmup": 0.5}),
    ],
    ids=["gated, in pieces", "tied", "dropped", "masked", "frozen"],
)
def test_whatever_is_trained_goes_on_as_it_was(
    make: Any, settings: dict[str, Any], study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tiny("gpt2"))
    recovery = three_checkpoints(study_corpus, **settings)
    killed(monkeypatch, before_saving(5), model, recovery, tmp_path / "run")
    again = runs.train(model, recovery, tmp_path / "run")
    assert_equal(again, runs.train(model, recovery, tmp_path / "whole"))
    assert again[0].decoder.size() == model.decoder.size(), "ties and zeros"


def test_distillation_goes_on_as_it_was(
    taught: Model, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layerfold.compress(taught, Collapse(n=2, align="none"))
    recovery = runs.distill(study_corpus, evaluations=3, hidden_weight=0.5, temperature=2.0, learning_rate=None)
    killed(monkeypatch, before_saving(3), model, recovery, tmp_path / "run", teacher=taught)
    tried = (tmp_path / "run" / "search.json").read_bytes()
    again = runs.train(model, recovery, tmp_path / "run", teacher=taught)
    assert (tmp_path / "run" / "search.json").read_bytes() == tried
    assert_equal(again, runs.train(model, recovery, tmp_path / "whole", teacher=taught))


def test_points_of_the_curve_that_span_several_steps_are_the_same(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerfold.recovery.arguments._CURVE_POINTS", 2)  # as with 400 steps and more
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    killed(monkeypatch, before_saving(5), model, recovery, tmp_path / "run")
    again = runs.train(model, recovery, tmp_path / "run")
    assert [tokens for tokens, _ in again[1].curve["train"]] == [192, 384]
    assert_equal(again, runs.train(model, recovery, tmp_path / "whole"))


@pytest.mark.parametrize(("steps", "evaluations"), [(90, 4), (404, 4), (808, 4), (1000, 1), (1009, 3), (10_000, 7)])
def test_a_curve_has_points_enough_to_be_drawn_and_few_enough_to_be_kept(
    steps: int, evaluations: int, study_corpus: str, tmp_path: Path
) -> None:
    recovery = runs.finetune(study_corpus, steps=4, evaluations=evaluations)
    text = replace(training_text(runs.small(), recovery, 0), steps=steps)
    arguments = training_arguments(recovery, text, 1e-3, tmp_path, True)
    assert arguments.save_steps % arguments.logging_steps == 0, "a run resumed there would lose part of a point"
    assert min(steps, 100) <= steps // arguments.logging_steps <= 400


def test_a_run_that_patience_stopped_stays_stopped(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:
    script(monkeypatch, [5.0, 5.0, 4.0, 5.0, 4.5, 5.0, 4.6, 5.0, 1.0])
    model = runs.small()
    recovery = runs.finetune(study_corpus, steps=8, evaluations=4, patience=2)
    whole = runs.train(model, recovery, tmp_path / "whole")
    assert (whole[1].steps, whole[1].best_step) == (6, 2)
    for step in (3, 5):
        killed(monkeypatch, before_saving(step), model, recovery, tmp_path / "run")
    killed(monkeypatch, after_marking(6), model, recovery, tmp_path / "run")
    steps_taken.clear()
    assert_equal(runs.train(model, recovery, tmp_path / "run"), whole)
    assert steps_taken == []


def test_a_run_that_is_done_is_not_done_again(study_corpus: str, tmp_path: Path, steps_taken: list[int]) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    whole = runs.train(model, recovery, tmp_path / "run")
    steps_taken.clear()
    assert_equal(runs.train(model, recovery, tmp_path / "run"), whole)
    assert steps_taken == []


@pytest.mark.parametrize(
    ("nats", "best"),
    [
        ([5.0, 5.0, 1.0, 5.0, 4.0, 5.0, 4.0], 2),
        ([5.0, 5.0, 6.0, 5.0, 6.0, 5.0, 6.0], 0),
        ([9.0 - i for i in range(7)], 6),
    ],
    ids=["best before", "best untrained", "best after"],
)
def test_a_folder_that_was_moved_goes_on(
    nats: list[float], best: int, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, nats)
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    whole = runs.train(model, recovery, tmp_path / "whole")
    killed(monkeypatch, before_saving(5), model, recovery, tmp_path / "run")
    (tmp_path / "deep").mkdir()
    (tmp_path / "run").rename(tmp_path / "deep" / "moved")
    again = runs.train(model, recovery, tmp_path / "deep" / "moved")
    assert again[1].best_step == best
    assert_equal(again, whole)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_copied_goes_on_in_the_copy_alone(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [5.0, 5.0, 1.0, 5.0, 4.0, 5.0, 4.0])
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    killed(monkeypatch, before_saving(5), model, recovery, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = runs.train(model, recovery, tmp_path / "copy")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    shutil.rmtree(tmp_path / "run")
    assert_equal(runs.train(model, recovery, tmp_path / "copy"), again)


def test_the_time_is_that_of_all_attempts(study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    killed(monkeypatch, after_marking(4), model, recovery, tmp_path / "run")
    marker = tmp_path / "run" / "checkpoint-4" / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"seconds": 1000.0}))
    _, outcome = runs.train(model, recovery, tmp_path / "run")
    assert 1000 < outcome.seconds < 1060


def test_a_loss_that_has_grown_since_before_the_kill_is_divergence(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    killed(monkeypatch, after_marking(4), model, recovery, tmp_path / "run")
    marker = tmp_path / "run" / "checkpoint-4" / MARKER
    assert json.loads(marker.read_text())["first_loss"] > 1
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"first_loss": 0.1}))
    with pytest.raises(
        layerfold.errors.TrainingError, match=r"from 0\.1 to .* last good checkpoint is .*checkpoint-4$"
    ):
        runs.train(model, recovery, tmp_path / "run")


# Settings that changed, folders that may not or cannot be written


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "options", "key"),
    [
        ({"learning_rate": 2e-3}, {}, "learning_rate was 0.001 and is 0.002"),
        ({"tokens": 448}, {}, "tokens was 384 and is 448"),
        ({"freeze": ("*.wte.*",)}, {}, "freeze was"),
        ({"evaluations": 2}, {}, "evaluations was 3 and is 2"),
        ({"accumulation": 2}, {}, "accumulation was 1 and is 2"),
        ({}, {"seed": 1}, "seed was 0 and is 1"),
        ({}, {"model": lambda: runs.small(seed=1)}, "model_sha256 was"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_changed_are_named_and_nothing_is_touched(
    changes: dict[str, Any],
    options: dict[str, Any],
    key: str,
    study_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, folder = runs.small(), tmp_path / "run"
    killed(monkeypatch, after_marking(2), model, three_checkpoints(study_corpus), folder)
    before = content(folder)
    other = options.pop("model")() if "model" in options else model
    changed = runs.finetune(study_corpus, **{"steps": 6, "evaluations": 3} | changes)
    with pytest.raises(InputError, match="was begun with other settings: ") as caught:
        runs.train(other, changed, folder, **options)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert content(folder) == before


def test_another_teacher_is_another_setting(
    taught: Model, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recovery = runs.small(), runs.distill(study_corpus, evaluations=3)
    killed(monkeypatch, after_marking(2), model, recovery, tmp_path / "run", teacher=taught)
    with pytest.raises(InputError, match="other settings: teacher_sha256 was"):
        runs.train(model, recovery, tmp_path / "run", teacher=runs.small(seed=1))


def test_another_tracker_is_not(study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runs.small()
    killed(monkeypatch, after_marking(4), model, three_checkpoints(study_corpus), tmp_path / "run")
    _, outcome = runs.train(model, three_checkpoints(study_corpus, report_to="all"), tmp_path / "run")
    assert outcome.steps == 6


def test_overwriting_begins_anew(study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = runs.small(), tmp_path / "run"
    killed(monkeypatch, after_marking(4), model, three_checkpoints(study_corpus, learning_rate=None), folder)
    assert (folder / "search.json").is_file()
    other = three_checkpoints(study_corpus, learning_rate=2e-3)
    again = runs.train(model, other, folder, overwrite=True)
    assert not (folder / "search.json").exists()
    assert_equal(again, runs.train(model, other, tmp_path / "fresh"))


def test_overwriting_what_is_the_same_goes_on(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    killed(monkeypatch, after_marking(4), model, recovery, tmp_path / "run")
    steps_taken.clear()
    runs.train(model, recovery, tmp_path / "run", overwrite=True)
    assert steps_taken == [5, 6]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(
    overwrite: bool, study_corpus: str, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "mine" / "checkpoint-7" / "model.safetensors").write_text("mine too")
    before = content(tmp_path)
    with pytest.raises(OutputError, match="holds something other than a training run") as caught:
        runs.train(runs.small(), three_checkpoints(study_corpus), tmp_path / "mine", overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_an_empty_folder_and_what_a_kill_left_of_the_first_file_are_taken(study_corpus: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recovery.json.x.tmp").write_text('{"mod')
    assert runs.train(runs.small(), runs.finetune(study_corpus, steps=1), tmp_path / "run")[1].steps == 1


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/layerfold"])
def test_a_folder_that_cannot_be_written_is_one_line(where: str, study_corpus: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=f"{where}") as caught:
        runs.train(runs.small(), runs.finetune(study_corpus, steps=1), tmp_path / where)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] PytorchStreamWriter failed\nmore")],
    ids=["OSError", "torch"],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    error: Exception, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    saved = torch.save

    def save(value: Any, path: Any, **options: Any) -> None:
        if "checkpoint-4" in str(path):
            raise error
        saved(value, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OutputError, match="cannot write") as caught:
            runs.train(model, recovery, tmp_path / "run")
    assert "\n" not in str(caught.value)
    steps_taken.clear()
    again = runs.train(model, recovery, tmp_path / "run")
    assert steps_taken == [3, 4, 5, 6]
    assert_equal(again, runs.train(model, recovery, tmp_path / "whole"))


def test_a_best_checkpoint_that_was_damaged_since_is_an_error_and_not_other_weights(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [5.0, 5.0, 1.0, 5.0, 4.0, 5.0, 4.0])
    model, recovery = runs.small(), three_checkpoints(study_corpus)
    runs.train(model, recovery, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(layerfold.errors.ModelError, match="cannot be read"):
        runs.train(model, recovery, tmp_path / "run")


def test_a_run_in_a_relative_folder_is_the_same_wherever_it_is_called_from(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(runs.small(), runs.finetune(study_corpus, steps=1), Path("here"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    run()
    assert (tmp_path / "here" / "checkpoint-1").is_dir()
    assert not (tmp_path / "sub" / "here").exists()
