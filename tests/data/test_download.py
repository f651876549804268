"""Downloads from a server on loopback that cuts connections, sends wrong bytes, or is not there."""

import hashlib
import io
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from amltrain.commands.download import main
from amltrain.data import download as module
from amltrain.data.download import SOURCES, Source, download
from amltrain.errors import UserError


def archive(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return content.getvalue()


WHOLE = archive(refcoco__refs=b"r" * 300_000, refcoco__instances=b"i" * 10)


class Server:
    """files: by path. cut: how many answers of a path end after a part. page: paths answered by a web page."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/good.zip": WHOLE, "/wrong.zip": WHOLE[:-500] + b"x" * 500}
        self.cut: dict[str, int] = {}
        self.ranges: list[str | None] = []
        self.ignore_ranges = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.ranges.append(wanted)
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not server.ignore_ranges else 0
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    return self.end_headers()
                body = content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Type", "text/html" if "page" in self.path else "application/zip")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if server.cut.get(self.path, 0) > 0:
                    server.cut[self.path] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def source(self, *paths: str, **known: Any) -> dict[str, tuple[Source, ...]]:
        urls = tuple(f"http://127.0.0.1:{self.http.server_address[1]}{path}" for path in paths)
        return {"refcoco": (Source(urls, "refcoco.zip", "", ("refcoco/refs", "refcoco/instances"), 1000, **known),)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "CHUNK", 4096)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def fetch(root: Path, sources: dict[str, tuple[Source, ...]]) -> list[str]:
    said: list[str] = []
    download(["refcoco"], root, log=said.append, sources=sources, progress=False)
    return said


def is_whole(root: Path) -> bool:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return names == ["refcoco/instances", "refcoco/refs"] and (root / "refcoco/refs").read_bytes() == b"r" * 300_000


def test_cut_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.cut["/good.zip"] = 3
    assert "from http" in fetch(tmp_path, server.source("/good.zip"))[0]
    assert is_whole(tmp_path) and server.ranges[0] is None and all(server.ranges[1:]) and len(server.ranges) == 4
    assert "already" in fetch(tmp_path, server.source("/good.zip"))[0] and len(server.ranges) == 4


def test_a_later_run_goes_on_where_the_first_stopped(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".refcoco.zip.part").write_bytes(WHOLE[:1000])
    fetch(tmp_path, server.source("/good.zip"))
    assert server.ranges == ["bytes=1000-"] and is_whole(tmp_path)


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.ignore_ranges = True
    (tmp_path / ".refcoco.zip.part").write_bytes(b"y" * 1000)
    fetch(tmp_path, server.source("/good.zip"))
    assert is_whole(tmp_path)


def test_a_whole_part_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".refcoco.zip.part").write_bytes(WHOLE)
    fetch(tmp_path, server.source("/good.zip"))
    assert is_whole(tmp_path)


def test_wrong_bytes_lead_to_the_next_mirror(server: Server, tmp_path: Path) -> None:
    server.files["/page.zip"] = b"<html>moved</html>"
    said = fetch(tmp_path, server.source("/missing.zip", "/page.zip", "/wrong.zip", "/good.zip"))
    assert said[0].endswith("/good.zip") and is_whole(tmp_path)


@pytest.mark.parametrize(
    ("path", "known", "message"),
    [
        ("/missing.zip", {}, "the server answered 404"),
        ("/page.zip", {}, "the server sent a web page"),
        ("/wrong.zip", {}, "it is no zip archive"),
        ("/flipped.zip", {}, "refcoco/refs in it is damaged"),
        ("/good.zip", {"bytes": 7}, "bytes, not 7"),
        ("/good.zip", {"sha256": hashlib.sha256(b"").hexdigest()}, "its SHA-256 is not the known one"),
    ],
)
def test_the_wrong_file_is_named(path: str, known: dict, message: str, server: Server, tmp_path: Path) -> None:
    server.files["/page.zip"] = b"<html>moved</html>"
    server.files["/flipped.zip"] = WHOLE[:2000] + bytes([WHOLE[2000] ^ 1]) + WHOLE[2001:]
    with pytest.raises(UserError, match=message) as error:
        fetch(tmp_path, server.source(path, **known))
    assert path in str(error.value) and "put the file into" in str(error.value)
    assert not (tmp_path / "refcoco").exists()


def test_a_member_that_leads_outside(server: Server, tmp_path: Path) -> None:
    server.files["/evil.zip"] = archive(**{"..__evil": b"x"})
    with pytest.raises(UserError, match="leads outside; it was not unpacked"):
        fetch(tmp_path / "root", server.source("/evil.zip"))
    assert not (tmp_path / "evil").exists()


def test_offline_unknown_and_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = {"refcoco": (Source(("http://127.0.0.1:1/x.zip",), "refcoco.zip", "", ("x",), 1000),)}
    with pytest.raises(UserError, match="no connection; is this machine offline"):
        fetch(tmp_path, dead)
    with pytest.raises(UserError, match="unknown download 'refcocoo'; did you mean refcoco"):
        download(["refcocoo"], tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 999))
    with pytest.raises(UserError, match=r"0\.0 GB free and 0\.0 GB are needed; choose another --root"):
        fetch(tmp_path / "full", server.source("/good.zip"))
    assert server.ranges == []


def test_the_command_knows_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "known: " in capsys.readouterr().err and set(SOURCES) == {
        "refcoco",
        "refcoco+",
        "refcocog",
        "grefcoco",
        "coco",
    }
