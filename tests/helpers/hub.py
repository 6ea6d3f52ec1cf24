"""A model hub on the loopback: the addresses that huggingface_hub asks, and how they go wrong."""

import base64
import hashlib
import json
import re
import select
import socket
import socketserver
import struct
import threading
import time
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.helpers.command import Cosmos

PIECE = 2**20


class Hub(ThreadingHTTPServer):
    """Serves `repos`: {(kind, id): {file: bytes or the path of a large file}}.

    The kind is models or datasets. `gated` ids want `token`; `corrupt` files arrive with one byte
    changed; `lost` ones are listed but not there; `moved` ones lie on another address, as in a CDN;
    of `cut` ones only so many bytes come each time; `slow` ones come in that many pieces with a
    pause before each; those that are `together` come when so many are asked for at once. `storm`
    maps a part of an address to the codes that the next requests for it are answered with. `older`
    maps commits before the newest to their files. `log` has every request.

    It takes uploads of `token` into names of `owner`; `private` ids are seen with the token only.
    `blobs` has the large files that arrived, by sha256. `hang_up` maps a part of an address to how
    many of the next requests for it end without an answer; `after` does so once they are done.
    `licences` maps ids to those of their cards.
    """

    daemon_threads = True

    def __init__(self, repos, **faults):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.token, self.log = repos, "right", []
        self.gated = self.corrupt = self.lost = self.moved = ()
        self.cut, self.slow, self.storm = {}, {}, {}
        self.older, self.together, self.pause = {}, None, 0.3
        self.owner, self.private, self.blobs, self.commits = "me", set(), {}, []
        self.hang_up, self.after, self.licences = {}, {}, {}
        vars(self).update(faults)

    def handle_error(self, *_):
        """A client that was killed is no error of the hub."""

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

    def do_POST(self):
        self.take()

    def do_PUT(self):
        self.take()

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
        if not self.is_stormy(path, body):
            self.answer_calmly(path, body)

    def is_stormy(self, path, body=True):
        codes = next((codes for part, codes in self.server.storm.items() if part in path), None)
        if not codes:
            return False
        self.send(codes.pop(0), b"{}", {"Retry-After": "0"}, body)
        return True

    def hangs_up(self, path, faults):
        """Closes the connection instead of answering, as often as the faults say."""
        part = next((part for part, count in faults.items() if part in path and count), None)
        if part:
            faults[part] -= 1
            self.close_connection = True
        return bool(part)

    # --- uploads ----------------------------------------------------------------------------------

    def take(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        if self.hangs_up(path, self.server.hang_up):
            # A part of the content has arrived.
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return None
        self.content = self.read_content()
        if self.is_stormy(path):
            return None
        given = self.headers.get("Authorization")
        # The store of large files has signed addresses instead of tokens.
        if not path.startswith("/lfs/") and given != f"Bearer {self.server.token}":
            words = "Invalid credentials in Authorization header"
            return self.send(401, b"{}", {"X-Error-Message": words})
        answer = self.taken(path)
        if self.hangs_up(path, self.server.after):
            return None
        return self.send(*answer, headers={"Content-Type": "application/json"})

    def read_content(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def taken(self, path):
        """The status and content of the answer to an upload."""
        if path.startswith("/lfs/"):
            return self.take_large(path.removeprefix("/lfs/"))
        if path.endswith("/commit/main"):
            return self.take_commit(path)
        asked, answer = json.loads(self.content), {}
        if path == "/api/repos/create":
            return self.take_repository(asked)
        if match := re.fullmatch(r"/api/models/(.+)/settings", path):
            self.server.private -= {match[1]} if asked["visibility"] == "public" else set()
        elif path.endswith("/preupload/main"):
            modes = [(f["path"], "lfs" if is_large(f["path"]) else "regular")
                     for f in asked["files"]]  # fmt: skip
            answer["files"] = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes
            ]
        elif path.endswith(".git/info/lfs/objects/batch"):
            answer["objects"] = asked["objects"]
            for file in asked["objects"]:
                if file["oid"] not in self.server.blobs:
                    file["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}"}}
        return 200, json.dumps(answer).encode()

    def take_large(self, sha256):
        if hashlib.sha256(self.content).hexdigest() != sha256:
            return 400, b"{}"
        self.server.blobs[sha256] = self.content
        return 200, b"{}"

    def take_repository(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.server.owner:
            return 403, b'{"error": "You don\'t have the rights to create a model there"}'
        if ("models", name) in self.server.repos:
            return 409, b'{"error": "You already created this model repo"}'
        self.server.repos["models", name] = {".gitattributes": b"*.pt filter=lfs"}
        if asked["visibility"] == "private":
            self.server.private.add(name)
        return 200, json.dumps({"url": f"{self.server.url}/{name}"}).encode()

    def take_commit(self, path):
        """Applies all operations of a commit, or none of them."""
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        files = dict(self.server.repos["models", name])
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, commit_of(files)):
                    return 412, b'{"error": "A commit has happened since"}'
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                del files[value["path"]]
        self.server.repos["models", name] = files
        self.server.commits.append(name)
        about = {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": commit_of(files)}
        return 200, json.dumps(about).encode()

    # --- downloads --------------------------------------------------------------------------------

    def answer_calmly(self, path, body):
        api = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(?:revision|tree)/([^/]+)|/auth-check)?",
            path,
        )
        file = re.fullmatch(r"(?:/cdn)?/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self.refuse(404, "EntryNotFound", body)
        key = (api[1], api[2]) if api else ("datasets" if file[1] else "models", file[2])
        files = self.server.repos.get(key)
        if files is None and self.headers.get("Authorization") == "Bearer wrong":
            words = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.send(401, b"{}", words, body)
        if files is None:
            return self.refuse(404, "RepoNotFound", body)
        return self.answer_known(key, path, (api, file), body)

    def answer_known(self, key, path, match, body):
        (api, file), files = match, self.server.repos[key]
        given = self.headers.get("Authorization")
        if key[1] in self.server.private and given != f"Bearer {self.server.token}":
            return self.refuse(404, "RepoNotFound", body)
        closed = key[1] in self.server.gated and given != f"Bearer {self.server.token}"
        # What a gated repository holds may be seen, but not fetched.
        if closed and (file or path.endswith("/auth-check")):
            return self.refuse(403 if given else 401, "GatedRepo", body)
        revision = (api or file)[3]
        files = self.server.older.get(revision, files)
        commit = commit_of(files)
        if revision not in (None, "main", commit):
            return self.refuse(404, "RevisionNotFound", body)
        if file:
            return self.answer_file(file[4], files, commit, body)
        siblings = [describe(name, content) for name, content in sorted(files.items())]
        if "/tree/" in path:
            tree = [{"type": "file", "path": about["rfilename"], "oid": about["blobId"], **about}
                    for about in siblings]  # fmt: skip
            return self.send(200, json.dumps(tree).encode(), {}, body)
        about = {"id": api[2], "sha": commit, "siblings": siblings, "downloads": 0}
        licence = self.server.licences.get(api[2])
        about["tags"] = [f"license:{licence}"] if licence else []
        about["private"] = key[1] in self.server.private
        kind = {"Content-Type": "application/json"}
        return self.send(200, json.dumps(about).encode(), kind, body)

    def answer_file(self, name, files, commit, body):
        if name not in files or Path(name).name in self.server.lost:
            return self.refuse(404, "EntryNotFound", body)
        content = files[name]
        about = describe(name, content)
        headers = {"ETag": f'"{about.get("lfs", {}).get("sha256", about["blobId"])}"'}
        headers |= {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name in self.server.moved and not self.path.startswith("/cdn"):
            linked = {"X-Linked-Size": str(about["size"]), "X-Linked-Etag": headers["ETag"]}
            return self.send(302, b"", {**headers, **linked, "Location": "/cdn" + self.path}, body)
        if name in self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first else 0
        length = {"Content-Length": str(about["size"] - start)}
        if first:
            length["Content-Range"] = f"bytes {start}-{about['size'] - 1}/{about['size']}"
        self.send(206 if first else 200, b"", {**headers, **length}, False)
        return self.stream(name, content, start) if body else None

    def stream(self, name, content, start):
        limit = self.server.cut.get(name)
        if self.server.together:
            self.server.together.wait()
        for piece in pieces(content, start, self.server.slow.get(name)):
            if name in self.server.slow:
                time.sleep(self.server.pause)
            self.wfile.write(piece[:limit])
            if limit:
                self.close_connection = True
                return


def pieces(content, start, count):
    """The content from `start` on, all at once, in `count` pieces, or in small ones of a file."""
    if isinstance(content, Path):
        with content.open("rb") as stream:
            stream.seek(start)
            while piece := stream.read(PIECE):
                yield piece
        return
    size = -(-len(content) // (count or 1))
    yield from (content[i : i + size] for i in range(start, len(content), size))


def commit_of(files):
    listed = [describe(name, content) for name, content in sorted(files.items())]
    return hashlib.sha1(repr(listed).encode()).hexdigest()


def is_large(name):
    """True if a file goes to large-file storage: all but texts do."""
    return not name.endswith((".json", ".md", ".gitattributes"))


@cache
def hashes_of_file(path):
    """sha256 and git hash; read in pieces, as a large file is served."""
    git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    sha256 = hashlib.sha256()
    for piece in pieces(path, 0, None):
        git.update(piece)
        sha256.update(piece)
    return sha256.hexdigest(), git.hexdigest()


def describe(name, content):
    """A file as the hub lists it; those that are not text are in large-file storage."""
    if isinstance(content, Path):
        size, (sha256, git) = content.stat().st_size, hashes_of_file(content)
    else:
        size, sha256 = len(content), hashlib.sha256(content).hexdigest()
        git = hashlib.sha1(f"blob {size}\0".encode() + content).hexdigest()
    entry = {"rfilename": name, "size": size, "blobId": git}
    if is_large(name):
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 130}
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


class Online(Cosmos):
    """The command, with a hub on the loopback; `variables` are of its environment."""

    hub = None
    token = None
    variables = None

    def environment(self):
        own = {"HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.cwd / "hf")}
        own |= {"HF_TOKEN": self.token} if self.token else {}
        return {**super().environment(), **own, **(self.variables or {})}


class _Socks(socketserver.StreamRequestHandler):
    """A SOCKS5 proxy without passwords (RFC 1928)."""

    def handle(self):
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\x05\x00")
        *_, kind = self.rfile.read(4)
        host = self.rfile.read(4 if kind == 1 else self.rfile.read(1)[0])
        name = socket.inet_ntoa(host) if kind == 1 else host.decode()
        (port,) = struct.unpack(">H", self.rfile.read(2))
        self.server.log.append(name)
        with socket.create_connection(("127.0.0.1", port)) as hub:
            self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
            ends = {self.connection: hub, hub: self.connection}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    if not (piece := end.recv(PIECE)):
                        return
                    ends[end].sendall(piece)


@contextmanager
def socks_proxy():
    """A running SOCKS5 proxy that connects to this machine, whatever host is asked for."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Socks) as proxy:
        proxy.daemon_threads, proxy.log = True, []
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
