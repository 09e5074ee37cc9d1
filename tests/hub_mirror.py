"""A mirror of both hubs on this machine: it serves a folder by the paths that their libraries ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def listing(root: Path) -> list[dict[str, Any]]:
    """Every file of a dataset as both hubs list it."""
    found = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name, data = path.relative_to(root).as_posix(), path.read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        hf = {"type": "file", "path": name, "size": len(data), "oid": oid}
        digest = hashlib.sha256(data).hexdigest()
        ms = {
            "Type": "blob",
            "Path": name,
            "Name": path.name,
            "Size": len(data),
            "Sha256": digest,
            "IsLFS": False,
        }
        found.append(hf | ms)
    return found


def tree(root: Path, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What Hugging Face lists under a folder."""
    files = [f for f in listing(root) if f["path"].startswith(f"{folder}/" if folder else "")]
    if recursive:
        return files
    below = {f["path"].removeprefix(f"{folder}/").partition("/")[0] for f in files}
    folders = [
        {"type": "directory", "path": name, "oid": ""} for name in below if (root / folder / name).is_dir()
    ]
    return [*folders, *(f for f in files if Path(f["path"]).parent == Path(folder))]


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = parse_qs(url.query)
        self.server.asked.append(self.path)
        path = unquote(url.path).strip("/").removeprefix("api/").removeprefix("v1/")
        match path.split("/"):
            case ["datasets" | "models", "owner", "poems", *more] if more[:1] in ([], ["revision"]):
                siblings = [{"rfilename": f["path"]} for f in listing(self.server.root)]
                self._json({"id": "owner/poems", "sha": COMMIT, "siblings": siblings, "private": False})
            case ["datasets" | "models", "owner", "poems", "tree", _, *parts]:
                self._json(tree(self.server.root, "/".join(parts), asked["recursive"] == ["true"]))
            case ["datasets", "owner", "poems", "resolve", _, *parts]:
                self._file("/".join(parts), COMMIT)
            case ["owner", "poems", "resolve", _, *parts]:
                self._file("/".join(parts), COMMIT)
            case ["datasets", "owner", "poems", "repo", "tree"]:
                files = listing(self.server.root)
                self._json({"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}})
            case ["datasets", "owner", "poems", "repo"]:
                self._file(asked["FilePath"][0])
            case _:
                self._json({"error": "not here"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append(f"{self.path} {asked}")
        names = parse_qs(asked).get("paths") or json.loads(asked or "{}").get("paths", [])
        self._json([f for f in listing(self.server.root) if f["path"] in names])

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _file(self, name: str, commit: str = "") -> None:
        path = self.server.root / name
        if not path.is_file():
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        wanted = self.headers.get("Range")
        if not wanted:
            self._send(data, 200, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._send(part, 206, headers)

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


class Mirror(ThreadingHTTPServer):
    """Serves `root` as the dataset (and model) owner/poems of both hubs; `asked` are the paths so far."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def mirror(root: Path) -> Iterator[Mirror]:
    """A running mirror."""
    with Mirror(root) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
