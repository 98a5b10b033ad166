"""Runs that are killed, anywhere, and called again: the same weights, the same curve, nothing done twice."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from tiny import refused

import layerfold
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, OutputError, TrainingError
from layerfold.methods import Collapse
from layerfold.recovery import Recovery, callbacks
from layerfold.recovery import trainer as training
from layerfold.recovery.arguments import training_arguments
from layerfold.recovery.run import Run
from layerfold.recovery.text import training_text

MARKER = "layerfold-training.json"


def in_method(owner: Any, name: str, step: int, before: Callable[[Any], None] | None = None) -> runs.Patch:
    """Where a method of the trainer is called at a step; `before` leaves something half-done."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            state = self.state if hasattr(self, "state") else arguments[1]
            if state.global_step != step:
                return original(self, *arguments, **options)
            if before is not None:
                before(Path((self.args if hasattr(self, "args") else arguments[0]).output_dir) / f"checkpoint-{step}")
            raise runs.Killed

        monkeypatch.setattr(owner, name, method)

    return patch


def after_marking(step: int) -> runs.Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = callbacks.Bookkeeper.on_save

        def on_save(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
            original(self, args, state, control, **rest)
            if state.global_step == step:
                raise runs.Killed

        monkeypatch.setattr(callbacks.Bookkeeper, "on_save", on_save)

    return patch


def half_a_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"\x00" * 1000)


def half_a_marker(folder: Path) -> None:
    (folder / f".{MARKER}.abc.tmp").write_text('{"secon')


def removing(lost: str) -> runs.Patch:
    """In the midst of removing an older checkpoint, once one of its files has gone."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = shutil.rmtree

        def rmtree(path: Any, *arguments: Any, **options: Any) -> None:
            if not Path(path).name.startswith("checkpoint-"):
                return original(path, *arguments, **options)
            (Path(path) / lost).unlink(missing_ok=True)
            raise runs.Killed

        monkeypatch.setattr(shutil, "rmtree", rmtree)

    return patch


Trainer = training.RecoveryTrainer
Bookkeeper = callbacks.Bookkeeper


def three_checkpoints(corpus: str, **changes: Any) -> Recovery:
    return runs.finetune(corpus, **{"steps": 6, "evaluations": 3} | changes)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def _begun(study_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = Train(study_corpus, tmp_path_factory.mktemp("begun"))
    train.killed(after_marking(4), runs.small(), three_checkpoints(study_corpus))
    return train.folder / "run"


@pytest.fixture
def begun(_begun: Path, tmp_path: Path) -> Path:
    """The folder of `three_checkpoints` of the small model, killed once the second checkpoint was whole."""
    return shutil.copytree(_begun, tmp_path / "run")


def test_a_run_killed_at_every_step_ends_as_if_it_never_was(
    straight: Any, steps_taken: list[int], train: Train
) -> None:
    model, recovery = runs.small(), three_checkpoints(train.corpus, weight_decay=0.1, learning_rate=3e-3)
    whole = straight(model, recovery)
    assert whole[1].best_step == 6
    steps_taken.clear()
    for step in range(1, 7):
        train.killed(step, model, recovery)
    runs.assert_equal(train(model, recovery), whole)
    # Step 2 was lost before it was written, and step 3 went on after it had been done again.
    assert steps_taken == [1, 1, 2, 1, 2, 3, 3, 4, 3, 4, 5, 5, 6, 5, 6]


@pytest.mark.parametrize(
    ("patch", "goes_on_from"),
    [
        pytest.param(in_method(Trainer, "_save", 2, half_a_file), 0, id="first weights"),
        pytest.param(in_method(Trainer, "_save", 4, half_a_file), 2, id="weights"),
        pytest.param(in_method(Trainer, "_save_optimizer_and_scheduler", 4), 2, id="optimizer"),
        pytest.param(in_method(Trainer, "_save_rng_state", 4), 2, id="generators"),
        pytest.param(in_method(Bookkeeper, "on_save", 4), 2, id="marker"),
        pytest.param(in_method(Bookkeeper, "on_save", 4, half_a_marker), 2, id="half a marker"),
        pytest.param(in_method(Bookkeeper, "on_save", 6), 4, id="last marker"),
        pytest.param(after_marking(6), 6, id="after the last"),
    ],
)
def test_a_checkpoint_counts_once_it_is_whole(
    patch: runs.Patch, goes_on_from: int, straight: Any, tmp_path: Path, steps_taken: list[int], train: Train
) -> None:
    model, recovery = runs.small(), three_checkpoints(train.corpus)
    train.killed(patch, model, recovery)
    whole = straight(model, recovery)
    steps_taken.clear()
    runs.assert_equal(train(model, recovery), whole)
    assert steps_taken == list(range(goes_on_from + 1, 7))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"], "the newest and best"


def test_a_checkpoint_that_was_being_removed_is_not_gone_on_from(tmp_path: Path, validation: Any, train: Train) -> None:
    # Without its optimizer training would silently go on with a fresh one.
    validation([5.0, 5.0, 1.0, 5.0, 4.0, 5.0, 4.0, 5.0, 0.5])  # the first checkpoint stays till the last
    model, recovery = runs.small(), train.finetune(steps=8, evaluations=4, learning_rate=1e-2)
    whole = train(model, recovery, "whole")
    assert whole[1].best_step == 8
    for lost in ("optimizer.pt", "model.safetensors", "trainer_state.json", MARKER):
        folder = tmp_path / lost
        train.killed(removing(lost), model, recovery, folder)
        assert not (folder / "checkpoint-4" / lost).exists()
        runs.assert_equal(train(model, recovery, folder), whole)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"accumulation": 2}), ("gpt2", {"freeze": ("*.wte.*",), "schedule": "cosine", "warmup": 0.5})],
    ids=["gated, in pieces", "frozen"],
)
def test_whatever_is_trained_goes_on_as_it_was(
    family: str, settings: dict[str, Any], straight: Any, train: Train
) -> None:
    model, recovery = runs.small(family), three_checkpoints(train.corpus, **settings)
    train.killed(5, model, recovery)
    again = train(model, recovery)
    runs.assert_equal(again, straight(model, recovery))
    assert again[0].decoder.size() == model.decoder.size()


def test_distillation_goes_on_as_it_was(taught: Model, straight: Any, tmp_path: Path, train: Train) -> None:
    model = layerfold.compress(taught, Collapse(n=2, align="none"))
    recovery = train.distill(evaluations=3, hidden_weight=0.5, temperature=2.0, learning_rate=None)
    train.killed(3, model, recovery, teacher=taught)
    tried = (tmp_path / "run" / "search.json").read_bytes()
    again = train(model, recovery, teacher=taught)
    assert (tmp_path / "run" / "search.json").read_bytes() == tried
    runs.assert_equal(again, straight(model, recovery, teacher=taught))


def test_points_of_the_curve_that_span_several_steps_are_the_same(
    monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.setattr("layerfold.recovery.arguments._CURVE_POINTS", 2)  # as with 400 steps and more
    model, recovery = runs.small(), three_checkpoints(train.corpus)
    train.killed(5, model, recovery)
    again = train(model, recovery)
    assert [tokens for tokens, _ in again[1].curve["train"]] == [192, 384]
    runs.assert_equal(again, train(model, recovery, "whole"))


@pytest.mark.parametrize(("steps", "evaluations"), [(90, 4), (404, 4), (808, 4), (1000, 1), (1009, 3), (10_000, 7)])
def test_a_curve_has_points_enough_to_be_drawn_and_few_enough_to_be_kept(
    steps: int, evaluations: int, tmp_path: Path, train: Train
) -> None:
    recovery = train.finetune(steps=4, evaluations=evaluations)
    text = replace(training_text(runs.small(), recovery, 0), steps=steps)
    arguments = training_arguments(recovery, text, 1e-3, tmp_path, True)
    assert arguments.save_steps % arguments.logging_steps == 0, "a run resumed there would lose part of a point"
    assert min(steps, 100) <= steps // arguments.logging_steps <= 400


def test_a_run_that_patience_stopped_stays_stopped(steps_taken: list[int], validation: Any, train: Train) -> None:
    validation([5.0, 5.0, 4.0, 5.0, 4.5, 5.0, 4.6, 5.0, 1.0])
    model = runs.small()
    recovery = train.finetune(steps=8, evaluations=4, patience=2)
    whole = train(model, recovery, "whole")
    assert (whole[1].steps, whole[1].best_step) == (6, 2)
    for where in (3, 5, after_marking(6)):
        train.killed(where, model, recovery)
    steps_taken.clear()
    runs.assert_equal(train(model, recovery), whole)
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
def test_a_folder_that_was_moved_goes_on_and_once_done_is_not_done_again(
    nats: list[float], best: int, tmp_path: Path, steps_taken: list[int], validation: Any, train: Train
) -> None:
    validation(nats)
    model, recovery, moved = runs.small(), three_checkpoints(train.corpus), tmp_path / "deep" / "moved"
    whole = train(model, recovery, "whole")
    train.killed(5, model, recovery)
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    again = train(model, recovery, moved)
    assert again[1].best_step == best
    runs.assert_equal(again, whole)
    assert not (tmp_path / "run").exists()
    steps_taken.clear()
    runs.assert_equal(train(model, recovery, moved), whole)
    if best:  # damaged since
        weights = moved / f"checkpoint-{best}" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        with pytest.raises(layerfold.errors.ModelError, match="cannot be read"):
            train(model, recovery, moved)
    assert steps_taken == []


def test_a_folder_that_was_copied_goes_on_in_the_copy_alone(tmp_path: Path, validation: Any, train: Train) -> None:
    validation([5.0, 5.0, 1.0, 5.0, 4.0, 5.0, 4.0])
    model, recovery = runs.small(), three_checkpoints(train.corpus)
    train.killed(5, model, recovery)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = content(tmp_path / "run")
    again = train(model, recovery, "copy")
    assert content(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run")
    runs.assert_equal(train(model, recovery, "copy"), again)


def test_the_time_is_that_of_all_attempts_and_the_first_loss_that_of_the_first(begun: Path, train: Train) -> None:
    model, recovery = runs.small(), three_checkpoints(train.corpus)
    marker = begun / "checkpoint-4" / MARKER
    before = json.loads(marker.read_text())
    assert before["first_loss"] > 1
    marker.write_text(json.dumps(before | {"first_loss": 0.1}))
    with pytest.raises(TrainingError, match=r"from 0\.1 to .* last good checkpoint is .*checkpoint-4$"):
        train(model, recovery, begun)
    marker.write_text(json.dumps(before | {"seconds": 1000.0}))
    _, outcome = train(model, recovery, begun)
    assert 1000 < outcome.seconds < 1060


# Settings that changed, folders that may not or cannot be written


@pytest.mark.parametrize(
    ("changes", "options", "key"),
    [
        ({"learning_rate": 2e-3}, {}, "learning_rate was 0.001 and is 0.002"),
        ({"tokens": 448}, {}, "tokens was 384 and is 448"),
        ({"freeze": ("*.wte.*",)}, {}, "freeze was"),
        ({"evaluations": 2}, {}, "evaluations was 3 and is 2"),
        ({"accumulation": 2}, {}, "accumulation was 1 and is 2"),
        ({}, {"seed": 1}, "seed was 0 and is 1"),
        ({}, {"model_seed": 1}, "model_sha256 was"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_changed_are_named_and_nothing_is_touched(
    changes: dict[str, Any], options: dict[str, int], key: str, begun: Path, train: Train
) -> None:
    before = content(begun)
    other = runs.small(seed=options.pop("model_seed", 0))
    with refused(InputError, "(?=.{,499}$).*was begun with other settings: ", says=key):
        train(other, three_checkpoints(train.corpus, **changes), begun, **options)
    assert content(begun) == before


def test_another_teacher_is_another_setting(taught: Model, train: Train) -> None:
    model, recovery = runs.small(), train.distill(evaluations=3)
    train.killed(after_marking(2), model, recovery, teacher=taught)
    with pytest.raises(InputError, match="other settings: teacher_sha256 was"):
        train(model, recovery, teacher=runs.small(seed=1))


@pytest.mark.parametrize("changes", [{"report_to": "all"}, {"overwrite": True}], ids=str)
def test_another_tracker_is_no_other_setting_nor_does_overwriting_begin_what_is_the_same_anew(
    changes: dict[str, Any], begun: Path, steps_taken: list[int], train: Train
) -> None:
    overwrite = changes.pop("overwrite", False)
    train(runs.small(), three_checkpoints(train.corpus, **changes), begun, overwrite=overwrite)
    assert steps_taken == [5, 6]


def test_overwriting_begins_anew(begun: Path, straight: Any, train: Train) -> None:
    (begun / "search.json").write_text("[]")
    model, other = runs.small(), three_checkpoints(train.corpus, learning_rate=2e-3)
    runs.assert_equal(train(model, other, begun, overwrite=True), straight(model, other))
    assert not (begun / "search.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(overwrite: bool, tmp_path: Path, train: Train) -> None:
    (tmp_path / "mine" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "mine" / "checkpoint-7" / "model.safetensors").write_text("mine too")
    before = content(tmp_path)
    with refused(OutputError, "holds something other than a training run"):
        train(runs.small(), three_checkpoints(train.corpus), "mine", overwrite=overwrite)
    assert content(tmp_path) == before


def test_an_empty_folder_and_what_a_kill_left_of_the_first_file_are_taken(tmp_path: Path, train: Train) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recovery.json.x.tmp").write_text('{"mod')
    assert train(runs.small(), train.finetune(steps=1))[1].steps == 1


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/layerfold"])
def test_a_folder_that_cannot_be_written_is_one_line(where: str, tmp_path: Path, train: Train) -> None:
    (tmp_path / "file").write_text("mine")
    with refused(OutputError, f"{where}"):
        train(runs.small(), train.finetune(steps=1), where)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] PytorchStreamWriter failed\nmore")],
    ids=["OSError", "torch"],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    error: Exception, straight: Any, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int], train: Train
) -> None:
    model, recovery = runs.small(), three_checkpoints(train.corpus)
    whole, saved = straight(model, recovery), torch.save

    def save(value: Any, path: Any, **options: Any) -> None:
        if "checkpoint-4" in str(path):
            raise error
        saved(value, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with refused(OutputError, "cannot write"):
            train(model, recovery)
    steps_taken.clear()
    runs.assert_equal(train(model, recovery), whole)
    assert steps_taken == [3, 4, 5, 6]


def test_a_run_in_a_relative_folder_is_the_same_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(runs.small(), train.finetune(steps=1), Path("here"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    run()
    assert (tmp_path / "here" / "checkpoint-1").is_dir()
    assert not (tmp_path / "sub" / "here").exists()
