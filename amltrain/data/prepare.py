"""Annotations + images -> Parquet shards that `datasets` reads, once, checked, whole or not at all.

<output>/<dataset>/train-00000-of-00003.parquet ...
                   val-00000-of-00001.parquet ...
                   manifest.json   counts, comparison with the published ones, hashes of the sources, what was skipped
"""

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from amltrain.data.refer import ImageGroup, ReferFiles, Skipped, image_groups, load_json, read_refer
from amltrain.data.schema import FEATURES
from amltrain.data.specs import Counts, belongs
from amltrain.errors import UserError

FORMAT = 1
ROWS_PER_GROUP = 64
SHARD_BYTES = 512 * 2**20
IMAGE_FOLDERS = (
    "",
    "images/mscoco/images/train2014",
    "train2014",
    "images/train2014",
    "mscoco/train2014",
    "coco/train2014",
    "images",
)
"""Where the releases, and who follows them, keep COCO's train2014."""


class _Checked(NamedTuple):
    group: ImageGroup
    image: bytes | None
    fault: str


class _SkipLog:
    """What could not be used. Raises UserError as soon as that is more than a share of all expressions."""

    def __init__(self, files: ReferFiles, max_skipped: float) -> None:
        self.entries: list[Skipped] = []
        self._lost: list[Skipped] = []
        self._name, self._max_skipped = files.name, max_skipped
        self._total = sum(len(ref["sentences"]) for ref in files.refs)

    def add(self, entries: Iterable[Skipped]) -> None:
        """Note them. Raises UserError."""
        new = list(entries)
        self.entries += new
        self._lost += [entry for entry in new if entry.expressions]
        count = sum(entry.expressions for entry in self._lost)
        if count > self._max_skipped * self._total:
            first = "; ".join(f"{entry.what}: {entry.why}" for entry in self._lost[:3])
            raise UserError(
                f"{self._name}: {count} of {self._total} expressions cannot be used so far, more than max_skipped = "
                f"{self._max_skipped:g} allows ({first}{'; ...' if len(self._lost) > 3 else ''}); mend the files or "
                f"raise max_skipped; nothing was written"
            )


def prepare(
    dataset: str,
    refer_root: Path | str,
    output: Path | str,
    *,
    image_root: Path | str | None = None,
    max_skipped: float = 0.001,
    drawn: Mapping[str, int] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare one data set from the original files under `refer_root`; see `prepare_files`."""
    files = read_refer(Path(refer_root), dataset)
    return prepare_files(
        files, output, image_root or refer_root, max_skipped=max_skipped, drawn=drawn, progress=progress
    )


def prepare_files(
    files: ReferFiles,
    output: Path | str,
    image_root: Path | str,
    *,
    max_skipped: float = 0.001,
    drawn: Mapping[str, int] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare one data set under `output` and return its manifest; does nothing if that was done from the same files.

    image_root: a folder that has the images, itself or in one of IMAGE_FOLDERS. max_skipped: share of the expressions
    that may be unusable before everything is given up. drawn: how synthetic scenes were made, kept in the manifest.
    Raises UserError; `output` then holds what it held before.
    """
    folder = Path(output) / files.name
    manifest = read_manifest(folder)
    if manifest is None:
        images = find_images(files, Path(image_root))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # one of several runs that start together prepares, the others find it done; the lock's file stays, because
            # removing it would give those that wait for it and those that come later two different locks
            with FileLock(folder.parent / f".{files.name}.lock"):
                manifest = read_manifest(folder)
                if manifest is None:
                    return _prepare_aside(files, folder, images, max_skipped, drawn, progress)
        except OSError as error:
            raise UserError(
                f"could not write {folder} ({error.strerror or error}); nothing was left there; make room, or choose "
                f"another output"
            ) from error
    if manifest["sources"] != files.sources or manifest["format"] != FORMAT:
        raise UserError(f"{folder} was prepared from other files; remove the folder or choose another output")
    return manifest


def _prepare_aside(
    files: ReferFiles,
    folder: Path,
    images: Path,
    max_skipped: float,
    drawn: Mapping[str, int] | None,
    progress: bool,
) -> dict[str, Any]:
    """Write beside `folder` and rename when whole: a killed run leaves nothing that looks finished."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something that was not prepared here; remove it or choose another output")
    skipped = _SkipLog(files, max_skipped)
    skipped.add(_refs_of_no_split(files))
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    try:
        counts: dict[str, Counts] = {}
        for split in files.spec.splits:
            counts[split] = _write_split(aside, split, files, images, skipped, progress)
        manifest = {
            "format": FORMAT,
            "dataset": files.name,
            "split_by": files.spec.split_by,
            "splits": {split: count._asdict() for split, count in counts.items()},
            "published": compare_with_published(files, counts),
            "sources": files.sources,
            "skipped": [entry._asdict() for entry in skipped.entries],
            **({} if drawn is None else {"drawn": dict(drawn)}),
        }
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _refs_of_no_split(files: ReferFiles) -> list[Skipped]:
    splits = Counter[str]()
    for ref in files.refs:
        if not any(belongs(ref["split"], split) for split in files.spec.splits):
            splits[ref["split"]] += len(ref["sentences"])
    return [Skipped(f"all refs of split {s!r}", f"{files.name} has no such split", n) for s, n in splits.items()]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared data set; None if there is none. Raises UserError if it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = load_json(path)
    if not isinstance(manifest, dict) or not {"format", "splits", "sources", "skipped"} <= set(manifest):
        raise UserError(f"{path} is no manifest of prepared data; remove {folder} and prepare it again")
    return manifest


def find_images(files: ReferFiles, root: Path) -> Path:
    """The folder under `root` that holds the images; releases put them in different places."""
    some = [image["file_name"] for image in islice(files.images.values(), 100)]
    for folder in (root / sub for sub in IMAGE_FOLDERS):
        if any((folder / name).is_file() for name in some):
            return folder
    tried = ", ".join(sub or "." for sub in IMAGE_FOLDERS)
    raise UserError(
        f"found no image such as {some[0] if some else '?'} under {root} (looked in {tried}); set image_root to the "
        f"folder of COCO's train2014 images"
    )


def compare_with_published(files: ReferFiles, counts: dict[str, Counts]) -> dict[str, str]:
    """For every split whose counts are published: `as published`, or what is."""
    verdicts = {}
    for split, expected in files.spec.published.items():
        found = counts[split]
        published = {unit: count for unit, count in expected._asdict().items() if count is not None}
        same = all(getattr(found, unit) == count for unit, count in published.items())
        listed = ", ".join(f"{count:,} {unit}" for unit, count in published.items())
        verdicts[split] = "as published" if same else f"published: {listed}"
    return verdicts


def describe(manifest: dict[str, Any]) -> str:
    """The manifest for a person: a line per split, and what was skipped."""
    lines = [f"{manifest['dataset']} (split by {manifest['split_by']})"]
    for split, count in manifest["splits"].items():
        verdict = manifest["published"].get(split)
        lines.append(
            f"  {split:6} {count['images']:>7,} images {count['refs']:>7,} refs {count['expressions']:>8,} expressions"
            + (f"  {verdict}" if verdict else "")
        )
    skipped = manifest["skipped"]
    if skipped:
        lost = sum(entry["expressions"] for entry in skipped)
        lines.append(f"  {lost} expressions skipped; faults found: {len(skipped)}")
    lines += [f"    {entry['what']}: {entry['why']}" for entry in skipped[:5]]
    if len(skipped) > 5:
        lines.append(f"    ... and {len(skipped) - 5} more, all in manifest.json")
    return "\n".join(lines)


class _ShardWriter:
    """Rows of a split -> Parquet shards of about SHARD_BYTES in row groups of ROWS_PER_GROUP."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._shards: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of FEATURES; every ROWS_PER_GROUP of them are written."""
        self._pending.append(row)
        if len(self._pending) == ROWS_PER_GROUP:
            self._flush()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """After a failure; a file that is given up may fail to close as well."""
        with suppress(OSError):
            self._close()

    def finish(self) -> None:
        """Write what is pending (a split without rows becomes an empty shard) and give the shards their names."""
        if self._pending or not self._shards:
            self._flush()
        self._close()
        for number, shard in enumerate(self._shards):
            shard.rename(self._folder / f"{self._split}-{number:05d}-of-{len(self._shards):05d}.parquet")

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _flush(self) -> None:
        if self._writer is None:
            self._shards.append(self._folder / f"{self._split}-{len(self._shards)}.parquet")
            self._writer = pq.ParquetWriter(self._shards[-1], FEATURES.arrow_schema)
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=FEATURES.arrow_schema))
        self._pending.clear()
        if self._shards[-1].stat().st_size > SHARD_BYTES:
            self._close()


def _write_split(
    folder: Path, split: str, files: ReferFiles, images: Path, skipped: _SkipLog, progress: bool
) -> Counts:
    """Write one split's shards; `skipped` gets what could not be used."""
    refs = expressions = rows = 0
    total = len({ref["image_id"] for ref in files.refs if belongs(ref["split"], split)})
    bar = tqdm(total=total, desc=f"prepare {split}", unit="image", disable=not progress, leave=False)
    with bar, _ShardWriter(folder, split) as writer:
        for checked in _checked_images(image_groups(files, split), images):
            bar.update()
            group = checked.group
            skipped.add(group.skipped)
            if checked.image is None and group.referents:
                lost = sum(len(referent["sentences"]) for referent in group.referents)
                what = f"image {group.file_name} with {len(group.referents)} refs"
                skipped.add([Skipped(what, checked.fault, lost)])
            if checked.image is None or not group.referents:
                continue
            writer.add(_row(group, checked.image))
            rows += 1
            refs += len(group.referents)
            expressions += sum(len(referent["sentences"]) for referent in group.referents)
        writer.finish()
    return Counts(refs, expressions, rows)


def _row(group: ImageGroup, image: bytes) -> dict[str, Any]:
    return {
        "image_id": group.image_id,
        "file_name": group.file_name,
        "height": group.height,
        "width": group.width,
        "image": {"bytes": image, "path": group.file_name},
        "referents": group.referents,
    }


def _checked_images(groups: Iterator[ImageGroup], images: Path) -> Iterator[_Checked]:
    """Read and decode every image once, a few at a time beside the writing, in order."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        queue = [pool.submit(_check_image, group, images) for group in islice(groups, 32)]
        while queue:
            checked = queue.pop(0).result()
            queue += [pool.submit(_check_image, group, images) for group in islice(groups, 1)]
            yield checked


def _check_image(group: ImageGroup, images: Path) -> _Checked:
    if not group.referents:
        return _Checked(group, None, "no usable ref")
    path = images / group.file_name
    try:
        content = path.read_bytes()
    except OSError:
        return _Checked(group, None, f"the file is missing in {images}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = (image.height, image.width)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        return _Checked(group, None, f"the file is damaged ({error})")
    if size != (group.height, group.width):
        return _Checked(
            group, None, f"it is {size[0]} x {size[1]} pixels, its annotations say {group.height} x {group.width}"
        )
    return _Checked(group, content, "")
