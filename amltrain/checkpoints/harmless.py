"""Look into the state files of FSDP and DeepSpeed, which these engines unpickle, before they are loaded.

Nothing is executed here. A file passes only if torch would read exactly what was looked at: an archive of `torch.save`,
pickles that fill their file, or the pieces of a distributed checkpoint that its `.metadata` lists.
"""

import io
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from amltrain.errors import UserError, first_line

NEVER_UNPICKLED = (".json", ".safetensors", ".py")
_ZIP = b"PK\x03\x04"
"""How `torch.load` recognises an archive; anything else it reads as pickles, or as a tar file that holds them."""
_METADATA, _PIECES = ".metadata", ".distcp"
"""Of torch.distributed.checkpoint: the index, and files of many archives, one after another."""


def check_harmless(folder: Path) -> None:
    """Raise UserError if a pickle under `folder` names anything but plain data of torch, numpy and DeepSpeed."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in NEVER_UNPICKLED or path.name == "latest":
            continue
        try:
            names = {name for piece in _pieces(path) for name in _names(piece)}
        except Exception as error:  # a file that is not a pickle raises almost anything
            raise UserError(f"{path} is damaged ({first_line(error)}); resume from another checkpoint") from error
        bad = sorted(name for name in names if not _is_plain(name))
        if bad:
            raise UserError(f"{path} would run {bad[0]} and was not loaded; resume from another checkpoint")


def _pieces(path: Path) -> Iterator[BinaryIO]:
    """What is loaded of a file: all of it, or each piece of a distributed checkpoint."""
    if path.suffix != _PIECES:
        with path.open("rb") as file:
            yield file
        return
    for offset, length in _listed(path):
        with path.open("rb") as file:
            file.seek(offset)
            yield io.BytesIO(file.read(length))


def _listed(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of the pieces of a file, from the index beside it."""
    index = path.with_name(_METADATA)
    with index.open("rb") as file:
        bad = sorted(name for name in _names(file) if not _is_plain(name))
    if bad:
        raise UserError(f"{index} would run {bad[0]}")
    entries = pickle.loads(index.read_bytes()).storage_data.values()
    return [(entry.offset, entry.length) for entry in entries if entry.relative_path == path.name]


def _names(file: BinaryIO) -> set[str]:
    """Everything that reading a file would import."""
    start = file.read(len(_ZIP))
    file.seek(0)
    if start == _ZIP:
        return _names_in_archive(file)
    if tarfile.is_tarfile(file):
        raise pickle.UnpicklingError("it is a tar file")
    size = file.seek(0, 2)
    file.seek(0)
    names: set[str] = set()
    while file.tell() < size:  # old files of torch are several pickles, of which the fourth holds the content
        names |= _names_in_pickle(file)
    return names


def _names_in_archive(file: BinaryIO) -> set[str]:
    """By torch's own reader of archives: another one may find other entries in the same bytes."""
    archive = torch._C.PyTorchFileReader(file)
    if "constants.pkl" in archive.get_all_records():
        raise pickle.UnpicklingError("it is a TorchScript archive, which holds code")
    return _names_in_pickle(io.BytesIO(archive.get_record("data.pkl")))


def _names_in_pickle(file: Any) -> set[str]:
    reader = _Names(file)
    reader.load()
    return reader.names


_PLAIN = re.compile(
    r"collections\.(OrderedDict|defaultdict)|builtins\.(dict|list|set|int|float|complex|bytearray)|_codecs\.encode"
    r"|torch\.(Size|device|Tensor|[a-z]+\d*(_e\d\w*)?|\w+Storage)|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.torch_version\.TorchVersion"
    r"|torch\.serialization\._get_layout|numpy\.(dtype|ndarray)|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|numpy\.dtypes\.(Bool|U?Int\d+|Float\d+)DType|pathlib\.(_local\.)?(PosixPath|PurePosixPath)"
    r"|torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING"
    r"|(Chunk|Tensor|Bytes)StorageMetadata)|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|deepspeed\.runtime\.fp16\.loss_scaler\.(Dynamic)?LossScaler|deepspeed\.runtime\.zero\.config\.ZeroStageEnum"
    r"|deepspeed\.utils\.tensor_fragment\.fragment_address"
)
"""Classes and functions that only hold or build plain data."""


def _is_plain(name: str) -> bool:
    if name.startswith("torch.") and name.count(".") == 1 and name[6:].islower():
        return isinstance(getattr(torch, name[6:], None), torch.dtype) or name == "torch.device"
    return _PLAIN.fullmatch(name) is not None


class _Names(pickle._Unpickler):
    """Collects what a pickle would import, and builds inert objects in its place."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return _Dtype if (module, name) == ("numpy", "dtype") else _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("extension registry")


class _Inert(dict):
    """Accept any operation of a pickle on an object, and do nothing."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        return id(self)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _Dtype(_Inert):
    """A numpy dtype, which must be one of plain numbers: the elements of an object array are pointers."""

    _NUMBERS = re.compile(r"[<>|=]?[?bBhHiIlLqQefdgu]\d{0,2}")

    def __init__(self, kind: Any = None, *arguments: Any, **keywords: Any) -> None:
        super().__init__()
        if not isinstance(kind, str) or not self._NUMBERS.fullmatch(kind):
            raise pickle.UnpicklingError(f"a numpy array of {str(kind)[:50]!r}")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a numpy array of records")
