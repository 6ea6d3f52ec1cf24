"""A model hub on the loopback: the addresses that huggingface_hub asks, and how they go wrong."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves `repos`: {(kind, id): {file: bytes}}, kind is models or datasets.

    `gated` ids want `token`; `corrupt` files arrive with one byte changed; `log` has every request.
    """

    daemon_threads = True

    def __init__(self, repos, gated=(), token="right", corrupt=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.gated, self.token, self.corrupt = repos, gated, token, corrupt
        self.log = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def send(self, code, content=b"", headers=(), body=True):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, code, reason, body):
        self.send(code, b"{}", {"X-Error-Code": reason, "X-Error-Message": reason}, body)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self.refuse(404, "EntryNotFound", body)
        key = (api[1], api[2]) if api else ("datasets" if file[1] else "models", file[2])
        files = self.server.repos.get(key)
        given = self.headers.get("Authorization")
        if files is None:
            return self.refuse(404, "RepoNotFound", body)
        if key[1] in self.server.gated and given != f"Bearer {self.server.token}":
            return self.refuse(403 if given else 401, "GatedRepo", body)
        return self.answer_known(api, file, files, body)

    def answer_known(self, api, file, files, body):
        commit = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        if (api or file)[3] not in (None, "main", commit):
            return self.refuse(404, "RevisionNotFound", body)
        if api:
            siblings = [describe(name, content) for name, content in sorted(files.items())]
            about = {"id": api[2], "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
            kind = {"Content-Type": "application/json"}
            return self.send(200, json.dumps(about).encode(), kind, body)
        if file[4] not in files:
            return self.refuse(404, "EntryNotFound", body)
        content = files[file[4]]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if file[4] in self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.send(200, content, headers, body)


def describe(name, content):
    """A file as the hub lists it; those that are not text are in large-file storage."""
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"rfilename": name, "size": len(content), "blobId": git}
    if not name.endswith((".json", ".md")):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serve(repos, **options):
    """A running hub."""
    hub = Hub(repos, **options)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
