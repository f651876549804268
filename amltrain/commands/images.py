"""The --image arguments of a command line: files, folders and patterns."""

import glob
import os
from collections.abc import Iterable, Sequence

from PIL import Image

from amltrain.errors import UserError


def find_images(sources: Sequence[str]) -> list[str]:
    """List the image files that arguments name, each once, in the order given; folders and patterns are sorted.

    A folder stands for the files in it that have an image's ending, a pattern (`*`, `?`, `[...]`; `**` for all
    subfolders) for the files that match it and have one. A file given by name may have any ending.
    Raises UserError for a URL, and for a source that names nothing.
    """
    return list(dict.fromkeys(path for source in sources for path in _expand(source)))


def _expand(source: str) -> list[str]:
    if "://" in source:
        raise UserError(f"{source} is a URL, and nothing is downloaded here; save the image and give its file name")
    if os.path.isdir(source):
        found = _images(os.path.join(source, name) for name in os.listdir(source))
        if not found:
            raise UserError(f"there is no image in the folder {source}; for its subfolders give '{source}/**/*'")
        return found
    if os.path.exists(source):
        return [source]
    if glob.has_magic(source):
        found = _images(glob.iglob(source, recursive=True))
        if not found:
            raise UserError(f"no image matches {source!r}")
        return found
    raise UserError(f"there is no image {source}")


def _images(paths: Iterable[str]) -> list[str]:
    endings = Image.registered_extensions()
    return sorted(p for p in paths if os.path.splitext(p)[1].lower() in endings and os.path.isfile(p))
