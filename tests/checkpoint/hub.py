"""A stand-in for the Hub on this machine: it takes commits, and serves what it took."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


def blob(content: bytes) -> str:
    """Return git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory.

    Attributes:
        files: contents by repository and name.
        large: contents that were sent apart, by their hash.
        licences: of repositories that have nothing else.
        private: whether a repository is.
        refused: repositories whose commits are answered by 403.
        damaged: repositories in whose large files a bit is turned.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.licences: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.refused: set[str] = set()
        self.damaged: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if "/resolve/" in path:
            repository, _, rest = path.partition("/resolve/")
            content = self.server.files.get(repository, {}).get(rest.partition("/")[2])
            if content is None:
                code = "EntryNotFound" if repository in self.server.files else "RepoNotFound"
                self.answer({}, 404, X_Error_Code=code)
            else:
                tag = hashlib.sha256(content).hexdigest()
                self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{tag}"')
            return
        repository = "/".join(path.split("/")[2:4])
        found = self.server.files.get(repository)
        if found is None and repository not in self.server.licences:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        if "/tree/" in path:
            entries = (found or {}).items()
            self.answer(
                [{"type": "file", "path": name, "size": len(content), "oid": COMMIT} for name, content in entries]
            )
            return
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": blob(content)}
            | ({"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}}
               if name.endswith(".safetensors") else {})
            for name, content in (found or {}).items()
        ]  # fmt: skip
        data = {"license": self.server.licences[repository]} if repository in self.server.licences else {}
        private = self.server.private.get(repository, False)
        self.answer({"id": repository, "sha": COMMIT, "siblings": siblings, "cardData": data, "private": private})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.strip("/")
        if path == "api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(repository, {})
            self.server.private.setdefault(repository, asked.get("visibility") == "private")
            self.answer({"url": f"{self.server.address}/{repository}"})
        elif "/preupload/" in path:
            modes = [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer({"files": modes})
        elif path.endswith("objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[2:4]), body)
        else:
            self.answer({})

    def _commit(self, repository: str, body: bytes) -> None:
        if repository in self.server.refused:
            self.answer({"error": "no right to write"}, 403)
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                damaged = content[:-1] + bytes([content[-1] ^ 1])
                self.server.files[repository][value["path"]] = damaged if repository in self.server.damaged else content
            elif entry["key"] == "deletedFile":
                del self.server.files[repository][value["path"]]
        address = f"{self.server.address}/{repository}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[self.path.rpartition("/")[2]] = content
        self.answer({})


@contextmanager
def running() -> Iterator[Hub]:
    """Yield a stand-in that answers."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
