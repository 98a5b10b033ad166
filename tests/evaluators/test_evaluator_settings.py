"""What all evaluators have in common: which settings are refused, what needs a tokenizer, what they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tiny import CONTEXT, Write, tiny

from layerfold.checkpoint.model import POCKET, Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError, ModelError
from layerfold.evaluators import Generation, Harness, Imdb, Latency, Perplexity, Rouge, SideBySide, Size
from layerfold.evaluators.base import Baselined, HeldOut

ROWS = [{"text": f"text {i}", "label": i % 2, "document": f"text {i}. More.", "summary": f"{i}"} for i in range(80)]
TASK = """
task: asking
dataset_path: json
dataset_kwargs: {data_files: {test: [DATA]}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b"]
doc_to_target: "{{label}}"
"""


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (Imdb, {"protocol": "publish"}, "unknown protocol 'publish'; did you mean 'published'?"),
        (Imdb, {"epochs": 0}, "imdb epochs 0; accepted: 1 or more"),
        (Imdb, {"train_rows": 1}, "imdb train_rows 1; accepted: 2 or more"),
        (Imdb, {"test_rows": 0}, "imdb test_rows 0; accepted: 1 or more"),
        (Imdb, {"context": 0}, "imdb context 0; accepted: 1 or more"),
        (Imdb, {"seed": 2**32}, "imdb seed 4294967296; accepted: 0 ... 4294967295"),
        (Imdb, {"learning_rate": 0.0}, "imdb learning_rate 0.0; accepted: above 0, below 1"),
        (Imdb, {"learning_rate": float("nan")}, "imdb learning_rate nan; accepted: above 0, below 1"),
        (Imdb, {"keep": "lasts"}, "imdb keep 'lasts'; did you mean 'last'?"),
        (Imdb, {"padding": "lef"}, "imdb padding 'lef'; did you mean 'left'?"),
        (Imdb, {"pool": "last", "protocol": "published"}, "imdb pool 'last'; "),
        (Imdb, {"pool": "last_position"}, "imdb pool 'last_position' reads padding; accepted: with protocol published"),
        (Rouge, {"protocol": "sonud"}, "unknown protocol 'sonud'; did you mean 'sound'?"),
        (Rouge, {"limit": 0}, "rouge limit 0; accepted: 1 or more"),
        (Rouge, {"new_tokens": -1}, "rouge new_tokens -1; accepted: 1 or more"),
        (Rouge, {"batch_size": 0}, "rouge batch_size 0; accepted: 1 or more"),
        (Perplexity, {"protocol": "publish"}, "unknown protocol 'publish'; did you mean 'published'"),
        (Latency, {"protocol": "loud"}, "unknown protocol 'loud'"),
        (Latency, {"rounds": 2}, "latency rounds 2; accepted: 3 or more"),
        (Latency, {"prompt_tokens": 0}, "latency prompt_tokens 0; accepted: 1 or more"),
        (Latency, {"new_tokens": -1}, "latency new_tokens -1; accepted: 1 or more"),
        (Latency, {"prefill_tokens": 0}, "latency prefill_tokens 0; accepted: 1 or more"),
        (Generation, {"prompts": ()}, "generation prompts []; accepted: one or more, none empty"),
        (Generation, {"prompts": ("", "a")}, "generation prompts ['', 'a']; accepted: one or more, none empty"),
        (Generation, {"prompts": ("a", " \n")}, "generation prompts ['a', ' \\n']; accepted: one or more, none empty"),
        (Generation, {"new_tokens": 0}, "generation new_tokens 0; accepted: 1 or more"),
        (Size, {"context": 0}, "size context 0; accepted: 1 or more"),  # not taken for the default
    ],
    ids=str,
)
def test_a_setting_that_is_none_is_refused_in_one_line(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as raised:
        kind(**settings)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


@pytest.fixture
def data(write: Write) -> Callable[[str], str]:
    """Write rows that any evaluator can read; return the path of a file or of their folder."""
    path = write("data/test.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    write("data/train.jsonl", "".join(json.dumps(row | {"text": f"train {row['text']}"}) + "\n" for row in ROWS))
    task = TASK.replace("DATA", json.dumps(str(path))).replace("CACHE", json.dumps(str(path.parents[1] / "cache")))
    tasks = write("tasks/asking.yaml", task).parent
    return {"folder": str(path.parent), "tasks": str(tasks)}.__getitem__


SETTINGS: dict[str, tuple[Any, list[dict[str, Any]], list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "imdb": (
        lambda data: partial(Imdb, data=data("folder")),
        [
            *({}, {"body": False}, {"train_rows": 20}, {"test_rows": 9}, {"context": 20}, {"keep": "first"}),
            *({"seed": 1}, {"learning_rate": 1e-3}, {"epochs": 2}, {"batch_size": 4}),
            *({"protocol": "published"}, {"protocol": "published", "pool": "last_position"}),
        ],
        [
            ({}, {"context": CONTEXT, "learning_rate": 0.0576 / 32, "seed": 0}),
            # A head that is fitted has neither rate nor batches.
            ({"body": False}, {"body": False, "learning_rate": 0.1, "epochs": 3, "batch_size": 2}),
        ],
    ),
    "perplexity": (
        lambda data: partial(Perplexity, corpus=data("folder")),
        [{}, {"stride": 5}, {"context": 20}, {"limit_tokens": 99}, {"protocol": "published"}],
        [({}, {"stride": CONTEXT})],
    ),
    "rouge": (
        lambda data: partial(Rouge, data("folder")),
        [{}, {"limit": 4}, {"new_tokens": 9}, {"cue": "\nIn short:"}, {"protocol": "published"}],
        [
            *(({}, same) for same in ({"batch_size": 1}, {"limit": None}, {"limit": 80}, {"seed": 4})),
            ({"protocol": "published"}, {"protocol": "published", "new_tokens": 9, "cue": "", "limit": 2}),
        ],
    ),
    "size": (lambda data: Size, [{}, {"context": 8}], [({}, {"context": CONTEXT})]),
    "latency": (lambda data: Latency, [{}, {"seed": 3}, {"rounds": 5}, {"protocol": "published"}], []),
}
"""Evaluators, changes of which each tells figures apart, and pairs that do not."""


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_tell_apart_whatever_changes_the_figure_and_nothing_else(
    name: str, data: Callable[[str], str]
) -> None:
    make, changes, pairs = SETTINGS[name]
    model, kind = tiny("gpt2"), make(data)
    found = [kind(**change).settings(model) for change in changes]
    assert all(one != two for i, one in enumerate(found) for two in found[:i])
    assert json.loads(json.dumps(found)) == found
    for one, two in pairs:
        assert kind(**one).settings(model) == kind(**two).settings(model)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda data: Perplexity(corpus=data("folder"), context=33), r"context 33; accepted: 2 \.\.\. 32"),
        (lambda data: Perplexity(corpus=data("folder"), context=0), "context 0"),  # not taken for the default
        (
            lambda data: Imdb(data=data("folder"), context=33),
            r"imdb context 33; accepted: 1 \.\.\. 32 \(the model's",
        ),
        (lambda data: Latency(prompt_tokens=20, new_tokens=13), "prompt and new tokens 33; accepted: 32 in all"),
    ],
    ids=["perplexity", "none", "imdb", "latency"],
)
def test_a_context_that_the_model_has_not_is_refused(make: Any, said: str, data: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=said):
        make(data)(tiny("gpt2"))


def test_pocket_is_measured_on_what_comes_in_a_package_and_others_on_the_hubs() -> None:
    model = tiny("gpt2")
    pocket = Model(model.decoder, model.tokenizer, Provenance(POCKET))
    assert [kind().default_data(pocket) for kind in (Imdb, Rouge)] == ["imdb", "aclsum"]
    assert [kind().default_data(model) for kind in (Imdb, Rouge)] == ["stanfordnlp/imdb", "cnn_dailymail/3.0.0"]


@pytest.mark.parametrize(
    "make",
    [
        lambda data: Imdb(data=data("folder")),
        lambda data: Rouge(data("folder"), new_tokens=8),
        lambda data: Perplexity(corpus=data("folder")),
        lambda data: Generation(prompts=("the",), new_tokens=2),
        lambda data: Harness(("asking",), include_path=data("tasks")),
    ],
    ids=["imdb", "rouge", "perplexity", "generation", "harness"],
)
def test_a_model_without_a_tokenizer_is_refused(make: Any, data: Callable[[str], str]) -> None:
    model = tiny("gpt2")
    with pytest.raises(ModelError, match="'tiny' has no tokenizer"):
        make(data)(Model(model.decoder, None, model.provenance))


def test_what_else_they_are_asked_for(data: Callable[[str], str]) -> None:
    assert [isinstance(each, SideBySide) for each in (Latency(), Size())] == [True, False]
    for kind in (Imdb, Rouge, Perplexity, Latency):
        assert kind().protocol_id != kind(protocol="published").protocol_id  # type: ignore[call-arg]
    texts = tuple(row["text"] for row in ROWS)
    for evaluator, documents in (
        (Imdb(data=data("folder"), test_rows=3), texts),  # all of the split, whatever is scored
        (Rouge(data("folder"), limit=3), tuple(row["document"] for row in ROWS[:3])),
        (Perplexity(corpus=data("folder")), texts),
    ):
        assert isinstance(evaluator, HeldOut)
        assert isinstance(evaluator, Baselined) == (not isinstance(evaluator, Perplexity))
        assert evaluator.held_out(tiny("gpt2")).documents == documents
