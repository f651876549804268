"""Read JSON and annotation pickles from untrusted files."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

from amltrain.errors import UserError


class _ContainerUnpickler(pickle.Unpickler):
    """Admits what annotation files are made of, builtin containers and scalars, and refuses everything else."""

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
    """The content of a regular file. Raises UserError; a pipe or a device is refused, not waited for."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"could not read {path} (not a regular file)")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"could not read {path} ({getattr(error, 'strerror', None) or error})") from error
