"""Commands that refuse: one line, exit code 2, and nothing is written.

What each setting is refused with is tested where the setting is; here is one of each way that a command refuses by.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny import shared, tiny, tiny_model

pytestmark = pytest.mark.usefixtures("offline")

REFUSED = [
    ("compress merge --n 1", "n 1; accepted: a whole number from 2"),
    ("compress merge --n 5", "n 5 for a model of 4 blocks; accepted: 2 ... 4"),
    ("compress collapse --groups 2-4", "groups '2-4' for a model of blocks 0 ... 3"),
    ("compress merge --groups atuo", "groups 'atuo'; did you mean 'auto'? accepted: auto, or first-last"),
    ("compress collapse --groups auto --n 5", "n 5 for a model of 4 blocks; accepted: 2 ... 4"),
    ("compress collapse --groups auto --corpus imbd", "unknown corpus 'imbd'; did you mean 'imdb'?"),
    ("compress merge --n 2 --corpus imbd", "unknown corpus 'imbd'; did you mean 'imdb'?"),
    ("compress merge --n 2 --corpus wikitext/wikitext-2-raw-v1", "the Hub cannot be reached"),
    ("compress merge --n 2 --corpus imdb --tokens 0", "limit of 0 tokens; accepted: 2 or more"),
    ("compress merge --n two", "--n"),
    ("compress merge --align best", "hungarian"),
    ("compress fold", "fold"),
    ("compress drop", "blocks None, random None, fraction None and every None; accepted: one of the four"),
    ("compress drop --blocks 1,4", "blocks '1,4' for a model of blocks 0 ... 3"),
    ("compress drop --fraction 1", "fraction 1.0; accepted: above 0 and below 1"),
    ("compress drop --remove 1", "--remove 1 without --from-search"),
    ("compress drop --from-search a.json --blocks 1", "--from-search, which says what to drop, beside --blocks"),
    ("compress drop --from-search a.json --part ffn", "--from-search, which says what to drop, beside --blocks"),
    ("compress drop --from-search a.json", "search file 'a.json' cannot be read (No such file or directory)"),
    ("compress drop --blocks 1 --repair refit --repair-tokens 1", "limit of 1 tokens; accepted: 2 or more"),
    ("compress drop --blocks 1 --repair refit --repair-tokens 20", "calibration text of 1 window; accepted: 2 or more"),
    ("compress drop --blocks 1 --repair refti", "'refti'"),
    ("compress prune", "nonzero None and sparsity None; accepted: one of the two"),
    ("compress prune --sparsity nan", "sparsity nan; accepted: from 0 to below 1"),
    ("compress prune --nonzero 1%", "nonzero '1%' is 603 parameters; accepted: 11,168 ... 60,320"),
    ("compress prune --nonzero 104.69M", "is 104,690,000 parameters; accepted: 11,168 ... 60,320"),
    ("compress prune --sparsity 0.999 --structure neurons", "without neurons; accepted: 0 ... 0.992188"),
    ("compress prune --sparsity 0.5 --criterion wanda --corpus ./none.txt", "no file or folder"),
    ("compress prune --sparsity half", "--sparsity"),
    ("compress prune --sparsity 0.5 --criterion wnda", "wanda"),
    ("compress prune --sparsity 0.5 --structure 4:8", "2:4"),
    ("compress prune --sparsity 0.5 --scope block", "global"),
    (
        "compress prune --structure neurons+heads --criterion taylor --sparsity 0.5 --corpus ./none.txt",
        "no file or fol",
    ),
    ("compress prune --structure neurons+heads --criterion taylor --sparsity 0.5 --repair rescale", "repair 'rescale'"),
    ("compress prune --structure neurons+heads --criterion taylor --sparsity 0.999", "without neurons; accepted: 0 "),
    ("compress prune --structure neurons+heads --criterion taylor --nonzero 1%", "is 603 parameters; accepted: 10,"),
    ("compress share --window 3:2", "window '3:2' ends at block 4 of a model of blocks 0 ... 3; accepted"),
    ("compress share --window 0:5", "window '0:5' "),
    ("compress share --window -1:2", "window '-1:2'; accepted: auto, or START:K"),
    ("compress share --window ''", "window ''; accepted: auto, or START:K"),
    ("compress share --k 1", "k 1; accepted: 2 or more"),
    ("compress share --k 5", "k 5 for a model of "),
    ("compress share --window 1:2 --rank 33", "rank 33; accepted: 0 ... 32"),
    ("compress share --k 2 --rank 33", "rank 33; accepted: 0 ... 32"),
    ("compress share --window 1:2 --tokens 1", "limit of 1 tokens; accepted: 2 or more"),
    ("compress share --window 1:2 --corpus ./none.txt", "no file or folder"),
    ("compress share --window 1:2 --rank two", "--rank"),
    ("compress share --window 1:2 --base best", "fitted"),
    ("recover --set weight_dcay=0.1", "unknown key 'weight_dcay'; did you mean 'weight_decay'?"),
    ("recover --set temperature=2", "finetune: unknown key 'temperature'"),
    ("recover --set warmup=0.1 --set warmup=0.2", "each key once"),
    ("recover --set clip=big", "clip: Input should be a valid number"),
    ("recover --set warmup=1", "warmup 1.0; accepted: a fraction"),
    ("recover --set evaluations=2.5", "evaluations: Input should be a valid integer"),
    ("recover --set schedule=linaer", "schedule"),
    ("recover --set 'patience=[1'", "is not YAML"),
    ("recover --learning-rate -1", "learning_rate -1.0; accepted: a number above 0"),
    ("recover --tokens 10", "tokens 10; accepted: 64 or more"),
    ("recover --set context=99", "context 99; accepted: 2 ... 32"),
    ("recover --method distil", "distil"),
    ("recover --method finetune --teacher pocket", "accepted: a teacher with distill"),
    ("recover --corpus imbd", "did you mean 'imdb'?"),
    ("recover --held-out none.txt", "no file or folder"),
    ("recover --seed -1", "seed"),
    ("recover --seed 4294967296", "seed"),
    ("plan", "accepted: one of the three"),
    ("plan --parameters eighty", "parameters 'eighty'; accepted: a count"),
    ("plan --parameters 100%", "accepted: below the model's"),
    ("plan --parameters 2%", "is 1,206; accepted: 9,761 ... 60,319"),
    ("plan --parameters 80% --points -1", "points -1; accepted: 0 or more"),
    ("plan --parameters 80% --corpus imbd", "imdb"),
    ("eval pokcet", "did you mean 'pocket'?"),
    ("eval gpt2", "the Hub cannot be reached"),
    ("eval pocket --metrics ,", "no metrics; accepted"),
    ("eval pocket --corpus ./none.txt", "no file or folder"),
    ("export none --to dense --output-dir out", "no checkpoint folder"),
]
"""Commands, to which a model, a text and a folder are added where they take some, and what they are refused with."""

TEXT = {"--corpus": "CORPUS"}
GIVEN = {
    "compress": TEXT,
    "recover": TEXT | {"--tokens": "256", "--method": "finetune", "--learning-rate": "1e-3"},
    "plan": TEXT | {"--calibration-tokens": "300", "--repair-tokens": "1200", "--tokens": "200", "--rounds": "0"},
}


@pytest.mark.parametrize(("typed", "said"), REFUSED, ids=lambda value: value[:60])
def test_a_refused_command_is_one_line_and_writes_nothing(
    layerfold: Any,
    model: Path,
    study_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *words = shlex.split(typed)
    if command in GIVEN:
        added = {**GIVEN[command], "--output-dir": "out"} | ({} if command == "recover" else {"--model": str(model)})
        given = [word for option in added.items() if option[0] not in words for word in option]
        words = [str(model)] * (command == "recover") + words + [study_corpus if w == "CORPUS" else w for w in given]
        if command == "recover" and "context" not in typed:
            words += ["--set", "context=16", "--set", "batch_size=4"]
    before = sorted(tmp_path.rglob("*"))
    done = layerfold(command, *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert sorted(tmp_path.rglob("*")) == before


# What a checkpoint is refused for


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints that some commands cannot work with."""
    found = {name: tmp_path / name for name in ("one block", "six inputs", "shared", "no tokenizer")}
    tiny("gpt2", n_layer=1).save(found["one block"])
    tiny("llama", intermediate_size=6).save(found["six inputs"])
    shared(tiny("gpt2"), window="1:2").save(found["shared"], format="compact")
    tiny_model("gpt2").save_pretrained(found["no tokenizer"])
    return found


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("one block", "merge --n 2", "1 block"),
        ("six inputs", "prune --structure 2:4", "'model.layers.0.mlp.down_proj.weight' has 6 inputs; accepted: a mult"),
        ("shared", "share --rank 2 --window 0:2", "accepted"),
        ("shared", "share --rank 2 --window 1:2", "accepted"),
        ("shared", "share --rank 2 --k 3", "accepted"),
    ],
)
def test_what_a_checkpoint_does_not_admit_is_one_line(
    compress: Any, models: dict[str, Path], tmp_path: Path, name: str, typed: str, said: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = compress(typed, of=models[name], code=2)
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert said in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_a_tokenizer_can_be_weighed_but_not_read_to(layerfold: Any, models: dict[str, Path]) -> None:
    assert layerfold("eval", models["no tokenizer"], "--metrics", "size").code == 0
    done = layerfold("eval", models["no tokenizer"], "--metrics", "perplexity", "--corpus", "imdb")
    assert done.code == 2
    assert "no tokenizer" in done.err


@pytest.mark.parametrize("content", ["", "short"])
def test_too_little_text_is_said(layerfold: Any, model: Path, write: Any, content: str) -> None:
    done = layerfold("eval", model, "--metrics", "perplexity", "--corpus", write("few.txt", content))
    assert (done.code, done.err.count("\n")) == (2, 1)
