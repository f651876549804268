"""Download the original files of data sets: mirrors in order, resumable, verified by size and checksum.

Where the files are: docs/data.md. Sizes and hashes are listed only where they are known; otherwise the length that the
server states, and the archive's own checksums, are what is checked.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from amltrain.errors import UserError, cure, first_line, unknown_name

_ARCHIVE = "https://web.archive.org/web/20220413/https://bvisionweb1.cs.unc.edu/licheng/referit/data"
_HUB = "https://huggingface.co/datasets"
CHUNK = 2**20
TIMEOUT = (15, 60)
"""Seconds to connect, and between two pieces."""
TRIES = 5


class Source(NamedTuple):
    """A file of a data set. mirrors: URLs in the order in which they are tried. folder: where it goes, below the root.

    bytes, sha256: of the file, None where they are not known. unpack: a zip archive whose members go to `folder`.
    proof: paths below the root that show that it was unpacked. size: bytes of everything when unpacked, about.
    """

    mirrors: tuple[str, ...]
    name: str
    folder: str
    proof: tuple[str, ...]
    size: int
    bytes: int | None = None
    sha256: str | None = None
    unpack: bool = True


def _refer(name: str, split_by: str, size: int) -> Source:
    quoted = name.replace("+", "%2B")
    mirrors = (f"{_ARCHIVE}/{name}.zip", f"{_ARCHIVE}/{quoted}.zip")
    proof = (f"{name}/refs({split_by}).p", f"{name}/instances.json")
    return Source(tuple(dict.fromkeys(mirrors)), f"{name}.zip", "", proof, size)


def _grefcoco(file: str, size: int) -> Source:
    mirrors = (f"{_HUB}/FudanCVL/gRefCOCO/resolve/main/{file}",)
    return Source(mirrors, file, "grefcoco", (f"grefcoco/{file}",), size, unpack=False)


SOURCES: dict[str, tuple[Source, ...]] = {
    "refcoco": (_refer("refcoco", "unc", 300_000_000),),
    "refcoco+": (_refer("refcoco+", "unc", 300_000_000),),
    "refcocog": (_refer("refcocog", "umd", 350_000_000),),
    "grefcoco": (_grefcoco("grefs(unc).json", 300_000_000), _grefcoco("instances.json", 300_000_000)),
    "coco": (
        Source(
            ("http://images.cocodataset.org/zips/train2014.zip", "https://s3.amazonaws.com/images.cocodataset.org/zips/train2014.zip"),
            "train2014.zip",
            "",
            ("train2014/COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000581921.jpg"),
            27_500_000_000,
        ),
    ),
}  # fmt: skip
"""By the name that `amltrain data download` takes."""


def download(
    names: Sequence[str],
    root: Path,
    *,
    log: Callable[[str], None] = print,
    sources: dict[str, tuple[Source, ...]] | None = None,
    keep_archives: bool = False,
    progress: bool = True,
) -> None:
    """Download the named data sets below `root`; skip files that exist already.

    A file is downloaded as `.NAME.part`, verified, and renamed. Rerun after an interruption to resume.
    Raises UserError when no mirror has the file, the file is wrong, or the disk is full.
    """
    known = SOURCES if sources is None else sources
    for name in names:
        if name not in known:
            raise unknown_name("download", name, known)
    todo = [s for name in names for s in known[name] if not all((root / path).exists() for path in s.proof)]
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_free_space(root, todo)
        for source in todo:
            log(f"{source.name}: {_fetch(source, root, keep_archives, progress)}")
    except OSError as error:
        raise UserError(f"could not write below {root} ({error.strerror or error}); {cure(error)}") from error
    if not todo:
        log(f"everything is in {root} already")


def _check_free_space(root: Path, todo: Sequence[Source]) -> None:
    wanted, free = sum(source.size for source in todo), shutil.disk_usage(root).free
    if wanted > free:
        raise UserError(
            f"{root} has {free / 1e9:.1f} GB free and {wanted / 1e9:.1f} GB are needed; choose another --root"
        )


def _fetch(source: Source, root: Path, keep_archive: bool, progress: bool) -> str:
    folder = root / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{source.name}.part"
    faults = []
    for url in source.mirrors:
        try:
            _transfer(url, part, source, progress)
            _check(part, source)
        except _WrongFile as fault:
            part.unlink(missing_ok=True)  # nothing that could be resumed
            faults.append(f"{url}: {fault}")
            continue
        except requests.RequestException as error:
            faults.append(f"{url}: {_reason(error)}")
            continue
        if source.unpack:
            _unpack(part, folder, source)
            part.rename(folder / source.name) if keep_archive else part.unlink()
        else:
            part.rename(folder / source.name)
        return f"from {url}"
    raise UserError(
        f"could not download {source.name} ({'; '.join(faults)}); check the connection and rerun to resume, or put the "
        f"file into {folder} by hand (docs/data.md lists the sources)"
    )


class _WrongFile(Exception):  # noqa: N818 - a reason, shown with its address
    """What arrived is not the file."""


def _session() -> requests.Session:
    session = requests.Session()
    retries = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    return session


def _transfer(url: str, part: Path, source: Source, progress: bool) -> None:
    """Download the file to `part`; resume what exists, and reconnect several times."""
    last: requests.RequestException | None = None
    for _ in range(TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _transfer_once(url, part, source, progress):
                return
        except requests.HTTPError:
            raise
        except requests.RequestException as error:
            last = error
            if isinstance(error, requests.ConnectionError) and (part.stat().st_size if part.exists() else 0) == before:
                raise
    raise last or requests.ConnectionError("the connection was cut again and again")


def _transfer_once(url: str, part: Path, source: Source, progress: bool) -> bool:
    """Send one request; return whether the file is complete."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with _session().get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # nothing follows: whole, or not the same file
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if total.isdigit() and int(total) == start:
                return True
            raise _WrongFile(f"what is there has {start:,} bytes, the server's file {total or 'another size'}")
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise _WrongFile("the server sent a web page")
        if answer.status_code != 206:
            start = 0  # the server sends everything again
        length = answer.headers.get("Content-Length")
        total_bytes = start + int(length) if length else source.bytes
        bar = tqdm(
            total=total_bytes,
            initial=start,
            desc=source.name,
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        )
        with bar, part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            for piece in answer.iter_content(CHUNK):
                file.write(piece)
                bar.update(len(piece))
    return total_bytes is None or part.stat().st_size >= total_bytes


def _check(part: Path, source: Source) -> None:
    """Raise _WrongFile unless the file matches its known facts."""
    size = part.stat().st_size
    if source.bytes is not None and size != source.bytes:
        raise _WrongFile(f"it has {size:,} bytes, not {source.bytes:,}")
    if source.sha256 is not None:
        with part.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != source.sha256:
                raise _WrongFile("its SHA-256 is not the known one")
    if source.unpack:
        try:
            with zipfile.ZipFile(part) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise _WrongFile(f"it is no zip archive ({first_line(error)})") from error
        if bad is not None:
            raise _WrongFile(f"{bad} in it is damaged")


def _unpack(part: Path, folder: Path, source: Source) -> None:
    """Unpack below `folder`. Raises UserError for a member that leads outside, and if the proof is not in it."""
    with zipfile.ZipFile(part) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{source.name} holds {name!r}, which leads outside; it was not unpacked")
        archive.extractall(folder)
    root = folder if not source.folder else folder.parent
    missing = [path for path in source.proof if not (root / path).exists()]
    if missing:
        raise UserError(f"{source.name} was unpacked to {folder}, but holds no {missing[0]}; move its files there")


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection; is this machine offline?"
    return first_line(error)
