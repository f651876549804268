"""Write files and folders atomically, and hash them.

Read JSON and annotation pickles from untrusted files.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from amltrain.errors import FAILING, FORBIDDEN, NO_ROOM, UserError, cure, first_line

if sys.platform != "win32":
    import fcntl
if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; when the block ends, rename the file to `path` atomically.

    An older file of that name is replaced atomically; an older folder is removed first, because a rename cannot
    replace it. If the block raises, the temporary file or folder is removed and `path` stays as it is. Parent folders
    are not created. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir() and not temporary.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path | str, otherwise: str = "choose another --output") -> Iterator[None]:
    """Turn an error of the system inside the block into a UserError: one sentence that names the file and what helps.

    Also what libraries in other languages make of it. otherwise: see `cure`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's writer of archives
        cause = _system_error(error)
        if cause is None:
            raise
        why = os.strerror(cause.errno) if cause.errno else first_line(cause)
        raise UserError(f"cannot write {path}: {why}; {cure(cause, otherwise)}") from error


def _system_error(error: BaseException) -> OSError | None:
    """The error of the system that an error is, that led to it, or that its text names."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    named = re.search(r"(?:os error|errno) (\d+)", str(error))
    if named:
        return OSError(int(named[1]), os.strerror(int(named[1])))
    return error if isinstance(error, OSError) else None


@contextmanager
def new_file(path: Path | str, otherwise: str = "choose another --output") -> Iterator[Path]:
    """`replacing`, in a folder that is made, with `writing`: the file is whole or as before, and errors are sentences.

    Give it to every writer of a result. Raises UserError.
    """
    path = Path(path)
    with writing(path, otherwise):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary


def link_or_copy(source: str, target: str) -> None:
    """A second name of a file, which costs no space; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def flush(path: Path) -> None:
    """Write a file's content, or a folder's entries, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Write all files below a folder, and its folders, through to the disk; before it gets its name. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def sha256(path: Path) -> str:
    """Hash a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_once(path: Path) -> str:
    """SHA-256 of a file; a large one that has not changed is read once per process. Raises OSError."""
    status = path.stat()
    return _hashed(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _hashed(path: Path, *_: int) -> str:
    return sha256(path)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder where that is possible; what remains is in no one's way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


class _ContainerUnpickler(pickle.Unpickler):
    """Admits what annotation files are made of, builtin containers and scalars, and rejects everything else."""

    _ADMITTED = frozenset({"set", "frozenset", "list", "dict", "tuple", "int", "float", "str", "bool"})

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in self._ADMITTED:
            return super().find_class("builtins", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_pickle(path: Path) -> Any:
    """Read a pickle of builtin containers (also Python 2's). Executes nothing; raises UserError for anything else."""
    content = read_bytes(path)
    try:
        return _ContainerUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no plain annotation pickle ({reason}); download it again from a source you trust"
        ) from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from error


def load_json(path: Path, *, encodings: tuple[str, ...] = ("utf-8",)) -> Any:
    """Read a JSON file in the first of the encodings that fits. Raises UserError."""
    content = read_bytes(path)
    for encoding in encodings:
        try:
            return json.loads(content.decode(encoding))
        except UnicodeDecodeError as error:
            fault: Exception = error
        except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
            fault = error
            break
    raise UserError(f"{path} is damaged or no JSON ({fault}); download it again") from fault


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises UserError; a pipe or a device is rejected, not waited for."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"could not read {path} (not a regular file)")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"could not read {path} ({getattr(error, 'strerror', None) or error})") from error


SEAL = b"amltrain"
"""Key of a Parquet table's metadata: what it was made from, and the checksum of its contents."""


def seal(table: "pa.Table", facts: Mapping[str, Any]) -> "pa.Table":
    """Return the table with what it was made from (JSON values) and a checksum over both in its metadata."""
    content = json.dumps({"facts": facts, "sha256": _table_hash(table, facts)}, sort_keys=True)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), SEAL: content.encode()})


def is_sealed(table: "pa.Table") -> bool:
    """Whether `seal` has been over a table; versions before 0.2 wrote tables without it."""
    return SEAL in (table.schema.metadata or {})


def unseal(table: "pa.Table", path: Path | str) -> dict[str, Any]:
    """What a sealed table was made from. Raises UserError for a table that has changed, or that was never sealed."""
    try:
        content = json.loads((table.schema.metadata or {})[SEAL])
        facts, wanted = content["facts"], content["sha256"]
        same = isinstance(facts, dict) and _table_hash(table, facts) == wanted
    except KeyError:
        raise UserError(f"{path} carries no checksum; it was not written by this version: write it again") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged (its checksum cannot be read); write it again") from error
    if not same:
        raise UserError(f"{path} is damaged (its values have changed since they were written); write it again")
    return facts


def _table_hash(table: "pa.Table", facts: Mapping[str, Any]) -> str:
    """Hash values, names and types of every column, however the file cuts them into pages."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in table.column_names:
        digest.update(f"\0{name}\0".encode())
        _hash_column(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def _hash_column(digest: Any, column: Any) -> None:
    import numpy as np
    import pyarrow as pa

    kind = column.type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    named = "list" if listed else kind  # Parquet gives the field of a list another name
    digest.update(f"{named} {len(column)} {column.null_count}\0".encode())
    if column.null_count:
        digest.update(np.packbits(np.asarray(column.is_null())).tobytes())
    if listed:
        digest.update(np.asarray(column.value_lengths().fill_null(0), np.int64).tobytes())
        _hash_column(digest, column.flatten())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = column if pa.types.is_floating(kind) else column.fill_null(0)
        digest.update(np.ascontiguousarray(values).tobytes())
    else:
        digest.update(json.dumps(column.to_pylist()).encode())


def way_out(error: Exception | None, folder: Path) -> str:
    """Describe what to do about a file below `folder` that could not be written."""
    number = getattr(error, "errno", None)
    if not folder.is_dir():
        return f"{folder} is gone; run again, which starts from its beginning unless a copy is put back"
    if number in FORBIDDEN:
        return f"{free_space(folder)}; saved checkpoints are intact, make {folder} writable and run again"
    if number == errno.EDQUOT:
        return "your quota there is used up; saved checkpoints are intact, free up space and run again"
    if number in FAILING:
        return "the disk or the network file system fails; saved checkpoints are intact, check it and run again"
    if number not in NO_ROOM and number is not None:
        return "saved checkpoints are intact, run again to resume"
    return f"{free_space(folder)}; saved checkpoints are intact, free up space and run again"


def os_fault(error: OSError, folder: Path) -> str:
    """One sentence for any error of the system while files below `folder` are written or read."""
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"cannot write {files[-1] if files else folder}: {error.strerror or error} ({way_out(error, folder)})"


def lock_file(descriptor: int) -> None:
    """Wait for an open file's lock and take it, until the file is closed. Raises OSError."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def locked(path: Path, otherwise: str = "choose another folder") -> Iterator[None]:
    """Let one process at a time work on a file or folder; others wait here.

    The lock is `.NAME.lock` beside `path`. It stays: removing it would give two locks to those who wait and those who
    come later. otherwise: advice where it cannot be taken, see `cure`. Raises UserError then.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"could not write {lock}: {error.strerror or error}; {cure(error, otherwise)}") from error
    try:
        try:
            lock_file(descriptor)
        except OSError as error:
            raise UserError(f"cannot lock {lock}: {error.strerror or error}; {cure(error, otherwise)}") from error
        yield
    finally:
        with suppress(OSError):  # nothing was written to it
            os.close(descriptor)


def free_space(folder: Path) -> str:
    """Describe the free space on a folder's disk."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
    except OSError:
        return f"{folder} is gone"
