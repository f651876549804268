"""Read annotations at a path, whatever their form, as one data set; what `amltrain data prepare PATH` does first."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from amltrain.data.sources.annotations import Annotations
from amltrain.data.sources.detect import FORMS, OWN_FORMS, detect, read_form
from amltrain.data.sources.folder import read_folder
from amltrain.data.sources.objects import Imported, ImportOptions
from amltrain.data.sources.own import build_annotations, check_name
from amltrain.data.sources.table import AS_WRITTEN, ReadOptions, read_table
from amltrain.errors import UserError

Describe = Callable[[Imported], Imported]
"""Gives objects without sentences sentences, see `describe`."""


class Source(NamedTuple):
    """annotations: what was read. images: the folder with its pictures. said: how it was read, for the user."""

    annotations: Annotations
    images: Path
    said: str


def read_source(
    path: Path,
    name: str,
    scratch: Path,
    *,
    form: str | None = None,
    images: Path | None = None,
    masks: Path | None = None,
    columns: Mapping[str, str] | None = None,
    label_field: str | None = None,
    options: ReadOptions = AS_WRITTEN,
    describe: Describe | None = None,
    describe_all: bool = True,
    hold_out: bool = False,
) -> Source:
    """Read annotations at a path.

    scratch: a folder for pictures that lie inside annotation files. form: of FORMS or OWN_FORMS; None = found out.
    images: folder of the pictures; None = where the form has them. masks, columns: of tables. describe: None = objects
    without sentences are left out and counted. describe_all: false = describe only where not a single object has a
    sentence. hold_out: a tool's export whose pictures are all in one split (CVAT writes `Train` by itself) is split as
    if it stated none. Raises UserError.
    """
    check_name(name)
    if form is None:
        found = detect(path)
        form, said = found.form, f"{path} is read as {_title(found.form)}: it has {found.evidence}"
        if form == "table" and path.is_dir():
            path = path / found.evidence
    else:
        said = f"{path} is read as {_title(form)}"
    if form == "table":
        root = images or path.parent
        return Source(read_table(path, root, name, masks=masks, columns=columns, options=options), root, said)
    if form == "folder":
        return Source(read_folder(path, name, options), path, said)
    if form == "hf":
        from amltrain.data.sources.hf_table import read_hf  # imports datasets

        return Source(read_hf(str(path), scratch, name, columns=columns, options=options), scratch, said)
    given = ImportOptions(images, scratch, options.encoding, label_field)
    imported = read_form(path, form, given)
    wanted = describe is not None and (describe_all or not any(row.sentences for row in imported.rows))
    imported = describe(imported) if describe is not None and wanted else _described(imported, path)
    if hold_out and len({row.split for row in imported.rows}) == 1 and imported.rows[0].split is not None:
        note = f"every picture was in split {imported.rows[0].split}; some were held out to score on"
        rows = [row._replace(split=None) for row in imported.rows]
        imported = imported._replace(rows=rows, notes=(*imported.notes, note))
    return Source(_annotations(imported, path, name, options), imported.images, said)


def _title(form: str) -> str:
    titles = {"table": "a table", "folder": "a folder of pictures, masks and texts", "hf": "a data set of `datasets`"}
    if form not in FORMS and form not in OWN_FORMS:
        raise UserError(f"--form {form!r} is not known; known: {', '.join((*FORMS, *OWN_FORMS))}")
    return titles.get(form) or FORMS[form].title


def _described(imported: Imported, path: Path) -> Imported:
    """Without the objects that have no sentence. Raises UserError where none has."""
    kept = [row for row in imported.rows if row.sentences]
    left_out = len(imported.rows) - len(kept)
    if not imported.rows:
        raise UserError(f"{path} has no object with an area")
    if not kept:
        classes = len({row.category for row in imported.rows})
        raise UserError(
            f"{path} has {left_out:,} objects of {classes} classes and no sentence; give --describe, which writes "
            f"sentences from classes, places, sizes and colours"
        )
    notes = (f"{left_out:,} objects have no sentence and were left out",) if left_out else ()
    return imported._replace(rows=kept, notes=(*imported.notes, *notes))


def _annotations(imported: Imported, path: Path, name: str, options: ReadOptions) -> Annotations:
    rule = imported.rule if options.rule.exif == "auto" else options.rule
    return build_annotations(
        imported.rows,
        name,
        sources=imported.sources,
        place=str(path),
        seed=options.seed,
        shares=options.shares,
        notes=imported.notes,
        rule=rule,
        links=options.links,
        pictures=imported.images,
    )
