"""As much of the Hub as huggingface_hub, datasets and transformers ask for, on the loopback, from folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)")
PINNED = re.compile("[0-9a-f]{40}")


class Hub(ThreadingHTTPServer):
    """A Hub whose repositories are folders.

    Attributes:
        repositories: ``models/owner/name`` or ``datasets/owner/name`` -> revision -> folder.
        gated: Those whose files nobody may have, with the status: 401 (not logged in) or 403 (not accepted).
        cut: What the names of files end with that the server sends half of, and then closes the connection.
        asked: ``GET /path`` of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.start()
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: dict[str, int] = {}
        self.cut: tuple[str, ...] = ()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        """Answer."""
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuse every connection during the block."""
        self.shutdown()
        self.socket.close()
        try:
            yield
        finally:
            self.socket = socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            self.start()

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder as a revision of a repository, and what was there before as its commit; returns the commit."""
        revisions = self.repositories.setdefault(name, {})
        if revision in revisions:
            revisions[commit_of(revision, revisions[revision])] = revisions[revision]
        revisions[revision] = folder
        return commit_of(revision, folder)


def commit_of(revision: str, folder: Path) -> str:
    """The revision if it is a commit, else a hash of what is in the folder."""
    return revision if PINNED.fullmatch(revision) else sha1(repr(sorted(oids(folder).items())).encode()).hexdigest()


def oids(folder: Path) -> dict[str, str]:
    """File -> hash of its content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha1(path.read_bytes()).hexdigest() for path in files}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Information on a repository, a listing, or a file."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        api, file = API.fullmatch(path), FILE.fullmatch(path)
        if api:
            kind, name, what, revision, inside = api.groups()
        elif file:
            kind, (name, revision, inside), what = "datasets" if file[1] else "models", file.groups()[1:], "resolve"
        else:
            return self.answer(401, error="RepoNotFound")
        revisions, revision = self.server.repositories.get(f"{kind}/{name}"), revision or "main"
        if revisions is None:
            return self.answer(401, error="RepoNotFound")
        commits = {commit_of(*each): each[1] for each in revisions.items()}
        folder = revisions.get(revision) or commits.get(revision)
        if folder is None:
            return self.answer(404, error="RevisionNotFound")
        commit, found = commit_of(revision, folder), oids(folder)
        if what == "resolve":
            return self.send_file(self.server.gated.get(f"{kind}/{name}"), folder, inside, commit, found.get(inside))
        if what == "paths-info":
            listed = [entry for entry in entries(folder, found) if entry["path"] in parse_qs(body)["paths"]]
        elif what == "tree":
            prefix, deep = f"{inside}/" if inside else "", "recursive=true" in self.path.lower()
            below = [entry for entry in entries(folder, found) if entry["path"].startswith(prefix)]
            listed = [entry for entry in below if deep or "/" not in entry["path"].removeprefix(prefix)]
            if not below:
                return self.answer(404, error="EntryNotFound", commit=commit)
        else:
            files = [{"rfilename": file} for file in found]
            listed = {"id": name, "sha": commit, "private": False, "siblings": files, "tags": []}
        return self.answer(200, json.dumps(listed).encode(), commit=commit)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def send_file(self, gated: int | None, folder: Path, file: str, commit: str, oid: str | None) -> None:
        """The content of a file, or the part that is asked for."""
        if gated:
            return self.answer(gated, error="GatedRepo", commit=commit)
        if oid is None:
            return self.answer(404, error="EntryNotFound", commit=commit)
        content, status, extra = (folder / file).read_bytes(), 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
            status, extra["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        return self.answer(status, content, commit=commit, cut=file.endswith(self.server.cut or ("\0",)), **extra)

    def answer(
        self, status: int, body: bytes = b"", *, error: str = "", commit: str = "", cut: bool = False, **headers: str
    ) -> None:
        """Send all of it, or the first half."""
        self.send_response(status)
        extra = {"X-Error-Code": error, "X-Repo-Commit": commit, "Content-Length": str(len(body)), **headers}
        for name, value in extra.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


def entries(folder: Path, found: dict[str, str]) -> Iterator[dict[str, object]]:
    """Files and folders of a repository."""
    folders = {parent.as_posix() for file in found for parent in list(Path(file).parents)[:-1]}
    yield from ({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders))
    for path, oid in sorted(found.items()):
        yield {"type": "file", "path": path, "oid": oid, "size": (folder / path).stat().st_size}
