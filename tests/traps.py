"""Pickles that would run code, and the containers that can hide them."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import torch


class Touch:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def saved(content: Any, **options: Any) -> bytes:
    """The bytes of `torch.save`."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def old_format(trap: Any) -> bytes:
    """As torch saved before it wrote zip archives."""
    return saved(trap, _use_new_zipfile_serialization=False)


def tar_that_starts_as_a_pickle(trap: Any) -> bytes:
    """torch's oldest format, whose first bytes are also a pickle."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("N.", b""), ("pickle", pickle.dumps(trap)), ("storages", pickle.dumps(trap))):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()
