"""Run by test_prepared: a Hub on loopback that has one data set, read by the real clients in a process of its own.

python hub_files.py FOLDER serves FOLDER as the Hub data set alice/shapes and prints the rows that are read from there.
"""

import hashlib
import json
import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO, COMMIT = "alice/shapes", "a" * 40


class Handler(BaseHTTPRequestHandler):
    """repository information, the tree, and files with ranges: what reading needs."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            names = [{"rfilename": entry["path"]} for entry in self.entries("")]
            self.answer({"id": REPO, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": names})
        elif path.startswith(f"{api}/tree/"):
            self.answer(self.entries(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        elif path.replace("/main/", f"/{COMMIT}/", 1).startswith(files):
            self.file(self.folder / path.replace("/main/", f"/{COMMIT}/", 1).removeprefix(files))
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        """paths-info: which of the paths asked for there are."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer([entry for entry in self.entries("") if entry["path"] in asked])

    def entries(self, under: str) -> list[dict[str, Any]]:
        """All files and folders below, as the Hub's tree lists them."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if name.startswith(under):
                kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
                found.append({"path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), **kind})
        return found

    def file(self, path: Path) -> None:
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return self.answer({"error": "entry not found"}, 404, headers)
        content, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last) + 1, len(content)) if last else len(content)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        self.send(status, content, headers)

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None: ...


def main(folder: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"folder": Path(folder)}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {  # before the clients are imported
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": tempfile.mkdtemp(dir=os.environ["CACHE"]),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    from amltrain.data.rows import open_prepared, open_rows

    for streaming in (False, True):
        rows = open_rows(REPO, "refshapes", "val", streaming=streaming)
        sums = [hashlib.sha1(rows.image_bytes(row)).hexdigest() for row in range(len(rows))]
        print(json.dumps([rows.columns.column("image_id").to_pylist(), sums]))
    streamed = open_prepared(REPO, "refshapes", "val", streaming=True)
    rows = [(row["image_id"], hashlib.sha1(row["image"]["bytes"]).hexdigest()) for row in streamed]
    print(json.dumps([list(column) for column in zip(*rows, strict=True)]))


if __name__ == "__main__":
    main(sys.argv[1])
