"""A server on 127.0.0.1 that speaks as much of the Hub's API as pushing and loading need, with accidents."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "secretsecretsecret" * 2
HANG_SECONDS = 1.0


class Repo:
    """A repository: its commits, oldest first, and its tags."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.tags: dict[str, str] = {}
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, files: dict[str, bytes], message: str) -> str:
        files = (self.commits[-1][1] if self.commits else {}) | files
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.tags.get(revision, revision)
        by_id = {oid: (oid, files) for oid, files in self.commits}
        return self.commits[-1] if revision == "main" else by_id.get(revision)


class FakeHub(ThreadingHTTPServer):
    """`accidents` are (method, part of the path, kind): each happens once, to the first request it fits.

    Kinds: a status (429 asks to wait 1 second), "hang" (no answer for HANG_SECONDS), "cut" (the connection is
    closed without an answer), "late" (the request is carried out, and then the connection is cut).
    """

    daemon_threads = True

    def __init__(self, user: str = "alice") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.accidents: list[tuple[str, str, int | str]] = []
        self.happened: list[tuple[str, str, int | str]] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def accident(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for accident in self.accidents:
                if accident[0] == method and accident[1] in path:
                    self.accidents.remove(accident)
                    self.happened.append(accident)
                    return accident[2]
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that were cut


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def answer_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.read_body()
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        kind = self.server.accident(self.command, path)
        if kind == "cut":
            return self.cut()
        if kind == "hang":
            threading.Event().wait(HANG_SECONDS)
            return self.cut()
        if isinstance(kind, int):
            return self.reply(kind, {"error": "an accident"}, {"Retry-After": "1"} if kind == 429 else {})
        with self.server.lock:
            status, content, headers = self.route(path, body)
        if kind == "late":
            return self.cut()
        self.reply(status, content, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer_any

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- what the Hub does -----------------------------------------------------------------------

    def route(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers of the answer."""
        if path.startswith("/objects/"):
            # where the Hub sends uploads; the address is signed, not the request
            self.server.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/whoami-v2":
            return (200, {"name": self.server.user, "type": "user"}, {}) if signed_in else self.refuse(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body)) if signed_in else self.refuse(401)
        for pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and found[1] not in self.server.repos:
                return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
            if found:
                if self.command not in ("GET", "HEAD") and not (
                    signed_in and found[1].startswith(f"{self.server.user}/")
                ):
                    return self.refuse(403)
                return getattr(self, name)(found[1], self.server.repos[found[1]], found[2], body)
        self.server.unknown.append(f"{self.command} {path}")
        return self.refuse(404)

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
        return status, {"error": f"refused with {status}"}, headers or {}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        owner = asked.get("organization") or self.server.user
        name = f"{owner}/{asked['name']}"
        if owner != self.server.user:
            return self.refuse(403)
        if name in self.server.repos:
            return (
                409,
                {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"},
                {},
            )
        self.server.repos[name] = Repo(asked.get("visibility") == "private")
        return 200, {"url": f"{self.server.url}/{name}", "name": name}, {}

    def info(self, name: str, repo: Repo, revision: str | None, body: bytes) -> tuple[int, Any, dict]:
        found = repo.at(revision or "main")
        if found is None:
            return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in found[1]]
        return 200, {"id": name, "sha": found[0], "private": repo.private, "siblings": siblings}, {}

    def tree(self, name: str, repo: Repo, revision: str, body: bytes) -> tuple[int, Any, dict]:
        files = repo.at(revision)[1].items()
        return 200, [{"type": "file", "path": p, "size": len(b), "oid": git_oid(b)} for p, b in files], {}

    def preupload(self, name: str, repo: Repo, revision: str, body: bytes) -> tuple[int, Any, dict]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        files = [
            {
                "path": file["path"],
                "uploadMode": mode(file["path"]),
                "shouldIgnore": False,
                "oid": oid_of(repo.files.get(file["path"]), mode(file["path"])),
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def batch(self, name: str, repo: Repo, _: str | None, body: bytes) -> tuple[int, Any, dict]:
        objects = []
        for file in json.loads(body)["objects"]:
            if file["oid"] not in self.server.objects:
                href = f"{self.server.url}/objects/{file['oid']}?signature=secret-signature"
                file["actions"] = {"upload": {"href": href}}
            objects.append(file)
        return (
            200,
            {"transfer": "basic", "objects": objects},
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def commit(self, name: str, repo: Repo, revision: str, body: bytes) -> tuple[int, Any, dict]:
        header, files = {}, {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return 400, {"error": f"{value['path']} was not uploaded"}, {}
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = repo.commit(files, header["summary"])
        return 200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid}, {}

    def refs(self, name: str, repo: Repo, _: str | None, body: bytes) -> tuple[int, Any, dict]:
        tags = [
            {"name": t, "ref": f"refs/tags/{t}", "targetCommit": commit} for t, commit in repo.tags.items()
        ]
        return 200, {"branches": [], "converts": [], "tags": tags}, {}

    def tag(self, name: str, repo: Repo, revision: str, body: bytes) -> tuple[int, Any, dict]:
        if self.command == "DELETE":
            return 200, {"deleted": repo.tags.pop(revision)}, {}
        asked = json.loads(body)["tag"]
        if asked in repo.tags:
            return 409, {"error": f"Reference refs/tags/{asked} already exists"}, {}
        repo.tags[asked] = repo.at(revision)[0]
        return 200, {}, {}

    def resolve(self, name: str, repo: Repo, rest: str, body: bytes) -> tuple[int, Any, dict]:
        revision, _, path = rest.partition("/")
        found = repo.at(revision)
        if found is None or path not in found[1]:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound" if found else "RevisionNotFound"})
        return 200, found[1][path], {"X-Repo-Commit": found[0], "ETag": f'"{git_oid(found[1][path])}"'}


def serve(monkeypatch: Any, tmp_path: Any) -> Iterator[FakeHub]:
    """A Hub of our own, where alice is logged in and to which the Hub's client talks; nobody really waits."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    from topogpt.sharing import push

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: server.waits.append(seconds))
        monkeypatch.setattr(push, "TIMEOUTS", (1.0, 0.3, 1.0, 1.0))
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        server.waits = []
        yield server
        server.shutdown()
        huggingface_hub.close_session()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"/api/models/{NAME}()", "info"),
    (rf"/api/models/{NAME}/revision/(.+)", "info"),
    (rf"/api/models/{NAME}/tree/([^/]+)/?", "tree"),
    (rf"/api/models/{NAME}/preupload/(.+)", "preupload"),
    (rf"/api/models/{NAME}/commit/(.+)", "commit"),
    (rf"/api/models/{NAME}/refs()", "refs"),
    (rf"/api/models/{NAME}/tag/(.+)", "tag"),
    (rf"/{NAME}\.git/info/lfs/objects/batch()", "batch"),
    (rf"/{NAME}/resolve/(.+)", "resolve"),
]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(data: bytes | None, mode: str) -> str | None:
    if data is None:
        return None
    return hashlib.sha256(data).hexdigest() if mode == "lfs" else git_oid(data)
