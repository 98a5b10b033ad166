"""Publishing: a checkpoint's files on the Hub, read back before they are called written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfold.checkpoint.card import CARD, HUB_ID, metadata_of, with_licence
from layerfold.checkpoint.save import read_manifest
from layerfold.environment import hub_reachable
from layerfold.errors import InputError, OfflineError, OutputError, first_line
from layerfold.files import hash_file


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub.

    Attributes:
        folder: the checkpoint.
        repository: ``owner/name``.
        files: sizes by name, in bytes.
        card: the model card.
    """

    folder: Path
    repository: str
    files: dict[str, int]
    card: str


def prepare(folder: Path, repository: str) -> Upload:
    """Return what `push` would send, and send nothing. A base's licence is read from the Hub, where it can be reached.

    Raises:
        InputError: no checkpoint of layerfold, or a name that the Hub does not have.
    """
    if not folder.is_dir() or read_manifest(folder) is None or not (folder / CARD).is_file():
        raise InputError(f"{str(folder)!r}; accepted: a checkpoint folder that layerfold wrote, with its {CARD}")
    if not HUB_ID.fullmatch(repository):
        raise InputError(f"repository {repository!r}; accepted: owner/name, of letters, digits, '-', '_' and '.'")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    card = (folder / CARD).read_text(encoding="utf-8")
    metadata = metadata_of(card)
    if "license" not in metadata and "base_model" in metadata and hub_reachable():
        licence = _licence(str(metadata["base_model"]))
        card = card if licence is None else with_licence(card, licence)
    return Upload(folder, repository, {name: size for name, size in files.items() if not name.startswith(".")}, card)


def push(upload: Upload, *, private: bool = False, message: str = "layerfold checkpoint") -> str:
    """Send a checkpoint in one commit, and compare what the Hub has with the files; return the commit's address.

    Raises:
        InputError: no token, or one that may not write there.
        OfflineError: the Hub cannot be reached.
        OutputError: the Hub refuses it, or has other contents afterwards.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if (token := get_token()) is None:
        raise InputError("no token for the Hub; accepted: HF_TOKEN in the environment, or one kept by `hf auth login`")
    if not hub_reachable():
        raise OfflineError("the Hub cannot be reached")
    api = HfApi(token=token)
    contents: dict[str, Any] = {name: upload.folder / name for name in upload.files} | {CARD: upload.card.encode()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api.create_repo(upload.repository, private=private, exist_ok=True)
        commit = api.create_commit(upload.repository, operations, commit_message=message)
        found = api.model_info(upload.repository, revision=commit.oid, files_metadata=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"the Hub did not take {upload.repository!r}: {first_line(error)}") from error
    there = {each.rfilename: each for each in found.siblings or ()}
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else upload.files[name]
        entry = there.get(name)
        same = entry is not None and entry.size == size
        if same and entry is not None and entry.lfs is not None and isinstance(content, Path):
            same = entry.lfs.sha256 == hash_file(content)
        if not same:
            raise OutputError(f"the Hub has other contents of {name!r} in {upload.repository!r} than were sent")
    return str(commit.commit_url)


def _licence(base: str) -> str | None:
    """Return the licence that the base's card on the Hub names."""
    from huggingface_hub import HfApi

    try:
        said = HfApi().model_info(base).card_data
    except (OSError, ValueError):
        return None
    found = None if said is None else said.get("license")
    return found if isinstance(found, str) else None
