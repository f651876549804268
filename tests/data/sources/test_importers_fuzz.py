"""Damaged exports: whatever is changed in a tool's files, they are read or rejected by name, never a trace."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from amltrain.data.sources.annotations import image_jobs, read_job
from amltrain.data.sources.importing import read_source
from amltrain.errors import UserError
from tests.data.sources.test_importers import FORMS, export

STRANGE: list[Any] = [
    None, "", "x", -1, 0, 1e308, float("nan"), 10**30, True, [], {}, [[]], [1], {"a": 1}, "../../etc/passwd", "\0",
    [None], ["a", 1], [[1, 2], [3]], "1,2;3", "\ud83d", {"size": [1, 2], "counts": "@"},
]  # fmt: skip
"""Values that a broken writer may leave anywhere."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    below = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(place for key, entry in below[:40] for place in places(entry, (*path, key)))]


def changed(value: Any, generator: random.Random) -> Any:
    """The value with one place removed or replaced."""
    where = generator.choice([place for place in places(value) if place])
    inside = value
    for key in where[:-1]:
        inside = inside[key]
    if isinstance(inside, dict) and generator.random() < 0.3:
        del inside[where[-1]]
    else:
        inside[where[-1]] = generator.choice(STRANGE)
    return value


def damage(file: Path, generator: random.Random) -> None:
    """Change one place of a JSON file, or some bytes of any other one."""
    if file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), generator)))
        return
    content = bytearray(file.read_bytes())
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(content) + 1)
        put = generator.choice([b"", b"x", b"-", b"9e99", b"<", b"\xff", b"\n"])
        content[place : place + generator.choice([0, 1, 5])] = put
    file.write_bytes(bytes(content))


def tries(form: str, root: Path, generator: random.Random) -> None:
    """Damage one file of an export and read it, with its pictures and masks."""
    kinds = (".json", ".xml", ".yaml", ".txt", ".png")
    files = [path for path in sorted(root.rglob("*")) if path.suffix in kinds]
    damage(generator.choice(files), generator)
    source = read_source(root, "mine", root / "scratch", form=form)
    for split in source.annotations.spec.splits:
        for job in image_jobs(source.annotations, split):
            read_job(job, source.images.resolve(), source.annotations.categories)


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_export_is_read_or_rejected_by_name(form: str, tmp_path: Path) -> None:
    generator = random.Random(form)
    rejected = []
    for number in range(60):
        root = export(form, tmp_path / str(number))
        try:
            tries(form, root, generator)
        except UserError as error:
            rejected.append(str(error))
    assert rejected and all(rejected)
