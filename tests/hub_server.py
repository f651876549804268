"""A HuggingFace Hub on loopback, as far as `huggingface_hub` needs one to make, fill, list and download models and
data sets (whose repositories are kept under the same names).

Speaks the documented HTTP endpoints (repos, branches, preupload, git-lfs batch with basic transfers, ndjson commits,
tree, resolve) and keeps everything in memory. Large files lie on a host of another name (localhost), to which uploads
are sent and downloads redirected. A commit is applied whole or rejected.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_alice": "alice"}
LFS_SUFFIX = (".safetensors", ".parquet")


class Repo:
    """Branches of commits; a commit is (oid, message, {path: bytes}), oldest first."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches: dict[str, list[tuple[str, str, dict[str, bytes]]]] = {"main": [(_oid(b""), "initial", {})]}

    def at(self, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        """By branch or commit."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        commits = self.branches[branch]
        oid = _oid(f"{len(commits)}{branch}{message}".encode())
        commits.append((oid, message, files))
        return oid


class HubServer:
    """`failing` sees "METHOD path" and may spoil the answer: True is 500, a number that status, "silent" no answer at
    all, "cut" half the content and a closed connection, "flip" one changed bit. `stop` rejects connections."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.jobs: list[dict[str, Any]] = []
        self.failing: Callable[[str], bool | int | str] = lambda request: False
        self.ended = threading.Event()
        self.port = 0
        self.start()

    def start(self) -> None:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self.port}/storage"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].at(revision) if repo in self.repos else None
        return found[2] if found else {}


@contextmanager
def running_hub() -> Iterator[HubServer]:
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.stop()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read()
        self.user = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.spoiled = self.hub.failing(request)
        if self.spoiled == "silent":
            self.hub.ended.wait(120)
            self.close_connection = True
            return None
        if self.spoiled and not isinstance(self.spoiled, str):
            status = 500 if self.spoiled is True else int(self.spoiled)
            return self.answer(status, {"error": "spoiled"}, {"Retry-After": "7"} if status == 429 else None)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, **match.groupdict())
        return self.answer(404, {"error": f"no such endpoint: {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - the base class's names

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or self.user}/{wanted['name']}"
        if self.user is None:
            self.answer(401, {"error": "Invalid username or password."})
        elif wanted["organization"] not in (None, self.user):
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif repo in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repos[repo] = Repo(private)
            self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def whoami(self) -> None:
        if self.user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        self.answer(200, {"type": "user", "name": self.user, "orgs": []})

    def start_job(self, owner: str) -> None:
        self.hub.jobs.append(json.loads(self.body))
        facts = {"id": f"job{len(self.hub.jobs)}", "owner": {"id": "1", "name": owner, "type": "user"}}
        self.answer(200, {**facts, "status": {"stage": "SCHEDULING", "message": None}, **self.hub.jobs[-1]})

    def validate_yaml(self) -> None:
        block = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        data = yaml.safe_load(block[1]) if block else {}
        errors = [
            {"message": f'"model-index[{number}]" must have a name and results'}
            for number, model in enumerate(data.get("model-index", []))
            if not (model.get("name") and model.get("results"))
        ]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create_branch(self, repo: str, revision: str) -> None:
        found = self.writable(repo)
        if found and revision in found.branches:
            self.answer(409, {"error": "Reference already exists"})
        elif found:
            found.branches[revision] = list(found.branches["main"])
            self.answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        if not self.writable(repo):
            return
        there = self.hub.files(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large, content = file["path"].endswith(LFS_SUFFIX), there.get(file["path"])
            oid = None if content is None else _sha256(content) if large else _git_oid(content)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        if not self.writable(repo):
            return
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                place = f"{self.hub.storage}/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            return self.answer(400, {"error": "the content is not what its name says"})
        self.hub.objects[oid] = self.body
        self.answer(200, {})

    def verify(self, oid: str) -> None:
        known = len(self.hub.objects.get(oid, b"")) == json.loads(self.body)["size"]
        self.answer(200 if known else 404, {})

    def fetch(self, oid: str) -> None:
        content, headers = self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if not (wanted := self.headers.get("Range")):
            return self.send(200, content, headers)
        first, last = wanted.removeprefix("bytes=").split("-")
        end = min(int(last) + 1, len(content)) if last else len(content)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        self.send(206, content[int(first) : end], headers)

    def paths_info(self, repo: str, revision: str) -> None:
        found = self.readable(repo, revision)
        if not found:
            return
        asked = json.loads(self.body)["paths"]
        folders = {str(parent) for path in found[2] for parent in PurePosixPath(path).parents} - {"."}
        answer = [_entry(path, found[2][path]) for path in asked if path in found[2]]
        answer += [_folder(path) for path in asked if path in folders]
        self.answer(200, answer)

    def commit(self, repo: str, revision: str) -> None:
        found = self.writable(repo)
        if not found:
            return
        files, message = dict(self.hub.files(repo, revision)), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return self.answer(400, {"error": f"cannot {operation['key']} {value['path']}"})
        oid = found.commit(revision, message, files)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.readable(repo, revision)
        if found:
            siblings = [{"rfilename": name} for name in found[2]]
            private = self.hub.repos[repo].private
            facts = {"id": repo, "modelId": repo, "sha": found[0], "private": private, "tags": [], "siblings": siblings}
            self.answer(200, facts)

    def tree(self, repo: str, revision: str, under: str | None = None) -> None:
        found = self.readable(repo, revision)
        if not found:
            return
        under = (under or "").strip("/")
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        inside = {path: c for path, c in found[2].items() if not under or path.startswith(f"{under}/")}
        depth = len(PurePosixPath(under).parts) + 1
        folders = {str(PurePosixPath(*PurePosixPath(p).parts[:depth])) for p in inside} - inside.keys()
        entries = [_entry(p, c) for p, c in inside.items() if recursive or len(PurePosixPath(p).parts) == depth]
        self.answer(200, [*map(_folder, sorted(folders)), *entries])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.readable(repo, revision)
        if not found:
            return
        if path not in found[2]:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content, headers = found[2][path], {"X-Repo-Commit": found[0]}
        if not path.endswith(LFS_SUFFIX):
            return self.send(200, content, {**headers, "ETag": f'"{_git_oid(content)}"'})
        oid = _sha256(content)
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/{oid}"})

    def writable(self, repo: str) -> Repo | None:
        if self.user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self.hub.repos[repo]

    def readable(self, repo: str, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.user is None):
            return self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        commit = found.at(revision)
        if commit is None:
            return self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not content:
            return
        if self.spoiled == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if self.spoiled == "flip":
            content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        self.wfile.write(content)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


KIND = "(?:models|datasets)"
REPO, REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/jobs/(?P<owner>[^/]+)", Handler.start_job),
    ("POST", f"/api/{KIND}/{REPO}/branch/{REVISION}", Handler.create_branch),
    ("POST", f"/api/{KIND}/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/{KIND}/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/(?:datasets/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", Handler.store),
    ("POST", "/storage/(?P<oid>[0-9a-f]{64})/verify", Handler.verify),
    ("GET HEAD", "/storage/(?P<oid>[0-9a-f]{64})", Handler.fetch),
    ("GET", f"/api/{KIND}/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/{KIND}/{REPO}/tree/{REVISION}(?P<under>/.+)?", Handler.tree),
    ("POST", f"/api/{KIND}/{REPO}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"/api/{KIND}/{REPO}", Handler.info),
    ("GET HEAD", f"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": _oid(path.encode()), "size": 0}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(LFS_SUFFIX):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _oid(seed: bytes) -> str:
    return hashlib.sha1(seed).hexdigest()


def _git_oid(content: bytes) -> str:
    return _oid(b"blob %d\0" % len(content) + content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
