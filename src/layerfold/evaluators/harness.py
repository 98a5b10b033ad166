"""Tasks of EleutherAI's lm-evaluation-harness, and a user's own tasks in its format."""

from __future__ import annotations

import contextlib
import copy
import functools
import glob
import io
import logging
import math
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import quiet
from layerfold.errors import InputError, MissingExtraError, first_line, nearest
from layerfold.evaluators.base import Evaluator, Score
from layerfold.files import hash_file, hash_json
from layerfold.progress import SILENT, Progress
from layerfold.text.sources import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRACTIONS = ("acc", "acc_norm", "exact_match")
"""Metrics that are a fraction of a task's documents, of which higher is better."""
PREFERRED = (*FRACTIONS, "word_perplexity")
"""A task's figure is the first of these metrics that it reports, else its first metric."""

_LEAST = {"limit": 1, "num_fewshot": 0, "batch_size": 1, "seed": 0}
_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
_BATCHES_A_STEP = 16
_RESAMPLES = 1000


@dataclass(frozen=True)
class Harness(Evaluator):
    """Figures of lm-evaluation-harness, computed by it: one for each task, with an interval of 1.96 standard errors.

    A task's figure is the metric given by `PREFERRED`, under its first filter. The record keeps all other metrics too.
    The score's own value is the figure of a single task. For several tasks it is the unweighted mean of the figures
    that are `FRACTIONS`, or, without any, of those with the first task's metric; ``mean_of`` names the tasks in it. The
    bounds of a mean assume independent tasks, and exact figures where a task reports no standard error.

    A prompt longer than the model's context loses its beginning, as in the harness.

    Attributes:
        tasks: names of tasks and groups. A group that the harness does not aggregate, or a tag, means its tasks.
        limit: number of documents of each task, the first ones; None takes all.
        num_fewshot: number of solved examples in each prompt; None takes the task's own. A task that fixes it at 0
            keeps 0, as in the harness.
        batch_size: prompts in a batch.
        include_path: folder of task files; the code that they name is run.
        seed: seed of the examples, and of the sampling of tasks that sample.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    include_path: str | None = None
    seed: int = 0
    name: ClassVar[str] = "lm-eval"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("lm-eval tasks []; accepted: one or more, in a recipe, as lm-eval: {tasks: [hellaswag]}")
        _check_once(self.tasks)
        for setting, least in _LEAST.items():
            value = getattr(self, setting)
            if value is not None and not least <= value < 2**32:
                raise InputError(f"lm-eval {setting} {value}; accepted: {least} or more, below 2**32")
        if self._folder is not None and not self._folder.is_dir():
            raise InputError(f"lm-eval include_path: no folder at {self.include_path!r}")

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figures besides the model; reads no data from the Hub."""
        metadata = {task: (self._register.task_index[task].cfg or {}).get("metadata") for task in self.tasks}
        return {
            "tasks": list(self.tasks),
            "versions": {task: known.get("version") for task, known in metadata.items() if isinstance(known, dict)},
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "seed": self.seed,
            "lm_eval": version("lm_eval"),
            "own_tasks_sha256": self._own_tasks_sha256,
            "vocabulary_sha256": _vocabulary_sha256(model.require_tokenizer()),
        }

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Run the tasks."""
        with progress.doing("lm-eval, finding the tasks"):
            settings = self.settings(model)
        with _apart(self.seed):
            loaded = {task: self._load(task) for task in progress.track(self.tasks, "lm-eval, reading tasks")}
            _check_once([name for each in loaded.values() for name in each["tasks"]])
            merged = {
                kind: {name: entry for each in loaded.values() for name, entry in each[kind].items()}
                for kind in ("tasks", "groups")
            }
            results = self._run(model, merged, progress)
        whole = {name for name, group in merged["groups"].items() if group.has_aggregation}
        names = [name for task, each in loaded.items() for name in ([task] if task in whole else each["tasks"])]
        figures = {name: _figure(name, results) for name in names}
        members = {name: _figure(name, results) for name in results["n-samples"] if name not in figures}
        return _score(figures, {**settings, "tasks": figures, "members": members})

    @property
    def _folder(self) -> Path | None:
        return None if self.include_path is None else Path(self.include_path).expanduser()

    @cached_property
    def _register(self) -> Any:
        """The harness's task manager; it skips the harness's own tasks, which take long to read, if none is named."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError("lm-eval", "lm-eval") from error
        with _apart(self.seed):
            register = TaskManager(include_path=self._folder, include_defaults=False)
            if not set(self.tasks) <= set(register.all_subtasks):
                for name, entry in _built_in_tasks().items():
                    register.task_index.setdefault(name, entry)
        for task in self.tasks:
            if task not in register.task_index:
                # Lists the folder's tasks: a file whose task is missing there is one that the harness cannot read.
                here = f" and, in {self.include_path!r}, {', '.join(register.all_tasks) or 'none'}"
                known = f"accepted: those of lm-eval {version('lm_eval')}{here if self.include_path else ''}"
                raise InputError(f"unknown lm-eval task {task!r}; {nearest(task, register.task_index)}{known}")
        return register

    @cached_property
    def _own_tasks_sha256(self) -> str | None:
        """Hash of the folder's task files and of the local data that its tasks name, neither of which has a version."""
        if (folder := self._folder) is None:
            return None
        files = {path for path in folder.rglob("*") if path.suffix in (".yaml", ".py") and path.is_file()}
        tasks = self._register.task_index
        files |= {path for name in self._register.all_tasks for path in _local_data(tasks[name].cfg or {})}
        return hash_json([hash_file(path) for path in sorted(files)])

    def _load(self, task: str) -> Mapping[str, Any]:
        """Read the data of a task, or of a group's tasks; return tasks and groups by name."""
        with loading(f"data of lm-eval task {task!r}", InputError):
            loaded: Mapping[str, Any] = self._register.load([task])
        for each in loaded["tasks"].values():
            own = each.get_config("num_fewshot")
            if own is None or (own and self.num_fewshot is not None):
                each.set_config("num_fewshot", self.num_fewshot or 0)
            each.set_fewshot_seed(self.seed)
        return loaded

    def _run(self, model: Model, tasks: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        from lm_eval import evaluate  # simple_evaluate also runs git and probes the machine, at each call
        from lm_eval.models.huggingface import HFLM

        context = model.decoder.context
        try:
            # Copies, since it changes the settings of the model and the tokenizer; the weights are shared.
            lm = HFLM(
                pretrained=model.decoder.copy(share=True).model,
                tokenizer=copy.deepcopy(model.require_tokenizer()),
                backend="causal",
                batch_size=self.batch_size,
                max_length=context,
            )
            for kind in _REQUESTS:
                setattr(lm, kind, partial(_answer, getattr(lm, kind), self.batch_size * _BATCHES_A_STEP, progress))
            options = {"limit": self.limit, "bootstrap_iters": _RESAMPLES, "log_samples": False}
            results: Mapping[str, Any] = evaluate(lm=lm, task_dict=tasks, **options)
        except Exception as error:  # many kinds, all due to a task that does not fit the model
            bare = isinstance(error, AssertionError) and not str(error)
            said = f"an answer that is empty, or longer than the context of {context}" if bare else first_line(error)
            raise InputError(f"lm-eval tasks {', '.join(self.tasks)} cannot be run: {said}") from error
        return results


def _check_once(tasks: Sequence[str]) -> None:
    if twice := [task for task, count in Counter(tasks).items() if count > 1]:
        raise InputError(f"lm-eval task {twice[0]!r} is named twice")


def _answer(answer: Callable[..., list[Any]], step: int, progress: Progress, requests: Sequence[Any]) -> list[Any]:
    """Answer requests a few batches at a time, to show the progress."""
    steps = [requests[first : first + step] for first in range(0, len(requests), step)]
    return [each for some in progress.track(steps, "lm-eval, requests") for each in answer(some)]


def _figure(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's record: its figure, and all metrics by the harness's names, ``metric,filter``."""
    reported = {key: value for key, value in results["results"][name].items() if "," in key}
    metrics = {key: float(value) if isinstance(value, Real) else None for key, value in reported.items()}
    keys = [key for key, value in metrics.items() if value is not None and "_stderr," not in key]
    if not keys:
        raise InputError(f"lm-eval task {name!r} reports no figure")
    key = min(keys, key=lambda key: [*PREFERRED, metric := key.rpartition(",")[0]].index(metric))
    metric, _, filtered = key.rpartition(",")
    value = float(reported[key])
    error = metrics.get(f"{metric}_stderr,{filtered}") or 0.0
    return {
        "value": value,
        "low": value - 1.96 * error,
        "high": value + 1.96 * error,
        "standard_error": error,
        "unit": "fraction" if metric in FRACTIONS else metric,
        "lower_is_better": results["higher_is_better"].get(name, {}).get(metric) is False,
        "metric": metric,
        "filter": filtered,
        "version": results["versions"].get(name),
        "samples": results["results"][name].get("sample_len"),
        "num_fewshot": results["n-shot"].get(name),
        "metrics": metrics,
    }


def _score(figures: Mapping[str, dict[str, Any]], details: Mapping[str, Any]) -> Score:
    """Return the mean of the comparable figures."""
    metric = next(iter(figures.values()))["metric"]
    chosen = {name: each for name, each in figures.items() if len(figures) == 1 or each["unit"] == "fraction"}
    chosen = chosen or {name: each for name, each in figures.items() if each["metric"] == metric}
    value = sum(each["value"] for each in chosen.values()) / len(chosen)
    margin = 1.96 * (math.hypot(*(each["standard_error"] for each in chosen.values())) / len(chosen))
    metrics = ", ".join(dict.fromkeys(each["metric"] for each in chosen.values()))
    unit = metrics if len(chosen) == 1 else f"mean {metrics}"
    lower = next(iter(chosen.values()))["lower_is_better"]
    return Score(value, value - margin, value + margin, unit, lower, {"mean_of": list(chosen), **details})


@functools.cache
def _built_in_tasks() -> Mapping[str, Any]:
    """The harness's own tasks by name; reads more than ten thousand files, once."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _local_data(config: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the files on this machine that a task's configuration names as its data."""
    waiting = [config.get("dataset_kwargs")]
    for named in waiting:  # grows during the loop
        if isinstance(named, str):
            yield from filter(Path.is_file, map(Path, glob.glob(named, recursive=True)))
        elif isinstance(named, dict | list):
            waiting += named.values() if isinstance(named, dict) else named


@functools.lru_cache(maxsize=4)
def _vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hash_json(tokenizer.get_vocab())


@contextlib.contextmanager
def _apart(seed: int) -> Iterator[None]:
    """Isolate the harness: no output, no further processes, and random numbers that leave the caller's as they were."""
    from tqdm import tqdm

    def undrawn(bar: Any, *arguments: Any, **settings: Any) -> None:
        drawn(bar, *arguments, **settings | {"disable": True})

    drawn = tqdm.__init__
    bars, alone = patch.object(tqdm, "__init__", undrawn), patch.dict(os.environ, DISABLE_MULTIPROC="1")
    with contextlib.ExitStack() as stack:
        for context in (quiet(), contextlib.redirect_stdout(io.StringIO()), bars, alone, torch.random.fork_rng()):
            stack.enter_context(context)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(logging.disable, logging.root.manager.disable)
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        logging.disable()
        for start in (random.seed, np.random.seed, torch.manual_seed):
            start(seed)
        yield
