"""The commands, as typed: what they print, what they write, and how they refuse."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny, tiny_model, tokenizer
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.errors import OutputError
from layerfold.evaluators import EVALUATORS, Latency
from layerfold.recovery import Finetune
from layerfold.text.corpora import load_corpus

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("method", ["merge", "collapse"])
def test_compress_writes_what_plain_transformers_loads(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    done = layerfold("compress", method, "--model", model, "--n", 2, "--corpus", study_corpus, "--output-dir", out)
    assert done.code == 0, done.err
    assert "block  1 to  0: mean matched correlation" in done.out
    ids = torch.arange(8)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, load(out).decoder.model(ids).logits)
    step = json.loads((out / "layerfold.json").read_text())["provenance"]["steps"][0]
    assert step["method"]["groups"] == "0-1,2-3"
    assert step["calibration"]["split"] == "calibration+train"


def test_a_tied_merge_is_smaller_in_compact_form_and_exports_to_dense(
    layerfold: Any, model: Path, tmp_path: Path
) -> None:
    compact, dense = tmp_path / "compact", tmp_path / "dense"
    words = ("compress", "merge", "--model", model, "--n", 4, "--align", "none", "--tie")
    assert layerfold(*words, "--format", "compact", "--output-dir", compact).code == 0
    assert layerfold("export", compact, "--to", "dense", "--output-dir", dense).code == 0
    weights = (compact / "layerfold.safetensors").stat().st_size, (dense / "model.safetensors").stat().st_size
    assert weights[0] < 0.6 * weights[1]
    ids = torch.arange(8)[None]
    assert torch.equal(load(compact).decoder.model(ids).logits, load(dense).decoder.model(ids).logits)
    again = tmp_path / "again"
    assert layerfold("export", dense, "--to", "compact", "--output-dir", again).code == 0
    assert torch.equal(load(again).decoder.model(ids).logits, load(dense).decoder.model(ids).logits)


@pytest.mark.parametrize(
    ("words", "dropped", "blocks"),
    [
        (["--blocks", "1,3"], "blocks 1,3", 2),
        (["--random", 2, "--seed", 1], "blocks 1,2", 2),
        (["--fraction", 0.5, "--part", "attention", "--format", "compact"], "the attention of blocks 1,3", 4),
        (["--blocks", "0-3", "--part", "ffn"], "the ffn of blocks 0,1,2,3", 4),
    ],
    ids=["named", "drawn", "attention", "ffn"],
)
def test_drop_says_what_it_dropped_and_what_is_left(
    layerfold: Any, model: Path, tmp_path: Path, words: list[object], dropped: str, blocks: int
) -> None:
    out = tmp_path / "out"
    done = layerfold("compress", "drop", *words, "--model", model, "--output-dir", out)
    assert done.code == 0, done.err
    smaller = load(out).decoder.size().parameters
    assert smaller < 60_320
    assert done.out.splitlines() == [
        f"dropped {dropped}",
        f"60,320 distinct parameters in 4 blocks -> {smaller:,} in {blocks}",
        f"wrote {out} ({'compact' if '--format' in words else 'dense'}, float32)",
    ]


def test_eval_json_is_one_document_and_nothing_else(layerfold: Any, model: Path, study_corpus: str) -> None:
    done = layerfold("eval", model, "--corpus", study_corpus, "--metrics", "perplexity,size", "--json")
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    assert list(scores) == ["perplexity", "size"]
    assert scores["perplexity"]["low"] < scores["perplexity"]["value"] < scores["perplexity"]["high"]
    assert {"tokens", "bits_per_byte", "context", "stride", "corpus", "split", "tokens_sha256"} <= set(
        scores["perplexity"]
    )
    assert {"parameters", "nonzero", "bytes", "flops_per_token"} <= set(scores["size"])


def test_eval_measures_all_four(
    layerfold: Any, tmp_path: Path, study_corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVALUATORS, "latency", partial(Latency, rounds=3))
    # The default prompts and lengths need some room; latency takes a time that grows with the depth.
    tiny("gpt2", n_positions=160, n_layer=1).save(tmp_path / "long")
    done = layerfold("eval", tmp_path / "long", "--corpus", study_corpus, "--json")
    assert done.code == 0, done.err
    assert list(json.loads(done.out)) == ["perplexity", "size", "latency", "generation"]
    told = layerfold("eval", tmp_path / "long", "--corpus", study_corpus, "--metrics", "generation")
    assert told.out.count("\n  > ") == 8


def test_study_prints_a_table_and_leaves_a_page(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    document = {
        "base": "pocket",
        "variants": [{"label": "compressed_2", "collapse": {"n": 2}}],
        "evaluate": ["size", {"perplexity": {"corpus": study_corpus}}],
        "calibration": {"corpus": study_corpus, "tokens": 256},
    }
    recipe.write_text(yaml.safe_dump(document))
    run = tmp_path / "run"
    words = ("study", recipe, "--model", model, "--output-dir", run)
    done = layerfold(*words)
    assert done.code == 0, done.err
    assert "compressed_2" in done.out
    assert done.out.rstrip().endswith(f"report: {run / 'report.html'}")
    assert {"results.csv", "report.html", "study.json", "records"} <= {path.name for path in run.iterdir()}
    told = layerfold(*words, "--json")
    assert [variant["label"] for variant in json.loads(told.out)["variants"]] == ["base", "compressed_2"]


def test_doctor_says_what_is_reachable(layerfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(layerfold("doctor", "--json").out)
    assert found["models"]["pocket"] == "embedded"
    assert found["models"]["Hub"].startswith("not reachable")
    assert found["speed"]["float32 GFLOP/s"] > 0
    monkeypatch.setattr("layerfold.cli.doctor.matrix_product_rate", lambda *_: 1e9)
    assert "advice: float32" in layerfold("doctor").out


REFUSED = [
    (["compress", "merge", "--n", 1], "n 1; accepted: a whole number from 2"),
    (["compress", "merge", "--n", 0], "n 0; accepted"),
    (["compress", "collapse", "--n", -3], "n -3; accepted"),
    (["compress", "merge", "--n", 5], "n 5 for a model of 4 blocks; accepted: 2 ... 4"),
    (["compress", "merge"], "accepted: one of the two"),
    (["compress", "merge", "--n", 2, "--groups", "0-1"], "accepted: one of the two"),
    (["compress", "collapse", "--groups", "2-4"], "groups '2-4' for a model of blocks 0 ... 3"),
    (["compress", "collapse", "--groups", "2"], "group '2'; accepted: first-last"),
    (["compress", "merge", "--groups", "atuo"], "groups 'atuo'; did you mean 'auto'? accepted: auto, or first-last"),
    (["compress", "merge", "--groups", "auto", "--n", 1], "n 1; accepted: a whole number from 2"),
    (["compress", "collapse", "--groups", "auto", "--n", 5], "n 5 for a model of 4 blocks; accepted: 2 ... 4"),
    (["compress", "collapse", "--groups", "auto", "--corpus", "imbd"], "unknown corpus 'imbd'; did you mean 'imdb'?"),
    (["compress", "drop"], "blocks None, random None, fraction None and every None; accepted: one of the four"),
    (["compress", "drop", "--blocks", "1", "--random", 1], "accepted: one of the four"),
    (["compress", "drop", "--blocks", "1,4"], "blocks '1,4' for a model of blocks 0 ... 3"),
    (["compress", "drop", "--blocks", "3-1"], "block '3-1'; accepted: an index or first-last"),
    (["compress", "drop", "--blocks", "0-3"], "blocks '0-3' is 4 of the model's 4 blocks; accepted: at most 3"),
    (["compress", "drop", "--random", 4], "random 4 is 4 of the model's 4 blocks; accepted: at most 3"),
    (["compress", "drop", "--fraction", 1], "fraction 1.0; accepted: above 0 and below 1"),
    (["compress", "merge", "--n", 2, "--corpus", "imbd"], "unknown corpus 'imbd'; did you mean 'imdb'?"),
    (["compress", "merge", "--n", 2, "--corpus", "wikitext/wikitext-2-raw-v1"], "the Hub cannot be reached"),
    (["compress", "merge", "--n", 2, "--corpus", "imdb", "--tokens", 0], "limit of 0 tokens; accepted: 2 or more"),
]


@pytest.mark.parametrize("method", ["merge", "collapse"])
def test_auto_says_what_the_published_groups_scored_and_what_it_took(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, method: str
) -> None:
    words = ("compress", method, "--model", model, "--corpus", study_corpus, "--tokens", 512, "--output-dir")
    done = layerfold(*words, tmp_path / "out", "--groups", "auto")
    assert done.code == 0, done.err
    step = load(tmp_path / "out").provenance.steps[-1]
    found = re.findall(r"groups +([\d,-]+): selection perplexity ([\d.e+,]+)\n", done.out)
    exact = step["notes"]["search"]["perplexity"]
    assert [groups for groups, _ in found] == list(exact)
    assert found[0][0] == "0-1,2-3"
    assert [float(value.replace(",", "")) for _, value in found] == pytest.approx(list(exact.values()), rel=1e-3)
    assert found[-1][0] == step["method"]["groups"]
    assert re.search(rf"groups {found[-1][0]} are the best of [3-6] groupings scored\n", done.out)
    again = layerfold(*words, tmp_path / "again", "--groups", found[-1][0])
    assert again.code == 0, again.err
    assert load(tmp_path / "again").sha256 == load(tmp_path / "out").sha256


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refused_compression_is_one_line_and_writes_nothing(
    layerfold: Any, model: Path, tmp_path: Path, words: list[object], said: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = layerfold(*words, "--model", model, "--output-dir", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert said in done.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "pokcet"], "did you mean 'pocket'?"),
        (["eval", "gpt2"], "the Hub cannot be reached"),
        (["eval", "pocket", "--metrics", "perplexty"], "did you mean 'perplexity'?"),
        (["eval", "pocket", "--metrics", ","], "no metrics; accepted"),
        (["eval", "pocket", "--split", "tset"], "did you mean 'test'?"),
        (["eval", "pocket", "--corpus", "./none.txt"], "no file or folder"),
        (["export", "none", "--to", "dense", "--output-dir", "out"], "no checkpoint folder"),
        (["study", "none.yaml"], "cannot be read"),
        (["compress", "merge", "--n", "two", "--output-dir", "out"], "--n"),
        (["compress", "merge", "--align", "best", "--output-dir", "out"], "hungarian"),
        (["compress", "fold"], "fold"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_exits_with_2(
    layerfold: Any, words: list[object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = layerfold(*words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_left_alone_unless_told(layerfold: Any, model: Path, tmp_path: Path) -> None:
    words = ("compress", "merge", "--model", model, "--n", 2, "--align", "none", "--output-dir")
    kept = tmp_path / "mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    refused = layerfold(*words, kept.parent)
    assert (refused.code, kept.read_text()) == (2, "mine")
    assert "is not empty; --overwrite replaces it" in refused.err
    assert layerfold(*words, kept).code == 2
    assert layerfold(*words, kept.parent, "--overwrite").code == 0
    assert not kept.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_of_one_block_cannot_be_merged(layerfold: Any, tmp_path: Path) -> None:
    tiny("gpt2", n_layer=1).save(tmp_path / "one")
    done = layerfold("compress", "merge", "--model", tmp_path / "one", "--n", 2, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert "1 block" in done.err


def test_a_model_without_a_tokenizer_can_be_weighed_but_not_read_to(layerfold: Any, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "bare")
    assert layerfold("eval", tmp_path / "bare", "--metrics", "size").code == 0
    done = layerfold("eval", tmp_path / "bare", "--metrics", "perplexity", "--corpus", "imdb")
    assert done.code == 2
    assert "no tokenizer" in done.err


def test_too_little_text_is_said(layerfold: Any, model: Path, write: Any) -> None:
    for content in ("", "short"):
        done = layerfold("eval", model, "--metrics", "perplexity", "--corpus", write("few.txt", content))
        assert done.code == 2
        assert done.err.count("\n") == 1


# recover


def recover_words(model: Path, corpus: str, out: Path, *more: object) -> tuple[object, ...]:
    few = [f"{key}={value}" for key, value in {"context": 16, "batch_size": 4, "validation_tokens": 64}.items()]
    words = ("recover", model, "--output-dir", out, "--corpus", corpus, "--tokens", 4 * 64)
    return (*words, *(word for setting in few for word in ("--set", setting)), *more)


FINETUNE = ("--method", "finetune", "--learning-rate", "1e-3")


@pytest.fixture
def pair(layerfold: Any, tmp_path: Path) -> Path:
    """The folder of a collapsed model; it knows, by its provenance, the one it was made from."""
    base = tmp_path / "base"
    tiny_model("gpt2").save_pretrained(base)
    tokenizer().save_pretrained(base)
    words = ("compress", "collapse", "--model", base, "--n", 2, "--align", "none", "--output-dir", tmp_path / "half")
    assert layerfold(*words).code == 0
    return tmp_path / "half"


def test_recover_learns_from_the_base_and_writes_what_loads_anywhere(
    layerfold: Any, pair: Path, study_corpus: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = layerfold(*recover_words(pair, study_corpus, out, "--set", "lm_weight=0.9", "--set", "search_fraction=0.5"))
    assert done.code == 0, done.err
    text, trained, validation, wrote = done.out.splitlines()
    share = load_corpus(study_corpus, "train").share
    assert text == f"training: {study_corpus!r}, split train, {share}: 256 tokens"
    assert re.fullmatch(
        r"trained on 256 tokens and \d{3} to choose the learning rate, \d+ s, learning rate \S+", trained
    )
    found = re.fullmatch(r"validation perplexity (\S+) -> (\S+) \(weights of step 4 of 4\)", validation)
    assert found
    assert float(found[2]) < float(found[1])
    assert wrote == f"wrote {out} (dense, float32)"
    assert "Traceback" not in done.err
    assert not (tmp_path / "out.training").exists()
    recovered = load(out)
    step = recovered.provenance.steps[-1]
    assert [each["method"]["name"] for each in recovered.provenance.steps] == ["collapse", "distill"]
    assert step["method"]["teacher_sha256"] == load(tmp_path / "base").sha256
    assert step["notes"]["validation_perplexity"] == pytest.approx(float(found[2]), rel=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(8)[None]
    assert torch.equal(plain(ids).logits, recovered.decoder.model(ids).logits)
    assert plain.config.use_cache


def test_recover_sets_what_it_is_told(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = (
        "--set",
        "schedule=constant",
        "--set",
        "evaluations=2",
        "--seed",
        3,
        "--freeze",
        "*.wte.*",
        "--freeze",
        "*.wpe.*",
    )
    done = layerfold(*recover_words(model, study_corpus, out, *FINETUNE, *more, "--format", "compact"))
    assert done.code == 0, done.err
    assert "\ntrained on 256 tokens, " in done.out
    assert done.out.endswith(f"wrote {out} (compact, float32)\n")
    step = load(out).provenance.steps[-1]
    shown = ("name", "schedule", "evaluations", "batch_size", "context", "learning_rate", "freeze", "seed")
    assert [step["method"][name] for name in shown] == [
        "finetune",
        "constant",
        2,
        4,
        16,
        1e-3,
        ["*.wte.*", "*.wpe.*"],
        3,
    ]
    before, after = (load(folder).decoder.model.state_dict() for folder in (model, out))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}


def test_a_setting_that_has_an_option_of_its_own_is_not_dropped(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def recover(_: Any, recovery: Any, **__: Any) -> None:
        reached.append(recovery)
        raise OutputError("reached")

    monkeypatch.setattr("layerfold.api.recover", recover)
    words = recover_words(model, study_corpus, tmp_path / "out", "--method", "finetune")
    layerfold(*words, "--set", "learning_rate=2e-3", "--set", "freeze=['*.wte.*']", "--set", "report_to=wandb")
    few = {"context": 16, "batch_size": 4, "validation_tokens": 64, "learning_rate": 2e-3, "freeze": ("*.wte.*",)}
    assert reached == [Finetune(tokens=256, corpus=study_corpus, report_to="wandb", **few)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "weight_dcay=0.1"], "unknown key 'weight_dcay'; did you mean 'weight_decay'?"),
        (["--set", "temperature=2"], "finetune: unknown key 'temperature'"),
        (["--set", "batch_size"], "--set 'batch_size'; accepted: key=value"),
        (["--set", "warmup=0.1", "--set", "warmup=0.2"], "each key once"),
        (["--set", "clip=big"], "clip: Input should be a valid number"),
        (["--set", "warmup=1"], "warmup 1.0; accepted: a fraction"),
        (["--set", "evaluations=2.5"], "evaluations: Input should be a valid integer"),
        (["--set", "schedule=linaer"], "schedule"),
        (["--set", "patience=[1"], "is not YAML"),
        (["--learning-rate", "-1"], "learning_rate -1.0; accepted: a number above 0"),
        (["--tokens", "10"], "tokens 10; accepted: 64 or more"),
        (["--tokens", "0"], "tokens 0; accepted: 1 or more"),
        (["--set", "context=99"], "context 99; accepted: 2 ... 32"),
        (["--method", "distil"], "distil"),
        (["--method", "finetune", "--teacher", "pocket"], "accepted: a teacher with distill"),
        (["--corpus", "imbd"], "did you mean 'imdb'?"),
        (["--held-out", "none.txt"], "no file or folder"),
        (["--seed", "-1"], "seed"),
        (["--seed", "4294967296"], "seed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refused_recovery_is_one_line_and_writes_nothing(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, more: list[str], said: str
) -> None:
    few = [word for setting in ("context=16", "batch_size=4") for word in ("--set", setting)]
    given = ("recover", model, "--output-dir", tmp_path / "out")
    rest = {"--tokens": "256", "--method": "finetune", "--learning-rate": "1e-3", "--corpus": study_corpus}
    words = [word for option in rest.items() if option[0] not in more for word in option]
    few = [] if any(word.startswith("context") for word in more) else few
    before = sorted(tmp_path.rglob("*"))
    done = layerfold(*given, *words, *few, *more)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err
    if "--method" not in more or "--teacher" in more:
        assert done.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_recover_refused_before_any_work_can_be_mended(
    layerfold: Any, model: Path, study_corpus: str, write: Any, tmp_path: Path
) -> None:
    kept = write("mine/notes.txt", "mine")
    text = load_corpus(study_corpus, "train").documents[0].strip()
    held_out = write("other.txt", "\n\n".join([text, *(f"document {i}" for i in range(12))]))
    words = recover_words(model, study_corpus, kept.parent, *FINETUNE)
    for more, *said in (
        ((), "is not empty; --overwrite replaces it"),
        (("--overwrite", "--freeze", "*.wtf.*"), "freeze '*.wtf.*'"),
        (("--overwrite", "--held-out", held_out), "1 documents stand in both", text[:30]),
    ):
        refused = layerfold(*words, *more)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
        assert all(each in refused.err for each in said)
        assert kept.read_text() == "mine"
        assert not (tmp_path / "mine.training").exists(), "before any work"
    mended = layerfold(*words, "--overwrite", "--freeze", "*.wte.*", "--held-out", study_corpus)
    assert mended.code == 0, mended.err
    assert not kept.exists()
    assert load(kept.parent).decoder.n_blocks == 4
    assert not (tmp_path / "mine.training").exists()


def test_recover_killed_and_started_again_goes_on(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def on_step_end(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 3:
            raise Killed

    words = recover_words(model, study_corpus, tmp_path / "out", *FINETUNE)
    with monkeypatch.context() as patch:
        patch.setattr("layerfold.recovery.callbacks.Bar.on_step_end", on_step_end)
        with pytest.raises(Killed):
            layerfold(*words)
    training = tmp_path / "out.training"
    assert (training / "checkpoint-2").is_dir()
    assert not (tmp_path / "out").exists()
    refused = layerfold(*words, "--set", "clip=2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "was begun with other settings: clip was 1.0 and is 2.0" in refused.err
    done = layerfold(*words)
    assert done.code == 0, done.err
    assert not training.exists()
    whole = layerfold(*recover_words(model, study_corpus, tmp_path / "whole", *FINETUNE))
    assert whole.code == 0
    one, two = (load(tmp_path / name) for name in ("out", "whole"))
    assert one.sha256 == two.sha256
    assert one.provenance.steps[-1]["notes"]["curve"] == two.provenance.steps[-1]["notes"]["curve"]


def test_recover_begun_with_other_settings_begins_anew_where_told(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "layerfold.checkpoint.model.Model.save", lambda *_, **__: (_ for _ in ()).throw(OutputError("full"))
    )
    words = recover_words(model, study_corpus, tmp_path / "out", *FINETUNE)
    assert layerfold(*words).code == 2
    assert (tmp_path / "out.training").is_dir(), "what was trained is kept where it cannot be saved"
    monkeypatch.undo()
    monkeypatch.setattr("layerfold.checkpoint.load.hub_reachable", lambda: False)
    assert layerfold(*words, "--set", "clip=2").code == 2
    done = layerfold(*words, "--set", "clip=2", "--overwrite")
    assert done.code == 0, done.err
    assert load(tmp_path / "out").provenance.steps[-1]["method"]["clip"] == 2
    assert not (tmp_path / "out.training").exists()


def test_a_recovery_that_diverges_is_one_line_and_says_what_is_left(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    words = recover_words(model, study_corpus, tmp_path / "out", "--method", "finetune", "--learning-rate", "1e5")
    done = layerfold(*words, "--set", "warmup=0", "--set", "clip=1e9")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "training diverged at learning rate 100000" in done.err
    assert not (tmp_path / "out").exists()
