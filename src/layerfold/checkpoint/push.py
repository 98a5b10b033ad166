"""Publishing: a checkpoint's files on the Hub, read back before they are called written."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfold.checkpoint.card import CARD, HUB_ID, metadata_of, with_licence
from layerfold.checkpoint.save import read_manifest
from layerfold.checkpoint.structure import MANIFEST
from layerfold.environment import hub_reachable
from layerfold.errors import InputError, OfflineError, OutputError, first_line
from layerfold.files import hash_file

_WEIGHTS = r"[^/]*\.(safetensors|safetensors\.index\.json|bits)"
_OURS = re.compile(rf"{_WEIGHTS}|(config|generation_config|tokenizer.*|layerfold)\.json")
"""Files of a checkpoint. Those of an earlier one are removed: they would be read instead of the new ones, or beside."""


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub.

    Attributes:
        folder: the checkpoint.
        repository: ``owner/name``.
        files: by name, a path, or the contents of those that are not sent as they are.
        card: the model card.
    """

    folder: Path
    repository: str
    files: dict[str, Path | bytes]
    card: str

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes in bytes, by name."""
        return {name: _size(each) for name, each in self.files.items()}


def prepare(folder: Path, repository: str) -> Upload:
    """Return what `push` would send, and send nothing. A base's licence is read from the Hub, where it can be reached.

    Names of folders of this machine stay here: of a base or a text that lies in one, its own name alone is sent.

    Raises:
        InputError: no checkpoint of layerfold, a card that is no text, or a name that the Hub does not have.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or not (folder / CARD).is_file():
        raise InputError(f"{str(folder)!r}; accepted: a checkpoint folder that layerfold wrote, with its {CARD}")
    if not HUB_ID.fullmatch(repository):
        raise InputError(f"repository {repository!r}; accepted: owner/name, of letters, digits, '-', '_' and '.'")
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(folder / CARD)!r} is not UTF-8 text") from error
    metadata = metadata_of(card)
    if "license" not in metadata and "base_model" in metadata and hub_reachable():
        licence = _licence(str(metadata["base_model"]))
        card = card if licence is None else with_licence(card, licence)
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")
    }
    files[CARD] = card.encode()
    files[MANIFEST] = json.dumps(unplaced(manifest), indent=1).encode()
    return Upload(folder, repository, files, card)


def unplaced(value: Any) -> Any:
    """Return JSON with each path of this machine replaced by its last part, and no ``location``."""
    if isinstance(value, dict):
        return {key: None if key == "location" else unplaced(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unplaced(item) for item in value]
    if isinstance(value, str) and re.match(r"[~.]{0,2}[/\\]|[A-Za-z]:[/\\]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def push(upload: Upload, *, private: bool = False, message: str = "layerfold checkpoint") -> str:
    """Send a checkpoint in one commit, and compare what the Hub has with the files; return the commit's address.

    What an earlier checkpoint left in the repository goes with the same commit.

    Raises:
        InputError: no token, or a public repository where it is to be private.
        OfflineError: the Hub cannot be reached.
        OutputError: the Hub refuses it, or has other contents afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if (token := get_token()) is None:
        raise InputError("no token for the Hub; accepted: HF_TOKEN in the environment, or one kept by `hf auth login`")
    if not hub_reachable():
        raise OfflineError("the Hub cannot be reached")
    api, repository = HfApi(token=token), upload.repository
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        before = api.model_info(repository)
        if private and before.private is False:
            raise InputError(f"--private, and {repository!r} is there already and public")
        old = [each.rfilename for each in before.siblings or () if _OURS.fullmatch(each.rfilename)]
        operations += [CommitOperationDelete(name) for name in old if name not in upload.files]
        commit = api.create_commit(repository, operations, commit_message=message)
        found = api.model_info(repository, revision=commit.oid, files_metadata=True)
    except InputError:
        raise
    except Exception as error:  # of the network, of the Hub, of the libraries that send: there is no common kind
        raise OutputError(f"the Hub did not take {repository!r}: {first_line(error)}") from error
    there = {each.rfilename: each for each in found.siblings or ()}
    for name, content in upload.files.items():
        if name not in there or not _same(there[name], content):
            raise OutputError(f"the Hub has other contents of {name!r} in {repository!r} than were sent")
    if left := sorted(name for name in there if _OURS.fullmatch(name) and name not in upload.files):
        raise OutputError(f"the Hub still has {left[0]!r} of an earlier checkpoint in {repository!r}")
    return str(commit.commit_url)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _same(entry: Any, content: Path | bytes) -> bool:
    """Whether the Hub's entry of a file is of these contents: by SHA-256 of large ones, by git's own hash of others."""
    if entry.size != _size(content):
        return False
    if entry.lfs is not None and isinstance(content, Path):
        return bool(entry.lfs.sha256 == hash_file(content))
    whole = content if isinstance(content, bytes) else content.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(whole) + whole, usedforsecurity=False).hexdigest()
    return entry.blob_id in (None, blob)


def _licence(base: str) -> str | None:
    """Return the licence that the base's card on the Hub names."""
    from huggingface_hub import HfApi

    try:
        said = HfApi().model_info(base).card_data
    except Exception:  # as above: it is not known then
        return None
    found = None if said is None else said.get("license")
    return found if isinstance(found, str) else None
