"""Original REFER files + images -> Parquet shards that `datasets` reads, once, checked, whole or not at all.

<output>/<dataset>/train-00000-of-00003.parquet ...
                   val-00000-of-00001.parquet ...
                   manifest.json   counts, comparison with the published ones, hashes of the sources, what was skipped
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from amltrain.data.refer import ImageGroup, ReferFiles, Skipped, image_groups, read_refer
from amltrain.data.schema import FEATURES
from amltrain.data.splits import Counts
from amltrain.errors import UserError

FORMAT = 1
ROWS_PER_GROUP = 64
SHARD_BYTES = 512 * 2**20
IMAGE_FOLDERS = ("", "images/mscoco/images/train2014", "train2014", "images/train2014", "mscoco/train2014", "images")


class _Checked(NamedTuple):
    group: ImageGroup
    image: bytes | None
    fault: str


def prepare(
    dataset: str,
    refer_root: Path | str,
    output: Path | str,
    *,
    image_root: Path | str | None = None,
    max_skipped: float = 0.001,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare one data set under `output` and return its manifest; does nothing if that was done from the same files.

    max_skipped: share of the refs that may be unusable before everything is given up. Raises UserError.
    """
    files = read_refer(Path(refer_root), dataset)
    folder = Path(output) / dataset
    sources = {path.name: _sha256(path) for path in files.sources}
    done = read_manifest(folder)
    if done is not None:
        if done["sources"] != sources or done["format"] != FORMAT:
            raise UserError(f"{folder} was prepared from other files; remove the folder or choose another output")
        return done
    images = find_images(files, Path(image_root or refer_root))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written aside on the same disk and renamed when whole: a killed run leaves nothing that looks finished
    aside = Path(tempfile.mkdtemp(prefix=f".{dataset}-", dir=folder.parent))
    try:
        counts: dict[str, Counts] = {}
        skipped: list[Skipped] = []
        for split in files.spec.splits:
            groups = list(image_groups(files, split))
            counts[split] = _write_split(aside, split, groups, images, skipped, progress)
        _check_skipped(dataset, files, skipped, max_skipped)
        manifest = {
            "format": FORMAT,
            "dataset": dataset,
            "split_by": files.spec.split_by,
            "splits": {split: count._asdict() for split, count in counts.items()},
            "published": compare_with_published(files, counts),
            "sources": sources,
            "skipped": [entry._asdict() for entry in skipped],
        }
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.chmod(aside, 0o755)
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"could not write {folder} ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared data set; None if there is none."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else None


def find_images(files: ReferFiles, root: Path) -> Path:
    """The folder under `root` that holds the images; releases put them in different places."""
    some = [image["file_name"] for image in islice(files.images.values(), 100)]
    for folder in (root / sub for sub in IMAGE_FOLDERS):
        if any((folder / name).is_file() for name in some):
            return folder
    tried = ", ".join(sub or "." for sub in IMAGE_FOLDERS)
    raise UserError(
        f"found no image such as {some[0] if some else '?'} under {root} (looked in {tried}); set image_root"
    )


def compare_with_published(files: ReferFiles, counts: dict[str, Counts]) -> dict[str, str]:
    """For every split: `as published`, or what differs."""
    verdicts = {}
    for split, expected in files.spec.published.items():
        found = counts[split]
        wrong = [
            f"{getattr(found, unit)} {unit} instead of {getattr(expected, unit)}"
            for unit in Counts._fields
            if getattr(expected, unit) is not None and getattr(found, unit) != getattr(expected, unit)
        ]
        verdicts[split] = ", ".join(wrong) or "as published"
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
    lines += [f"  skipped {entry['what']}: {entry['why']}" for entry in skipped[:5]]
    if len(skipped) > 5:
        lines.append(f"  ... and {len(skipped) - 5} more, all in manifest.json")
    return "\n".join(lines)


def _write_split(
    folder: Path, split: str, groups: list[ImageGroup], images: Path, skipped: list[Skipped], progress: bool
) -> Counts:
    """Write one split's shards; appends to `skipped` what could not be used."""
    shards: list[Path] = []
    writer: pq.ParquetWriter | None = None
    refs = expressions = rows = 0
    bar = tqdm(total=len(groups), desc=f"prepare {split}", unit="image", disable=not progress, leave=False)
    pending: list[dict[str, Any]] = []

    def flush() -> None:
        nonlocal writer
        if writer is None:
            shards.append(folder / f"{split}-{len(shards)}.parquet")
            writer = pq.ParquetWriter(shards[-1], FEATURES.arrow_schema)
        writer.write_table(pa.Table.from_pylist(pending, schema=FEATURES.arrow_schema))
        pending.clear()
        if shards[-1].stat().st_size > SHARD_BYTES:
            writer.close()
            writer = None

    for checked in _checked_images(groups, images):
        bar.update()
        group = checked.group
        skipped += group.skipped
        if checked.image is None and group.referents:
            lost = sum(len(referent["sentences"]) for referent in group.referents)
            what = f"image {group.file_name} with {len(group.referents)} refs"
            skipped.append(Skipped(what, checked.fault, lost))
        if checked.image is None or not group.referents:
            continue
        pending.append(_row(group, checked.image))
        rows += 1
        refs += len(group.referents)
        expressions += sum(len(referent["sentences"]) for referent in group.referents)
        if len(pending) == ROWS_PER_GROUP:
            flush()
    if pending or not shards:
        flush()
    if writer is not None:
        writer.close()
    bar.close()
    for number, shard in enumerate(shards):
        shard.rename(folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
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


def _checked_images(groups: list[ImageGroup], images: Path) -> Iterator[_Checked]:
    """Read and decode every image once, a few at a time beside the writing, in order."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        remaining = iter(groups)
        queue = [pool.submit(_check_image, group, images) for group in islice(remaining, 32)]
        while queue:
            checked = queue.pop(0).result()
            queue += [pool.submit(_check_image, group, images) for group in islice(remaining, 1)]
            yield checked


def _check_image(group: ImageGroup, images: Path) -> _Checked:
    if not group.referents:
        return _Checked(group, None, "no usable ref")
    path = images / group.file_name
    try:
        content = path.read_bytes()
    except OSError:
        return _Checked(group, None, f"the file is missing in {images.name or images}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = (image.height, image.width)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        return _Checked(group, None, f"the file is damaged ({error})")
    if size != (group.height, group.width):
        return _Checked(group, None, f"it is {size} pixels, instances.json says {(group.height, group.width)}")
    return _Checked(group, content, "")


def _check_skipped(dataset: str, files: ReferFiles, skipped: list[Skipped], max_skipped: float) -> None:
    total = sum(len(ref["sentences"]) for ref in files.refs)
    lost = sum(entry.expressions for entry in skipped)
    if total == 0:
        raise UserError(f"{dataset}: the files hold no expression at all")
    if lost > max_skipped * total:
        first = "; ".join(f"{entry.what}: {entry.why}" for entry in skipped[:3])
        raise UserError(
            f"{dataset}: {lost} of {total} expressions cannot be used, more than max_skipped = {max_skipped:g} allows "
            f"({first}{'; ...' if len(skipped) > 3 else ''}); mend the files or raise max_skipped"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
