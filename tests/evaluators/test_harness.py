"""Tasks of the harness, written here with their data: against figures computed from the model's own logits."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.tasks._index import TaskIndex
from tiny import Write, prose, shared, tiny, tokenizer, unequal

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, MissingExtraError, OfflineError, RecipeError
from layerfold.evaluators import Harness, Score, harness
from layerfold.methods import Merge
from layerfold.records import BASE_LABEL
from layerfold.report import print_report, study_report, write_csv
from layerfold.report.study import table
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{prose(3, seed)} is", "choices": [prose(1, seed + 20), prose(2, seed + 40)], "label": seed % 2}
    for seed in range(9)
]
TEXTS = [{"text": prose(words, words)} for words in (4, 30, 9)]  # one longer than the context
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
LAST_WORD = """
output_type: loglikelihood
doc_to_text: "the river"
doc_to_target: " {{question}}"
metric_list: [{metric: perplexity}]
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " the"
generation_kwargs: {max_gen_toks: 3, until: ["\\n"], do_sample: SAMPLE, temperature: 1.0}
metric_list: [{metric: exact_match}]
"""
WriteTask = Callable[..., str]


@pytest.fixture
def write_task(write: Write, tmp_path: Path) -> WriteTask:
    """Write a task and its data; return the folder of tasks."""

    def write_task(name: str, body: str, documents: list[dict[str, Any]] | None = None, more: str = "") -> str:
        data = write(f"data/{name}.jsonl", "\n".join(map(json.dumps, QUESTIONS if documents is None else documents)))
        source = f"dataset_kwargs: {{data_files: {{test: ['{data}']}}, cache_dir: '{tmp_path / 'cache'}'}}"
        header = f"task: {name}\ndataset_path: json\n{source}\ntest_split: test\nmetadata: {{version: 3}}\n"
        return str(write(f"tasks/{name}.yaml", header + body + more).parent)

    return write_task


@pytest.fixture
def tasks(write_task: WriteTask) -> str:
    """A folder with a task of each kind."""
    write_task("rolling", ROLLING, TEXTS)
    write_task("last_word", LAST_WORD)
    return write_task("choosing", CHOICE)


@pytest.fixture
def few_built_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the harness read one of its own files alone, not more than ten thousand."""

    def files(root: Path) -> list[Path]:
        return sorted(root.glob("hellaswag/hellaswag.yaml" if (root / "hellaswag").is_dir() else "*.yaml"))

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", files)
    harness._built_in_tasks.cache_clear()
    yield
    harness._built_in_tasks.cache_clear()


@torch.no_grad()
def nats(model: Model, context: list[int], tokens: list[int]) -> float:
    """Negative log-likelihood of tokens after a context, from one plain forward pass."""
    ids = torch.tensor([context + tokens])
    logits = model.decoder.model(input_ids=ids[:, :-1]).logits[0, len(context) - 1 :].double()
    return -float(logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum())


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text)["input_ids"]
    return ids


def right(model: Model, question: dict[str, Any]) -> bool:
    """Whether the right answer is the likeliest."""
    context = encode(question["question"])
    found = []
    for choice in question["choices"]:
        whole = encode(f"{question['question']} {choice}")
        assert whole[: len(context)] == context
        found.append(nats(model, context, whole[len(context) :]))
    return int(np.argmin(found)) == question["label"]


def permuted(model: Model) -> None:
    for block in model.decoder.blocks:
        block.ffn.permute_(torch.randperm(block.ffn.d_ffn, generator=torch.Generator().manual_seed(block.index)))


def without_parts(model: Model) -> None:
    model.decoder.remove_("ffn", [1])
    model.decoder.remove_("attention", [2])


EDITS: list[Callable[[Model], Any]] = [
    permuted,
    without_parts,
    lambda model: Merge(n=2, align="none").apply(model.decoder, None),
    lambda model: model.decoder.keep_([0, 2]),
    shared,
    lambda model: unequal(shared(model)),
]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_accuracy_is_that_of_the_models_own_likelihoods(family: str, tasks: str) -> None:
    model = tiny(family)
    score = Harness(("choosing",), include_path=tasks)(model)
    hits = np.array([right(model, question) for question in QUESTIONS], dtype=float)
    error = hits.std(ddof=1) / 3
    assert 0 < hits.mean() < 1
    assert (score.value, score.low, score.high) == pytest.approx(
        (hits.mean(), hits.mean() - 1.96 * error, hits.mean() + 1.96 * error)
    )
    assert (score.unit, score.lower_is_better) == ("acc", False)
    entry = score.details["tasks"]["choosing"]
    assert entry["metrics"].keys() == {"acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"}
    del entry["metrics"]
    assert entry == {
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "standard_error": pytest.approx(error),
        "unit": "fraction",
        "lower_is_better": False,
        "metric": "acc",
        "filter": "none",
        "version": 3,
        "samples": 9,
        "num_fewshot": 0,
    }


def test_perplexity_is_that_of_windows_of_the_context_or_has_its_error_from_a_bootstrap(tasks: str) -> None:
    model = tiny("gpt2")
    score = Harness(("rolling",), include_path=tasks)(model)
    total = 0.0
    for document in TEXTS:
        ids, context = encode(document["text"]), model.decoder.context
        total += nats(model, [tokenizer().eos_token_id], ids[:context])
        # A later window is as long as the context, of which only what is new is scored.
        for start in range(context, len(ids), context):
            end = min(start + context, len(ids))
            total += nats(model, ids[end - context - 1 : start], ids[start:end])
    assert max(len(encode(document["text"])) for document in TEXTS) > model.decoder.context
    words = sum(len(document["text"].split()) for document in TEXTS)
    size = sum(len(document["text"].encode()) for document in TEXTS)
    assert score.value == pytest.approx(math.exp(total / words), rel=1e-4)
    assert score.low == score.value == score.high  # the harness has no standard error of it
    assert (score.unit, score.lower_is_better) == ("word_perplexity", True)  # not the first of its metrics
    metrics = score.details["tasks"]["rolling"]["metrics"]
    assert metrics["bits_per_byte,none"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert metrics["word_perplexity_stderr,none"] is None
    score = Harness(("last_word",), include_path=tasks)(model)
    context = encode("the river")
    each = [nats(model, context, encode(f"the river {document['question']}")[len(context) :]) for document in QUESTIONS]
    assert score.value == pytest.approx(math.exp(np.mean(each)), rel=1e-4)
    assert score.low < score.value < score.high
    assert score.unit == "perplexity"


def test_variants_are_measured_as_they_are(tasks: str) -> None:
    def bits(score: Score) -> float:
        found: float = score.details["tasks"]["rolling"]["metrics"]["bits_per_byte,none"]
        return found

    harness = Harness(("choosing", "rolling"), include_path=tasks)
    base = bits(harness(tiny("llama")))
    for edit in EDITS:
        model = tiny("llama")
        edit(model)
        score = harness(model)
        assert score.value == pytest.approx(np.mean([right(model, question) for question in QUESTIONS]))
        assert (bits(score) == pytest.approx(base, rel=1e-4)) == (edit is permuted)


def test_the_size_of_a_batch_changes_no_figure(tasks: str) -> None:
    model, names = tiny("mistral"), ("choosing", "rolling", "last_word")
    one, other = (Harness(names, include_path=tasks, batch_size=size) for size in (1, 5))
    assert one.settings(model) == other.settings(model)
    found, again = ([task["metrics"] for task in each(model).details["tasks"].values()] for each in (one, other))
    for metrics, others in zip(found, again, strict=True):
        assert metrics.keys() == others.keys()
        for name, value in metrics.items():
            assert others[name] == (None if value is None else pytest.approx(value, rel=1e-4)), name


def test_of_several_tasks_the_value_is_the_mean_of_fractions_or_of_the_first_metric(
    tasks: str, write_task: WriteTask
) -> None:
    model = tiny("gpt2")
    write_task("other", CHOICE.replace("[{metric: acc}, ", "["), QUESTIONS[:4])
    write_task("texts", ROLLING, TEXTS[:1])
    every = ("rolling", "choosing", "last_word", "other", "texts")
    score = Harness(every, include_path=tasks)(model)
    found = score.details["tasks"]
    assert list(found) == list(every)
    assert found["other"]["metric"] == "acc_norm"
    assert score.details["mean_of"] == ["choosing", "other"]
    assert score.unit == "mean acc, acc_norm"
    assert score.value == pytest.approx((found["choosing"]["value"] + found["other"]["value"]) / 2)
    errors = [found[name]["standard_error"] for name in ("choosing", "other")]
    assert score.high - score.value == pytest.approx(1.96 * math.hypot(*errors) / 2)
    without = Harness(("rolling", "last_word", "texts"), include_path=tasks)(model)
    assert without.details["mean_of"] == ["rolling", "texts"]
    assert without.value == pytest.approx((found["rolling"]["value"] + found["texts"]["value"]) / 2)
    assert (without.unit, without.lower_is_better) == ("mean word_perplexity", True)


@pytest.mark.usefixtures("few_built_in")
def test_a_group_has_the_figure_that_the_harness_makes_of_it(tasks: str, write: Write, write_task: WriteTask) -> None:
    write_task("other", CHOICE, QUESTIONS[:4], "tag: asking\n")
    metric = "{metric: acc, aggregation: mean, weight_by_size: true}"
    write("tasks/both.yaml", f"group: both\ntask: [choosing, other]\naggregate_metric_list: [{metric}]\n")
    write("tasks/loose.yaml", "group: loose\ntask: [choosing, other]\n")
    model = tiny("gpt2")
    score, loose, tag = (Harness((name,), include_path=tasks)(model) for name in ("both", "loose", "asking"))
    with pytest.raises(InputError, match="lm-eval task 'choosing' is named twice"):
        Harness(("both", "choosing"), include_path=tasks)(model)
    hits = [right(model, question) for question in (*QUESTIONS, *QUESTIONS[:4])]
    assert score.value == pytest.approx(np.mean(hits))
    assert list(score.details["tasks"]) == ["both"]
    assert score.details["tasks"]["both"]["samples"] == 13
    assert list(score.details["members"]) == list(loose.details["tasks"]) == ["choosing", "other"]
    assert loose.details["tasks"] == score.details["members"]
    assert tag.details["tasks"] == {"other": loose.details["tasks"]["other"]}


def test_the_limit_and_the_examples(tasks: str, write_task: WriteTask) -> None:
    write_task("fixed", CHOICE, more="num_fewshot: 0\n")
    model = tiny("gpt2", n_positions=128)
    score = Harness(("choosing",), include_path=tasks, limit=4)(model)
    assert score.value == pytest.approx(np.mean([right(model, question) for question in QUESTIONS[:4]]))
    assert score.details["tasks"]["choosing"]["samples"] == 4
    shown = Harness(("last_word", "fixed"), include_path=tasks, num_fewshot=2)
    found = shown(model).details["tasks"]
    assert (found["last_word"]["num_fewshot"], found["fixed"]["num_fewshot"]) == (2, 0)
    assert shown(model) == shown(model)
    reseeded = Harness(("last_word",), include_path=tasks, num_fewshot=2, seed=1)(model)
    assert reseeded.value != found["last_word"]["value"]  # other examples


@pytest.mark.parametrize("sample", [False, True])
def test_tasks_that_write(write_task: WriteTask, sample: bool) -> None:
    folder = write_task("writing", WRITING.replace("SAMPLE", str(sample).lower()), QUESTIONS[:4])
    model = tiny("gpt2")
    score = Harness(("writing",), include_path=folder)(model)
    assert score.details["tasks"]["writing"]["metric"] == "exact_match"
    assert Harness(("writing",), include_path=folder)(model) == score


def test_nothing_is_changed_nor_printed(
    write_task: WriteTask, tasks: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from tqdm import tqdm

    write_task("writing", WRITING.replace("SAMPLE", "true"), QUESTIONS[:2])
    base = tiny("llama")
    model = Model(base.decoder, copy.deepcopy(base.require_tokenizer()), base.provenance)
    network, words = model.decoder.model.train(), model.require_tokenizer()
    network.config.use_cache = False
    words.padding_side = "right"

    def state() -> list[Any]:
        return [
            {name: tensor.clone() for name, tensor in network.state_dict().items()},
            [id(parameter) for parameter in network.parameters()],
            [module.training for module in network.modules()],
            network.config.to_dict(),
            network.generation_config.to_dict(),
            (words.pad_token, words.padding_side, words.truncation_side, words.special_tokens_map, len(words)),
            words.backend_tokenizer.to_str(),
            torch.get_rng_state(),
            random.getstate(),
            str(np.random.get_state()),
            dict(os.environ),
            (sys.stdout, sys.stderr, vars(tqdm)["__init__"], logging.root.manager.disable),
        ]

    Harness(("choosing",), include_path=tasks).settings(model)  # importing the harness sets what it sets
    before = state()
    Harness(("choosing", "rolling", "last_word", "writing"), include_path=tasks)(model)
    for one, other in zip(before, state(), strict=True):
        if isinstance(one, dict) and isinstance(next(iter(one.values())), torch.Tensor):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_progress_tells_of_tasks_and_requests(tasks: str) -> None:
    told = []

    class Told:
        def track(self, items: Any, description: str, total: float | None = None) -> Any:
            told.append((description, len(list(items))))
            return items

        def doing(self, description: str) -> Any:
            told.append((description, 0))
            return pytest.MonkeyPatch.context()

    Harness(("choosing",), include_path=tasks, batch_size=1)(tiny("gpt2"), Told())
    assert told == [("lm-eval, finding the tasks", 0), ("lm-eval, reading tasks", 1), ("lm-eval, requests", 2)]


def test_settings_change_with_whatever_changes_the_figures(tasks: str, write_task: WriteTask) -> None:
    model = tiny("gpt2")

    def settings(**changes: Any) -> dict[str, Any]:
        return Harness(("choosing",), include_path=tasks, **changes).settings(model)

    known = settings()
    assert known["versions"] == {"choosing": 3}
    assert known["lm_eval"]
    assert json.loads(json.dumps(known)) == known
    assert settings(batch_size=3) == known
    for change in ({"limit": 3}, {"num_fewshot": 1}, {"seed": 1}):
        assert settings(**change) != known
    write_task("choosing", CHOICE, QUESTIONS[1:])  # other data behind the same file
    changed = settings()
    assert changed != known
    write_task("choosing", CHOICE.replace("acc_norm", "f1"), QUESTIONS[1:])
    assert settings() not in (known, changed)


def test_a_study_has_a_column_for_each_task(tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    variants = [{"label": "three", "drop": {"blocks": [3]}}, {"label": "two", "drop": {"blocks": [2, 3]}}]
    evaluate = ["size", {"lm-eval": {"tasks": ["choosing", "rolling"], "include_path": tasks}}]
    study = Study(
        read_recipe({"variants": variants, "evaluate": evaluate}), tmp_path / "run", base=tiny("gpt2", n_layer=4)
    )
    records = [record for record in study.run() if record.evaluator == "lm-eval"]
    assert [record.label for record in records] == [BASE_LABEL, "three", "two"]
    for record in records:
        stored = json.loads((tmp_path / "run" / "records" / f"lm-eval-{record.key[:24]}.json").read_text())
        assert stored["score"] == record.score
        assert stored["protocol"] == "lm-eval-1"
    assert not list(study.run())  # all is there
    results = study.results()
    shown = {column.title: column for column in table(results).columns}
    assert (shown["choosing"].unit, shown["choosing"].better) == ("acc", "higher")
    assert (shown["rolling"].unit, shown["rolling"].better) == ("word_perplexity", "lower")
    assert "lm-eval" not in shown
    write_csv(study_report(results), tmp_path / "results.csv")
    header, *rows = (line.split(",") for line in (tmp_path / "results.csv").read_text().splitlines())
    for row, record in zip(rows, records, strict=True):
        for task in ("choosing", "rolling"):
            for bound, end in (("value", ""), ("low", "_low"), ("high", "_high")):
                assert float(row[header.index(f"lm_eval_{task}{end}")]) == record.score["tasks"][task][bound]
    print_report(study_report(results), Console(width=200))
    plain = Study(read_recipe({"variants": [], "evaluate": ["size"]}), tmp_path / "run", base=study.base)
    assert all(column.group == "size" for column in table(plain.results()).columns), "none without tasks"
    printed = capsys.readouterr().out
    assert "choosing" in printed
    assert "%" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"lm-eval tasks \[\]; accepted: one or more, in a recipe, as lm-eval: \{tasks: \[hellaswag\]\}"),
        ({"tasks": ("a", "b", "a")}, "lm-eval task 'a' is named twice"),
        ({"tasks": ("a",), "limit": 0}, "lm-eval limit 0; accepted: 1 or more"),
        ({"tasks": ("a",), "num_fewshot": -1}, "lm-eval num_fewshot -1; accepted: 0 or more"),
        ({"tasks": ("a",), "batch_size": 0}, "lm-eval batch_size 0; accepted: 1 or more"),
        ({"tasks": ("a",), "seed": 2**32}, r"lm-eval seed 4294967296; accepted: 0 or more, below 2\*\*32"),
        ({"tasks": ("a",), "include_path": "nowhere"}, "lm-eval include_path: no folder at 'nowhere'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Harness(**settings)
    recipe = {"variants": [], "evaluate": [{"lm-eval": settings}]}
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe)


@pytest.mark.usefixtures("few_built_in")
def test_the_harness_has_tasks_of_its_own() -> None:
    model, known = tiny("gpt2"), Harness(("hellaswag",))
    assert known.settings(model)["versions"].keys() == {"hellaswag"}
    with pytest.raises(InputError) as error:
        Harness(("helaswag",)).settings(model)
    line = (
        f"unknown lm-eval task 'helaswag'; did you mean 'hellaswag'? accepted: those of lm-eval {lm_eval.__version__}"
    )
    assert str(error.value) == line
    with pytest.raises(OfflineError, match="the Hub cannot be reached and data of lm-eval task 'hellaswag'"):
        known(model)


def test_an_unknown_task_and_a_missing_package_are_named(
    tasks: str, layerfold: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_built_in_tasks", dict)
        with pytest.raises(InputError) as error:
            Harness(("chosing",), include_path=tasks).settings(tiny("gpt2"))
    assert "'chosing'; did you mean 'choosing'? " in str(error.value)
    assert str(error.value).endswith(f"and, in {tasks!r}, choosing, last_word, rolling")
    outcome = layerfold("eval", model, "--metrics", "lm-eval")
    assert outcome.code == 2
    assert "in a recipe, as lm-eval: {tasks: [hellaswag]}" in " ".join(outcome.err.split())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'layerfold\[lm-eval\]'"):
        Harness(("choosing",), include_path=tasks).settings(tiny("gpt2"))


def test_without_a_hub_there_is_one_attempt_and_none_where_data_is_local(
    write: Write, tasks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("tasks/far.yaml", f"task: far\ndataset_path: nobody/nothing\ntest_split: test\n{CHOICE}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("layerfold.text.sources.hub_reachable", lambda: False)
    with pytest.raises(OfflineError, match="data of lm-eval task 'far' is not in the local cache"):
        Harness(("choosing", "far"), include_path=tasks)(tiny("gpt2"))
    assert not datasets.config.HF_HUB_OFFLINE
    Harness(("choosing",), include_path=tasks)(tiny("gpt2"))


@pytest.mark.parametrize(
    ("body", "documents", "message"),
    [
        (CHOICE.replace("multiple_choice", "guessing"), QUESTIONS, "task 'bad' cannot be loaded: .*guessing"),
        (CHOICE.replace("question", "riddle"), QUESTIONS, "task 'bad' cannot be loaded: .*riddle"),
        (CHOICE, [QUESTIONS[0] | {"choices": [prose(60), "a"]}], "tasks bad cannot be run: .* the context of 32"),
        (CHOICE + "unsafe_code: true\n", QUESTIONS, "tasks bad cannot be run: .* marked as unsafe"),
        (WRITING.replace("SAMPLE", "false").replace("3", "64"), QUESTIONS, "tasks bad cannot be run: .*maximum"),
    ],
)
def test_tasks_that_cannot_be_run(
    write_task: WriteTask, body: str, documents: list[dict[str, Any]], message: str
) -> None:
    folder = write_task("bad", body, documents)
    with pytest.raises(InputError, match=f"lm-eval {message}") as error:
        Harness(("bad",), include_path=folder)(tiny("gpt2"))
    assert "\n" not in str(error.value)
