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
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weighing import weigh
from layerfold.environment import DEVICE_VARIABLE
from layerfold.errors import OutputError
from layerfold.evaluators import EVALUATORS, Latency
from layerfold.model.families import FAMILIES
from layerfold.recovery import Finetune
from layerfold.text.corpora import load_corpus

pytestmark = pytest.mark.usefixtures("offline")


def same_logits(one: Any, two: Any) -> bool:
    ids = torch.arange(8)[None]
    return torch.equal(*((each.decoder.model if isinstance(each, Model) else each)(ids).logits for each in (one, two)))


@pytest.mark.parametrize("method", ["merge", "collapse"])
def test_compress_writes_what_plain_transformers_loads(compress: Any, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    assert "block  1 to  0: mean matched correlation" in compress(f"{method} --n 2").out
    assert same_logits(AutoModelForCausalLM.from_pretrained(out), load(out))
    step = json.loads((out / "layerfold.json").read_text())["provenance"]["steps"][0]
    assert step["method"]["groups"] == "0-1,2-3"
    assert step["calibration"]["split"] == "calibration+train"


def test_a_tied_merge_is_smaller_in_compact_form_and_exports_to_dense(
    compress: Any, export: Any, tmp_path: Path
) -> None:
    compress("merge --n 4 --align none --tie --format compact")
    dense = export(tmp_path / "out", "dense", "dense")
    sizes = [(tmp_path / name).stat().st_size for name in ("out/layerfold.safetensors", "dense/model.safetensors")]
    assert sizes[0] < 0.6 * sizes[1]
    assert same_logits(load(tmp_path / "out"), load(dense))
    assert same_logits(load(export(dense, "compact", "again")), load(dense))


@pytest.mark.parametrize(
    ("words", "dropped", "blocks"),
    [
        ("--blocks 1,3", "blocks 1,3", 2),
        ("--random 2 --seed 1", "blocks 1,2", 2),
        ("--fraction 0.5 --part attention --format compact", "the attention of blocks 1,3", 4),
        ("--blocks 0-3 --part ffn", "the ffn of blocks 0,1,2,3", 4),
    ],
    ids=["named", "drawn", "attention", "ffn"],
)
def test_drop_says_what_it_dropped_and_what_is_left(
    compress: Any, tmp_path: Path, words: str, dropped: str, blocks: int
) -> None:
    done = compress(f"drop {words}")
    made = load(tmp_path / "out").decoder
    smaller = made.size().parameters
    assert smaller < 60_320
    weighed = weigh(made, torch.float32).said(weigh(tiny("gpt2").decoder, torch.float32))
    assert done.out.splitlines() == [
        f"dropped {dropped}",
        f"60,320 distinct parameters in 4 blocks -> {smaller:,} in {blocks}",
        f"on disk: {weighed}",
        f"wrote {tmp_path / 'out'} ({'compact' if '--format' in words else 'dense'}, float32)",
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
    assert told.out.count("\n  greedy > ") == told.out.count("\n  sampled > ") == 8


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
    assert "TFLOP/s" in found["devices"]["cpu"]
    monkeypatch.setattr("layerfold.cli.doctor.matrix_product_rate", lambda *_: 2.5e12)
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    told = layerfold("doctor").out
    assert "cpu: float32 2.5, bfloat16 2.5 TFLOP/s" in told
    assert "auto takes: cpu, float32" in told


def test_doctor_says_what_each_family_admits(layerfold: Any) -> None:
    found = json.loads(layerfold("doctor", "--families", "--json").out)
    assert set(found) == set(FAMILIES)
    assert found["olmo2"]["heads"] == "together: q_norm spans all heads"
    assert found["gemma2"]["refit"] == "attention and FFN in turn: a norm follows each"
    told = layerfold("doctor", "--families")
    assert "mpt\n" in told.out
    assert "  width: fixed: narrower ones are padded\n" in told.out
    assert told.err == ""


@pytest.mark.parametrize("method", ["merge", "collapse"])
def test_auto_says_what_the_published_groups_scored_and_what_it_took(
    compress: Any, tmp_path: Path, method: str
) -> None:
    done = compress(f"{method} --groups auto --tokens 512")
    step = load(tmp_path / "out").provenance.steps[-1]
    found = re.findall(r"groups +([\d,-]+): selection perplexity ([\d.e+,]+)\n", done.out)
    exact = step["notes"]["search"]["perplexity"]
    assert [groups for groups, _ in found] == list(exact)
    assert found[0][0] == "0-1,2-3"
    assert [float(value.replace(",", "")) for _, value in found] == pytest.approx(list(exact.values()), rel=1e-3)
    assert found[-1][0] == step["method"]["groups"]
    assert re.search(rf"groups {found[-1][0]} are the best of [3-6] groupings scored\n", done.out)
    compress(f"{method} --groups {found[-1][0]} --tokens 512", out="again")
    assert load(tmp_path / "again").sha256 == load(tmp_path / "out").sha256


def test_an_output_that_holds_something_is_left_alone_unless_told(compress: Any, tmp_path: Path, write: Any) -> None:
    kept = write("mine/notes.txt", "mine")
    refused = compress("merge --n 2 --align none", out="mine", code=2)
    assert kept.read_text() == "mine"
    assert "is not empty; --overwrite replaces it" in refused.err
    compress("merge --n 2 --align none", out="mine/notes.txt", code=2)
    compress("merge --n 2 --align none --overwrite", out="mine")
    assert not kept.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# recover


FINETUNE = "--method finetune --learning-rate 1e-3"


def test_recover_learns_from_the_base_and_writes_what_loads_anywhere(
    compress: Any, recover: Any, study_corpus: str, tmp_path: Path
) -> None:
    base, half, out = (tmp_path / name for name in ("base", "half", "out"))
    tiny_model("gpt2").save_pretrained(base)
    tokenizer().save_pretrained(base)
    compress("collapse --n 2 --align none", out="half", of=base)
    done = recover(of=half, lm_weight=0.9, search_fraction=0.5)
    text, trained, validation, weighed, wrote = done.out.splitlines()
    share = load_corpus(study_corpus, "train").share
    assert text == f"training: {study_corpus!r}, split train, {share}: 256 tokens"
    assert re.fullmatch(
        r"trained on 256 tokens and \d{3} to choose the learning rate, \d+ s, learning rate \S+", trained
    )
    found = re.fullmatch(r"validation perplexity (\S+) -> (\S+) \(weights of step 4 of 4\)", validation)
    assert found
    assert float(found[2]) < float(found[1])
    assert (weighed, wrote) == ("on disk: 0.14 MB", f"wrote {out} (dense, float32)")
    assert "Traceback" not in done.err
    assert not (tmp_path / "out.training").exists()
    recovered, plain = load(out), AutoModelForCausalLM.from_pretrained(out)
    step = recovered.provenance.steps[-1]
    assert [each["method"]["name"] for each in recovered.provenance.steps] == ["collapse", "distill"]
    assert step["method"]["teacher_sha256"] == load(base).sha256
    assert step["notes"]["validation_perplexity"] == pytest.approx(float(found[2]), rel=1e-3)
    assert same_logits(plain, recovered)
    assert plain.config.use_cache


def test_recover_sets_what_it_is_told(recover: Any, model: Path, tmp_path: Path) -> None:
    freeze = "--freeze *.wte.* --freeze *.wpe.*"
    done = recover(f"{FINETUNE} --seed 3 {freeze} --format compact", schedule="constant", evaluations=2)
    assert "\ntrained on 256 tokens, " in done.out
    assert done.out.endswith(f"wrote {tmp_path / 'out'} (compact, float32)\n")
    settings: dict[str, Any] = {"name": "finetune", "schedule": "constant", "evaluations": 2, "batch_size": 4}
    settings |= {"context": 16, "learning_rate": 1e-3, "freeze": ["*.wte.*", "*.wpe.*"], "seed": 3}
    assert load(tmp_path / "out").provenance.steps[-1]["method"].items() >= settings.items()
    before, after = (load(folder).decoder.model.state_dict() for folder in (model, tmp_path / "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}


def test_a_setting_that_has_an_option_of_its_own_is_not_dropped(
    recover: Any, study_corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def stop(_: Any, recovery: Any, **__: Any) -> None:
        reached.append(recovery)
        raise OutputError("reached")

    monkeypatch.setattr("layerfold.api.recover", stop)
    recover("--method finetune", code=2, learning_rate="2e-3", freeze="['*.wte.*']", report_to="wandb")
    few = {"context": 16, "batch_size": 4, "validation_tokens": 64, "learning_rate": 2e-3, "freeze": ("*.wte.*",)}
    assert reached == [Finetune(tokens=256, corpus=study_corpus, report_to="wandb", **few)]


def test_recover_refused_before_any_work_can_be_mended(
    recover: Any, study_corpus: str, write: Any, tmp_path: Path
) -> None:
    kept = write("mine/notes.txt", "mine")
    text = load_corpus(study_corpus, "train").documents[0].strip()
    held_out = write("other.txt", "\n\n".join([text, *(f"document {i}" for i in range(12))]))
    for more, *said in (
        ((), "is not empty; --overwrite replaces it"),
        (("--overwrite", "--freeze", "*.wtf.*"), "freeze '*.wtf.*'"),
        (("--overwrite", "--held-out", held_out), "1 documents stand in both", text[:30]),
    ):
        refused = recover(FINETUNE, *more, out="mine", code=2)
        assert (refused.out, refused.err.count("\n")) == ("", 1)
        assert all(each in refused.err for each in said)
        assert kept.read_text() == "mine"
        assert not (tmp_path / "mine.training").exists(), "before any work"
    recover(FINETUNE, "--overwrite", "--freeze", "*.wte.*", "--held-out", study_corpus, out="mine")
    assert not kept.exists()
    assert load(kept.parent).decoder.n_blocks == 4
    assert not (tmp_path / "mine.training").exists()


def test_recover_killed_and_started_again_goes_on(
    recover: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def on_step_end(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("layerfold.recovery.callbacks.Bar.on_step_end", on_step_end)
        with pytest.raises(Killed):
            recover(FINETUNE)
    training = tmp_path / "out.training"
    assert (training / "checkpoint-2").is_dir()
    assert not (tmp_path / "out").exists()
    refused = recover(FINETUNE, code=2, clip=2)
    assert refused.err.count("\n") == 1
    assert "was begun with other settings: clip was 1.0 and is 2.0" in refused.err
    recover(FINETUNE)
    assert not training.exists()
    recover(FINETUNE, out="whole")
    one, two = (load(tmp_path / name) for name in ("out", "whole"))
    assert one.sha256 == two.sha256
    assert one.provenance.steps[-1]["notes"]["curve"] == two.provenance.steps[-1]["notes"]["curve"]


def test_recover_begun_with_other_settings_begins_anew_where_told(
    recover: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutputError("full")

    with monkeypatch.context() as patch:
        patch.setattr("layerfold.checkpoint.model.Model.save", full)
        recover(FINETUNE, code=2)
    assert (tmp_path / "out.training").is_dir(), "what was trained is kept where it cannot be saved"
    recover(FINETUNE, code=2, clip=2)
    recover(FINETUNE, "--overwrite", clip=2)
    assert load(tmp_path / "out").provenance.steps[-1]["method"]["clip"] == 2
    assert not (tmp_path / "out.training").exists()


def test_a_recovery_that_diverges_is_one_line_and_says_what_is_left(recover: Any, tmp_path: Path) -> None:
    done = recover("--method finetune --learning-rate 1e5", code=2, warmup=0, clip=1e9)
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert "training diverged at learning rate 100000" in done.err
    assert not (tmp_path / "out").exists()
