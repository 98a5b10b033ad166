"""Real processes: one that is killed, and two that train together."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import fresh
import pytest
import runs
from runs import Train
from tiny import assert_masks_equal, chosen, halve_, prose, shared, unequal
from torch.distributed import TCPStore

from layerfold import cli
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.model.masks import held
from layerfold.recovery.run import Outcome

STEPS = 45
EVALUATIONS = 15


def words(model: Path, corpus: str, out: Path, **settings: object) -> list[str]:
    """What is typed to fine-tune a model."""
    few = {"context": 16, "batch_size": 4, "validation_tokens": 64} | settings
    options = {"--method": "finetune", "--corpus": corpus, "--learning-rate": "1e-3", "--output-dir": str(out)}
    steps = int(str(few.pop("steps")))
    flat = [word for option in options.items() for word in option]
    return [
        *("recover", str(model), "--tokens", str(steps * runs.STEP), *flat),
        *(word for key, value in few.items() for word in ("--set", f"{key}={value}")),
    ]


def kept(folder: Path) -> tuple[Model, Outcome]:
    """What a command saved, and what it says was done."""
    model = load(folder)
    return model, Outcome(**model.provenance.steps[-1]["notes"])


def test_a_process_killed_anywhere_goes_on(tmp_path: Path, train: Train) -> None:
    model = tmp_path / "model"
    runs.small().save(model)
    out, training = tmp_path / "out", tmp_path / "out.training"
    typed = words(model, train.corpus, out, steps=STEPS, evaluations=EVALUATIONS)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    wanted, pause = chance.randint(1, 5), chance.random() * 0.1
    process = fresh.start(f"from layerfold import cli\ncli.app({typed!r})", tmp_path / "said", tmp_path)

    def reached() -> int:
        names = os.listdir(training) if training.is_dir() else []
        steps = [int(name.rpartition("-")[2]) for name in names if name.startswith("checkpoint-")]
        marked = [step for step in steps if (training / f"checkpoint-{step}" / "layerfold-training.json").is_file()]
        return max(marked, default=0)

    deadline = time.monotonic() + 300
    while reached() < 3 * wanted and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    assert fresh.finish(process) == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert 3 <= reached() < STEPS, f"seed {seed}"
    assert not out.exists()
    cli.app(typed, standalone_mode=False)
    recovery = train.finetune(steps=STEPS, evaluations=EVALUATIONS)
    straight = train(load(model), recovery, "straight")
    print(f"seed {seed}")  # what pytest shows should this fail
    runs.assert_equal(kept(out), straight)
    assert not training.exists()


def launch(code: str, folder: Path) -> str:
    """Run code in two processes, with the variables that torchrun sets, and return what they printed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "ACCELERATE_USE_CPU": True}
    processes = []
    for rank in (0, 1):
        variables = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(fresh.start(code, folder / f"said-{rank}", folder, **variables))
    codes = [fresh.finish(process) for process in processes]
    return "".join((folder / f"said-{rank}").read_text() for rank in (0, 1)) + f"\nexit codes {codes}"


SETTINGS = {"evaluations": 3, "validation_tokens": 44, "accumulation": 2, "weight_decay": 0.1}


class Together:
    """What two processes left."""

    def __init__(self, folder: Path, corpus: str) -> None:
        self.folder, self.corpus, self.model = folder, corpus, folder / "model"
        runs.small().save(self.model)
        typed = words(self.model, corpus, folder / "out", steps=6, **SETTINGS)
        self.masked = runs.small()
        halve_(self.masked.decoder)
        self.masked.decoder.keep_neurons_({1: chosen(self.masked.decoder, 1, 17)})
        self.masked.save(folder / "masked")
        self.shared = unequal(shared(runs.small()))
        self.shared.save(folder / "shared", format="compact")
        self.said = launch(f"import together\ntogether.everything({str(folder)!r}, {corpus!r}, {typed!r})", folder)

    def found(self, part: str) -> list[Any]:
        """What each process made of a part."""
        paths = [self.folder / f"{part}-{rank}.json" for rank in (0, 1)]
        assert all(path.is_file() for path in paths), self.said
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    corpus = folder / "text.txt"
    corpus.write_text("\n\n".join(prose(30, seed) for seed in range(60)))
    return Together(folder, str(corpus))


def test_two_processes_train_as_one_does(together: Together, tmp_path: Path, train: Train) -> None:
    """A step's windows are shared between them; three windows of validation text are not evenly."""
    assert together.found("command") == [None, None]
    assert together.said.count("validation perplexity") == 1, "one process speaks"
    straight = train(load(together.model), runs.finetune(together.corpus, steps=6, **SETTINGS), tmp_path / "straight")
    assert straight[1].best_step == 6
    runs.assert_equal(kept(together.folder / "out"), straight)
    assert not (together.folder / "out.training").exists()


def test_two_processes_share_the_folder_that_was_not_named(together: Together) -> None:
    one, two = together.found("folder")
    assert one == two
    assert one["best_step"] == 2


def test_a_loss_that_grows_in_one_process_is_divergence_in_both(together: Together) -> None:
    # Else that one would give the trial up, and the other wait for its gradients, for ever.
    one, two = together.found("diverging")
    assert one == two
    assert [each["learning_rate"] for each in one if each["validation"] is None] == [3e-3]


def test_a_process_that_comes_late_finds_the_folder_of_this_run(together: Together) -> None:
    one, two = together.found("overwriting")
    assert one == two
    assert one["rate"] == 2e-3


def test_two_processes_hold_the_zeros_that_one_does(together: Together, train: Train) -> None:
    one, two = together.found("masked")
    assert one == two
    masks = held(together.masked.decoder)
    assert one["masks"] == len(masks) > 0
    assert one["widths"] == [64, 17]
    recovery = runs.finetune(together.corpus, steps=6, accumulation=2, weight_decay=0.1, learning_rate=3e-3)
    straight = train(together.masked, recovery, "straight")
    assert straight[1].best_step == 6
    runs.assert_equal(kept(together.folder / "masked.out"), straight)
    trained = load(together.folder / "masked.out")
    assert_masks_equal(held(trained.decoder), masks)
    assert all(not trained.decoder.model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert trained.decoder.size() == together.masked.decoder.size()


def test_two_processes_train_what_blocks_share_as_one_does(together: Together, tmp_path: Path, train: Train) -> None:
    # Deltas of rank 0 get no gradients: processes that waited for them would not go on.
    one, two = together.found("shared")
    assert one == two
    for kind in (runs.lowrank, runs.finetune):
        straight = train(together.shared, kind(together.corpus, steps=4, accumulation=2), tmp_path / kind.__name__)
        assert straight[1].best_step == 4
        trained = kept(together.folder / f"shared-{kind.__name__}")
        runs.assert_equal(trained, straight)
        runs.assert_shared(trained[0], together.shared)
