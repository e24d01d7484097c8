"""A small hub: a local HTTP server that speaks as much of the Hugging Face hub's API as downloading takes.

It can be told to refuse, to cut connections, and to send other bytes than it promises. Requests are remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@dataclass
class Asked:
    """A request that came: its method, path, and headers in small letters."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What the server holds, and how it is to behave.

    Attributes:
        repos: files by repository and path. large: those that are kept as LFS: by default .safetensors, .gguf, .m.
        statuses: of requests to come whose path contains the key: (status, headers), once for each entry.
        cuts: of the next contents that are sent, after how many bytes the connection is cut. wrong: bytes that are sent
            instead of a path's. token: that private and gated repositories want. gated, private: repositories.
        no_ranges: whether ranges are left unanswered.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    statuses: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    wrong: dict[str, bytes] = field(default_factory=dict)
    token: str = "hf_right"
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    licence: str = "apache-2.0"
    commit: str = COMMIT
    no_ranges: bool = False
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def contents(self) -> list[Asked]:
        """Return the requests for large files' contents."""
        return [each for each in self.asked if each.method == "GET" and each.path.startswith("/cdn/")]


def is_large(path: str) -> bool:
    """Return whether a file is kept as LFS."""
    return path.endswith((".safetensors", ".gguf", ".m"))


def blob_id(data: bytes) -> str:
    """Return git's digest of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(Asked(self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        for key, answers in self.hub.statuses.items():
            if key in path and answers:
                status, headers = answers.pop(0)
                return self._send(status, b"{}", headers)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) == 4:
            return self._info("/".join(parts[2:]))
        if parts[0] == "cdn":
            return self._content("/".join(parts[1:3]), "/".join(parts[3:]))
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        return self._send(404, b"{}")

    def _refused(self, repo: str, is_file: bool) -> bool:
        """Answer for a repository that may not be read; return whether that was so."""
        given = self.headers.get("Authorization", "")
        if given and given != f"Bearer {self.hub.token}":
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo in self.hub.private and not given:
            self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        elif repo not in self.hub.repos:
            self._send(404 if given else 401, b"{}", {"X-Error-Code": "RepoNotFound"} if given else {})
        elif repo in self.hub.gated and is_file:
            self._send(
                403 if given else 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"}
            )
        else:
            return False
        return True

    def _info(self, repo: str) -> None:
        if self._refused(repo, False):
            return
        siblings: list[dict[str, Any]] = []
        for path, data in self.hub.repos[repo].items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob_id(data)}
            if is_large(path):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        told = {"id": repo, "sha": self.hub.commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        self._send(200, json.dumps({**told, "cardData": {"license": self.hub.licence}}).encode())

    def _resolve(self, repo: str, path: str) -> None:
        if self._refused(repo, True):
            return
        data = self.hub.repos[repo].get(path)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.commit})
        elif is_large(path):
            digest = hashlib.sha256(data).hexdigest()
            about = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": self.hub.commit}
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's own contents have
            self._send(302, b"", {**about, "Location": f"{elsewhere}/cdn/{repo}/{path}"})
        else:
            sent = self.hub.wrong.get(path, data)
            self._send(200, sent, {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": self.hub.commit})

    def _content(self, repo: str, path: str) -> None:
        data = self.hub.wrong.get(path, self.hub.repos[repo][path])
        begin, asked = 0, self.headers.get("Range", "")
        if asked and not self.hub.no_ranges:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            if begin >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        most = self.hub.cuts.pop(0) if self.hub.cuts else None
        return self._send(206 if begin else 200, data[begin:], headers, most)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, most: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):
            self.wfile.write(data[:most])
            if most is not None:
                self.wfile.flush()
                self.close_connection = True


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine; its address is in `url` while the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
