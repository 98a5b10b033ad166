"""Model cards, and checkpoints on the Hub: a stand-in on this machine takes them and serves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Hub, running
from tiny import logits, refused, shared, tiny

import layerfold as package
from layerfold.checkpoint.card import Figure, card, licence_of, metadata_of, with_licence
from layerfold.checkpoint.load import load
from layerfold.checkpoint.provenance import Provenance
from layerfold.checkpoint.push import prepare, unplaced
from layerfold.errors import InputError
from layerfold.maths.intervals import Interval
from layerfold.methods import Drop

_TYPED = """
import contextlib, io, json, os, sys
from layerfold import cli

found = []
for command in json.loads(sys.argv[1]):
    if command[0] == "load":
        import layerfold
        model = layerfold.load(command[1])
        size = model.decoder.size().parameters
        found.append([0, [model.provenance.base, len(model.provenance.steps), size, model.stored.licence], ""])
        continue
    if command[0] == "forget":
        del os.environ["HF_TOKEN"]
        continue
    out, err, sys.argv = io.StringIO(), io.StringIO(), ["layerfold", *command]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main()
        except SystemExit as exit:
            code = exit.code
    found.append([code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


def typed(hub: Hub, home: Path, *commands: list[Any]) -> list[Any]:
    """Run commands in a process that has the stand-in as the Hub; return status, output and errors of each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", _TYPED, json.dumps([list(map(str, each)) for each in commands])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compressed(folder: Path, *, base: str = "tiny", form: str = "dense") -> Path:
    """Write a checkpoint of two blocks."""
    model = tiny("gpt2")
    model = package.compress(package.Model(model.decoder, model.tokenizer, Provenance(base)), Drop(blocks="1,2"))
    (shared(model) if form == "compact" else model).save(folder, format=form)  # type: ignore[arg-type]
    return folder


def test_a_checkpoint_goes_to_the_hub_and_loads_from_there(hub: Hub, tmp_path: Path) -> None:
    hub.licences["owner/base"] = "mit"
    dense = compressed(tmp_path / "dense", base="owner/base")
    compact = compressed(tmp_path / "compact", base="owner/base", form="compact")
    dry, *done = typed(
        hub,
        tmp_path / "home",
        ["push", dense, "me/dry", "--dry-run"],
        ["push", dense, "me/dense"],
        ["push", compact, "me/compact", "--private"],
        ["load", "me/dense"],
        ["load", "me/compact"],
    )
    assert dry[0] == 0
    assert "license: mit" in dry[1]
    assert dry[1].endswith("nothing was sent; without --dry-run it goes to me/dry\n")
    assert hub.private == {"me/dense": False, "me/compact": True}
    for folder, (code, out, err), back in zip((dense, compact), done[:2], done[2:], strict=True):
        name = f"me/{folder.name}"
        assert code == 0, err
        assert out.splitlines()[-1].startswith(f"wrote {hub.address}/{name}/commit/")
        sent = hub.files[name]
        assert sent.keys() == {path.name for path in folder.iterdir()}
        rewritten = ("README.md", "layerfold.json")
        assert all(sent[path.name] == path.read_bytes() for path in folder.iterdir() if path.name not in rewritten)
        assert metadata_of(sent["README.md"].decode())["base_model"] == "owner/base"
        here = load(folder)
        assert back[1] == ["owner/base", len(here.provenance.steps), here.decoder.size().parameters, "mit"]


def test_what_an_earlier_checkpoint_left_goes_and_a_public_repository_stays_public(hub: Hub, tmp_path: Path) -> None:
    folder = compressed(tmp_path / "model", form="compact")
    weights = {"model.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    hub.files |= {"me/model": weights | {"notes.txt": b"mine", ".gitattributes": b""}, "me/public": {}}
    hub.private["me/public"] = False
    replaced, public = typed(
        hub, tmp_path / "home", ["push", folder, "me/model"], ["push", folder, "me/public", "--private"]
    )
    assert replaced[0] == 0, replaced[2]
    assert hub.files["me/model"].keys() == {path.name for path in folder.iterdir()} | {"notes.txt", ".gitattributes"}
    assert public[0] == 2
    assert "--private, and 'me/public' is there already and public" in public[2]
    assert hub.files["me/public"] == {}


def test_paths_of_this_machine_are_not_sent() -> None:
    manifest = {
        "provenance": {"base": "/home/me/models/base", "location": "../models/base"},
        "steps": [{"calibration": {"corpus": "C:\\texts\\mine.txt", "split": "a/b"}}, "~/x/y.txt", "../z.txt", 3],
    }
    assert unplaced(manifest) == {
        "provenance": {"base": "base", "location": None},
        "steps": [{"calibration": {"corpus": "mine.txt", "split": "a/b"}}, "y.txt", "z.txt", 3],
    }


def test_nothing_is_called_written_that_does_not_read_back(hub: Hub, tmp_path: Path) -> None:
    folder = compressed(tmp_path / "model")
    hub.refused, hub.damaged = {"me/refused"}, {"me/damaged"}
    refused, damaged, untold = typed(
        hub,
        tmp_path / "home",
        ["push", folder, "me/refused"],
        ["push", folder, "me/damaged"],
        ["forget"],
        ["push", folder, "me/model"],
    )
    assert [each[0] for each in (refused, damaged, untold)] == [2, 2, 2]
    assert "layerfold: the Hub did not take 'me/refused': " in refused[2]
    assert "the Hub has other contents of 'model.safetensors' in 'me/damaged' than were sent" in damaged[2]
    assert "wrote" not in damaged[1]
    assert untold[2].endswith(
        "layerfold: no token for the Hub; accepted: HF_TOKEN in the environment, or one kept by `hf auth login`\n"
    )
    assert "me/model" not in hub.files


def test_what_is_no_checkpoint_or_no_name_is_refused(tmp_path: Path) -> None:
    with refused(InputError, says="; accepted: a checkpoint folder that layerfold wrote, with its README.md"):
        prepare(tmp_path, "me/model")
    folder = compressed(tmp_path / "model")
    for name in ("model", "me/../model", "me/mo del", "me/a/b", ""):
        with refused(InputError, says=f"repository {name!r}; accepted: owner/name"):
            prepare(folder, name)


def test_the_card_says_what_was_done_and_what_it_costs() -> None:
    model = package.compress(tiny("llama"), Drop(blocks="1"))
    figures = [Figure("perplexity", Interval(51.25, 50.0, 52.5), "perplexity-2", "imdb | test")]
    text = card(model.decoder, model.provenance, None, "dense", torch.float16, figures)
    metadata = metadata_of(text)
    assert metadata["library_name"] == "transformers"
    assert metadata["tags"] == ["layerfold", "compressed", "drop"]
    assert "license" not in metadata
    assert metadata["base_model"] == "tiny"
    assert '- drop: `{"part": "block", "blocks": "1"}`' in text
    assert "| perplexity | 51.25 | 50 ... 52.5 | perplexity-2 | imdb   test |" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "- llama.cpp: `layerfold export FOLDER --to gguf` writes what it reads (llama)" in text
    assert f"{model.decoder.size().parameters:,} distinct parameters in 3 blocks, " in text


def test_a_base_without_a_name_for_the_hub_keeps_its_folder_to_itself(tmp_path: Path) -> None:
    folder = compressed(tmp_path / "secret" / "model")
    (folder / "layerfold.json").unlink()
    model = package.compress(load(folder), Drop(blocks="1"))
    text = card(model.decoder, model.provenance, None, "compact", torch.float32)
    assert "secret" not in text
    assert text.splitlines()[text.splitlines().index("---", 1) + 2] == "# model, smaller"
    assert metadata_of(text)["library_name"] == "layerfold"


def test_a_licence_is_carried_over(tmp_path: Path) -> None:
    assert package.load("pocket").stored.licence == "apache-2.0"
    folder = compressed(tmp_path / "model")
    assert licence_of(folder) is None
    text = with_licence((folder / "README.md").read_text(), "mit")
    (folder / "README.md").write_text(text)
    again = package.compress(load(folder), Drop(blocks="1"))
    again.save(tmp_path / "again")
    assert licence_of(tmp_path / "again") == "mit"
    for head in ("license: [", "released: 2024-13-45", "[" * 5000):
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        assert licence_of(folder) is None
    (folder / "README.md").write_bytes("Prix: 5 €".encode("cp1252"))
    assert licence_of(folder) is None
    with refused(InputError, says="is not UTF-8 text"):
        prepare(folder, "me/model")
    assert yaml.safe_load(with_licence("no head", "mit").split("---")[1]) == {"license": "mit"}
    assert torch.equal(logits(load(folder).decoder), logits(load(tmp_path / "model").decoder))
