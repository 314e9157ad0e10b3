"""A local double of the Hugging Face Hub's file API: trees, path infos, and files by range."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "someone/texts"


@dataclass
class Hub:
    """Files that the double serves, and requests that it got."""

    files: dict[str, bytes]  # of the dataset ``REPO``, by path
    token: str = ""  # that a request must carry; empty: the dataset is public
    failures: int = 0  # requests of files that fail with 503 before one succeeds
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        entry = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }
        commit = {"id": "c" * 40, "title": "t", "date": "2026-11-01T00:00:00.000Z"}
        return {**entry, "lastCommit": commit}

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        begin = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in self.files:
            if not path.startswith(begin):
                continue
            parts = path[len(begin) :].split("/")
            for depth in range(1, len(parts)):
                if depth == 1 or recursive:
                    name = begin + "/".join(parts[:depth])
                    entries[name] = {"type": "directory", "path": name, "size": 0, "oid": "d" * 40}
            if len(parts) == 1 or recursive:
                entries[path] = self.entry(path)
        return list(entries.values())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append(path)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Code": "RepoNotFound"})
            return
        info = f"/api/datasets/{REPO}"
        files = f"/datasets/{REPO}/resolve/main/"
        if path.startswith(f"{info}/tree/main"):
            folder = path.removeprefix(f"{info}/tree/main").strip("/")
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
            found = self.hub.tree(folder, recursive=recursive)
            if found:
                self.answer(200, found)
            else:
                self.answer(404, {"error": "x"}, {"X-Error-Code": "EntryNotFound"})
        elif path in (info, f"{info}/revision/main"):
            self.answer(
                200, {"id": REPO, "sha": "a" * 40, "private": False, "tags": [], "siblings": []}
            )
        elif path.startswith(files) and path.removeprefix(files) in self.hub.files:
            if self.hub.failures:
                self.hub.failures -= 1
                self.answer(503, {"error": "busy"})
                return
            self.send_range(self.hub.files[path.removeprefix(files)])
        else:
            self.answer(404, {"error": "x"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        kind = self.headers["Content-Type"]
        paths = json.loads(body)["paths"] if "json" in kind else parse_qs(body)["paths"]
        self.answer(200, [self.hub.entry(path) for path in paths if path in self.hub.files])

    def send_range(self, data: bytes) -> None:
        first, _, last = self.headers.get("Range", f"bytes=0-{len(data)}")[6:].partition("-")
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` at its ``url`` in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
