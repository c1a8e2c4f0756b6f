"""A server that speaks the Hugging Face Hub's API for a folder of repositories: ORG/REPO/files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


class Hub:
    """The folder that is served, faults to show, and what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Ends a download's connection after so many bytes, once.
        self.cut_after_bytes: int | None = None
        # Sends other bytes than those that were promised.
        self.is_damaging = False
        self.gated: set[str] = set()
        # Files are sent only as many at once as it has parties.
        self.together: threading.Barrier | None = None
        self.ranges: list[str] = []
        self.url = ""


@contextlib.contextmanager
def hub_of(folder: Path) -> Iterator[Hub]:
    """Serve ``folder`` while the context lasts."""
    hub = Hub(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self._hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts == ["api", "models"]:
            self._search(parse_qs(address.query))
        elif parts[:2] == ["api", "models"]:
            self._of_repository("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _search(self, query: dict[str, list[str]]) -> None:
        words = query.get("search", [""])[0].casefold()
        wants_gguf = query.get("filter") == ["gguf"]
        found = []
        for repository in sorted(self._hub.folder.glob("*/*")):
            name = repository.relative_to(self._hub.folder).as_posix()
            has_gguf = any(repository.glob("*.gguf"))
            if words in name.casefold() and (has_gguf or not wants_gguf):
                gated = "auto" if name in self._hub.gated else False
                found.append({"id": name, "downloads": 1234, "likes": 5, "gated": gated})
        self._answer(found)

    def _of_repository(self, name: str, rest: list[str]) -> None:
        folder = self._hub.folder / name
        if not folder.is_dir():
            self._refuse(404, "RepoNotFound")
        elif rest[:1] == ["tree"]:
            self._answer([_entry(folder, path) for path in _files(folder)])
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            siblings = [
                {"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)
            ]
            self._answer({"id": name, "sha": COMMIT, "siblings": siblings})

    def _file(self, repository: str, name: str) -> None:
        path = self._hub.folder / repository / name
        if repository in self._hub.gated:
            self._refuse(403, "GatedRepo")
            return
        if not path.is_file():
            is_there = (self._hub.folder / repository).is_dir()
            self._refuse(404, "EntryNotFound" if is_there else "RepoNotFound")
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            self._hub.ranges.append(asked)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(end, int(last) + 1) if last else end
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{_checksum(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._hub.together is not None:
            self._hub.together.wait(timeout=20)
        self._send(content[start:end])

    def _send(self, content: bytes) -> None:
        if self._hub.is_damaging:
            content = bytes(byte ^ 1 for byte in content)
        if self._hub.cut_after_bytes is not None:
            content, self._hub.cut_after_bytes = content[: self._hub.cut_after_bytes], None
            self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

    def _answer(self, told: object) -> None:
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_large(path: Path) -> bool:
    return path.suffix in (".gguf", ".safetensors")


def _checksum(path: Path) -> str:
    content = path.read_bytes()
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "oid": "0" * 40,
        "size": path.stat().st_size,
        "path": path.relative_to(folder).as_posix(),
    }
    if _is_large(path):
        entry["lfs"] = {"oid": _checksum(path), "size": path.stat().st_size, "pointerSize": 130}
    return entry
