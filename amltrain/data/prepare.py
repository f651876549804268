"""Turn annotations and images into checked Parquet shards for `datasets`, atomically.

<output>/README.md              a data card, with which `load_dataset(<output>, <dataset>)` finds every split
<output>/<dataset>/train-00000-of-00003.parquet ...
                   val-00000-of-00001.parquet ...
                   manifest.json   counts, comparison with the published ones, hashes, skipped entries, warnings
                   rows.jpg        some random rows, for a person to look at

Prepare missing data sets of a run.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from amltrain.config.schema import DataConfig, ShapesConfig
from amltrain.data.card import write_data_card
from amltrain.data.catalog import (
    MANIFEST,
    Counts,
    check_split,
    compare_with_published,
    dataset_spec,
    describe,
    find_spec,
    read_manifest,
)
from amltrain.data.leakage import combined_path, write_combined_manifest
from amltrain.data.loaders import leaks
from amltrain.data.row_sheet import RowSheet
from amltrain.data.rows import ShardWriter, hash_file, row_digest
from amltrain.data.sources.annotations import (
    Annotations,
    ImageGroup,
    ImageJob,
    Skipped,
    image_jobs,
    read_job,
    read_jobs,
)
from amltrain.data.sources.refer import names_of_2017, read_refer, refer_paths
from amltrain.data.sources.shapes import SPLIT_SIZES, write_refshapes
from amltrain.errors import UserError, cure
from amltrain.files import flush_tree, locked
from amltrain.registry import DATASETS, READERS

FORMAT = 1
IMAGE_FOLDERS = (
    "",
    "images/mscoco/images/train2014",
    "train2014",
    "images/train2014",
    "mscoco/train2014",
    "images/mscoco/train2014",
    "coco/train2014",
    "images",
)
"""Where official code, and people who follow it, keep COCO's train2014."""
JOBS_PER_TASK = 16
IMAGES_PER_WORKER = 250
"""A further process is worth its start only for this many images."""
_FIRST = 5


class _Findings:
    """What could not be used, and what a person should look at.

    Raises UserError as soon as more than a share of all expressions is lost.
    """

    def __init__(self, files: Annotations, max_skipped: float) -> None:
        self.entries: list[Skipped] = []
        self.noticed: dict[str, dict[str, Any]] = {}
        self._lost: list[Skipped] = []
        self._name, self._place, self._max_skipped = files.name, files.place, max_skipped
        self._total = files.expressions

    def notice(self, found: Iterable[tuple[str, str]]) -> None:
        """Count (kind, example); the first few examples of a kind are kept."""
        for kind, example in found:
            entry = self.noticed.setdefault(kind, {"count": 0, "first": []})
            entry["count"] += 1
            entry["first"] += [example] if len(entry["first"]) < _FIRST else []

    def add(self, entries: Iterable[Skipped]) -> None:
        """Note them. Raises UserError."""
        new = list(entries)
        self.entries += new
        self._lost += [entry for entry in new if entry.expressions]
        count = sum(entry.expressions for entry in self._lost)
        if count > self._max_skipped * self._total:
            first = "; ".join(f"{entry.what[:200]}: {entry.why[:200]}" for entry in self._lost[:3])
            raise UserError(
                f"{self._name}: {count} of {self._total} expressions in {self._place} cannot be used so far, more than "
                f"max_skipped = {self._max_skipped:g} allows ({first}{'; ...' if len(self._lost) > 3 else ''}); "
                f"correct the files or raise max_skipped; nothing was written"
            )


def prepare(
    dataset: str,
    refer_root: Path | str,
    output: Path | str,
    *,
    image_root: Path | str | None = None,
    max_skipped: float = 0.001,
    drawn: Mapping[str, int] | None = None,
    workers: int = 1,
    progress: bool = True,
    image_option: str = "image_root",
) -> dict[str, Any]:
    """Prepare one data set from the original files under `refer_root`; see `prepare_files`."""
    return prepare_files(
        read_refer(Path(refer_root), dataset),
        output,
        image_root or refer_root,
        max_skipped=max_skipped,
        drawn=drawn,
        workers=workers,
        progress=progress,
        image_option=image_option,
    )


def prepare_files(
    files: Annotations,
    output: Path | str,
    image_root: Path | str,
    *,
    max_skipped: float = 0.001,
    drawn: Mapping[str, int] | None = None,
    workers: int = 1,
    progress: bool = True,
    image_option: str = "image_root",
) -> dict[str, Any]:
    """Prepare one data set under `output` and return its manifest; does nothing if that was done from the same files.

    image_root: a folder that has the images, itself or in one of IMAGE_FOLDERS. max_skipped: share of the expressions
    that may be unusable before everything is given up. drawn: how synthetic scenes were made, kept in the manifest.
    workers: processes that decode; the output does not depend on it. More than one needs a main module that can be
    imported. image_option: the flag or key that sets `image_root`, for the error where no image is found. Raises
    UserError; `output` is then unchanged.
    """
    folder = Path(output) / files.name
    manifest = read_manifest(folder)
    if manifest is None:
        files, images = find_images(files, Path(image_root), image_option)
        try:
            # one of several runs that start together prepares, the others find it done
            with locked(folder, "choose another output"):
                manifest = read_manifest(folder)
                if manifest is None:
                    manifest = _prepare_atomically(files, folder, images, max_skipped, drawn, workers, progress)
                    with locked(folder.parent / "README", "choose another output"):
                        write_data_card(folder.parent)
                    return manifest
        except OSError as error:
            raise UserError(
                f"could not write {folder} ({error.strerror or error}); nothing was left there; "
                f"{cure(error, 'choose another output')}"
            ) from error
    if manifest["sources"] != files.sources or manifest["format"] != FORMAT:
        raise UserError(
            f"{folder} was prepared from other files; remove the folder, or prepare under another name or elsewhere"
        )
    return manifest


def _prepare_atomically(
    files: Annotations,
    folder: Path,
    images: Path,
    max_skipped: float,
    drawn: Mapping[str, int] | None,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    """Write to a temporary folder and rename it: a killed run leaves nothing that looks finished."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something that was not prepared here; remove it or choose another output")
    findings = _Findings(files, max_skipped)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        counts: dict[str, Counts] = {}
        sheet = RowSheet()
        with _Reader(
            images.resolve(), files.categories, min(workers, 1 + len(files.images) // IMAGES_PER_WORKER)
        ) as read:
            contents: dict[str, str] = {}
            for split in files.spec.splits:
                counts[split], contents[split] = _write_split(temporary, split, files, read, findings, sheet, progress)
        sheet.save(temporary / "rows.jpg")
        manifest = {
            "format": FORMAT,
            "dataset": files.name,
            "split_by": files.spec.split_by,
            "splits": {split: count._asdict() for split, count in counts.items()},
            "published": compare_with_published(files.spec, counts),
            "spec": files.spec.to_manifest(),
            "sources": files.sources,
            "contents": contents,
            "files": {path.name: hash_file(path)._asdict() for path in sorted(temporary.glob("*.parquet"))},
            "skipped": [entry._asdict() for entry in findings.entries],
            "noticed": findings.noticed,
            "notes": list(files.notes),
            **({} if drawn is None else {"drawn": dict(drawn)}),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush_tree(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def find_images(files: Annotations, root: Path, option: str = "image_root") -> tuple[Annotations, Path]:
    """The files and the folder under `root` that holds the images; official code puts them in different places.

    COCO published the pictures of 2014 again in 2017, as 000000000009.jpg: such a folder is found too, and the names in
    the files are changed. option: the flag or key that sets `root`, for the error. Raises UserError.
    """
    some = [image["file_name"] for image in islice(files.images.values(), 100)]
    spec = files.spec
    if spec.layout == "refer":
        folders = (*spec.image_folders, *IMAGE_FOLDERS)
    else:
        below = ("", "images", spec.folder, f"{spec.folder}/images", *spec.image_folders)
        folders = ("",) if spec.layout == "table" else below
    for folder in (root / sub for sub in folders):
        if any(os.path.isfile(folder / name) for name in some):  # False also for what cannot be a name
            return files, folder
    if spec.layout == "refer" and (named := names_of_2017(files)) is not None:
        there = [image["file_name"] for image in islice(named.images.values(), 100)]
        for folder in (root / sub for sub in (*folders, "train2017", "images/train2017", "coco/train2017")):
            if any(os.path.isfile(folder / name) for name in there):
                return named, folder
    tried = ", ".join(sub or "." for sub in folders)
    kind = "COCO's train2014 images" if spec.layout == "refer" else "the images"
    fix = (
        f"correct the table's paths or {option}" if spec.layout == "table" else f"set {option} to the folder of {kind}"
    )
    example = some[0][:200] if some else "?"
    raise UserError(f"found no image such as {example} under {root} (looked in {tried}); {fix}")


class _Reader:
    """Reads jobs in order, in this process or in several; memory is bounded."""

    def __init__(self, images: Path, categories: dict[int, str], workers: int) -> None:
        self._images, self._categories, self._workers = images, categories, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Reader":
        if self._workers > 1:
            context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
            context.set_forkserver_preload(["amltrain.data.sources.annotations"])
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, jobs: Iterator[ImageJob]) -> Iterator[ImageGroup]:
        """The groups of the jobs, in their order. Raises UserError if a process was killed."""
        if self._pool is None:
            yield from (read_job(job, self._images, self._categories) for job in jobs)
            return
        queue: deque[Future[list[ImageGroup]]] = deque()
        try:
            while True:
                while len(queue) < 3 * self._workers and (task := list(islice(jobs, JOBS_PER_TASK))):
                    queue.append(self._pool.submit(read_jobs, task, self._images, self._categories))
                if not queue:
                    return
                yield from queue.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that reads images was killed, perhaps because memory ran out; use fewer --workers"
            ) from error


def _write_split(
    folder: Path, split: str, files: Annotations, read: _Reader, findings: _Findings, sheet: RowSheet, progress: bool
) -> tuple[Counts, str]:
    """Write one split's shards; `findings` gets what cannot be used. Returns counts and the contents' fingerprint."""
    refs = expressions = rows = 0
    digest = hashlib.sha256()
    total = len({ref["image_id"] for ref in files.refs if files.spec.has(ref["split"], split)})
    bar = tqdm(total=total, desc=f"prepare {split}", unit="image", disable=None if progress else True, leave=False)
    with bar, ShardWriter(folder, split) as writer:
        for group in read(image_jobs(files, split)):
            bar.update()
            findings.add(group.skipped)
            findings.notice(group.noticed)
            if group.content is None:
                continue
            row = _row(group, group.content)
            digest.update(row_digest(row))
            writer.add(row)
            sheet.offer(split, group)
            rows += 1
            refs += len(group.referents)
            expressions += sum(len(referent["sentences"]) for referent in group.referents)
        writer.finish()
    return Counts(refs, expressions, rows), digest.hexdigest()


def _row(group: ImageGroup, content: bytes) -> dict[str, Any]:
    return {
        "image_id": group.image_id,
        "file_name": group.file_name,
        "height": group.height,
        "width": group.width,
        "image": {"bytes": content, "path": group.file_name},
        "referents": group.referents,
    }


def available_cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def ensure_prepared(data: DataConfig, log: Callable[[str], None]) -> None:
    """Prepare every data set that is missing: from `refer_root`, or drawn for the refshapes family."""
    prepared = Path(data.prepared)
    for name in data.datasets:
        find_spec(name, data.prepared)
    if not prepared.exists() and data.prepared.count("/") == 1 and data.refer_root is None and not _synthetic(data):
        return  # a Hub data set
    missing = [name for name in data.datasets if read_manifest(prepared / name) is None]
    for name in missing:  # check all of them before the first one takes its minutes
        _check_source(name, data)
    for name in missing:
        if _is_synthetic(name):
            source = _draw_scenes(name, data)
            manifest = prepare(name, source, prepared, max_skipped=data.max_skipped, drawn=asdict(data.shapes))
        else:
            assert data.refer_root is not None  # _check_source
            root = Path(data.refer_root)
            images = data.image_root or data.refer_root
            options: dict[str, Any] = {
                "max_skipped": data.max_skipped,
                "workers": available_cores(),
                "image_option": "data.image_root",
            }
            if dataset_spec(name).layout == "refer":
                manifest = prepare(name, root, prepared, image_root=images, **options)
            else:
                manifest = prepare_files(
                    READERS[dataset_spec(name).layout].value(root, name), prepared, images, **options
                )
        log(describe(manifest))


def _check_source(name: str, data: DataConfig) -> None:
    """Raise UserError if there is nothing that a data set could be prepared from."""
    find_spec(name, data.prepared)
    if _is_synthetic(name):
        return
    if data.refer_root is None:
        raise UserError(
            f"{Path(data.prepared) / name} is not prepared; give data.refer_root (and data.image_root), or run "
            f"amltrain data prepare --dataset {name}"
        )
    if dataset_spec(name).layout == "refer":
        refer_paths(Path(data.refer_root), name)


def ensure_training_data(data: DataConfig, log: Callable[[str], None]) -> None:
    """Prepare missing data sets, and record the images that combined training drops.

    Raises UserError for a data set without the split to train on.
    """
    for name in data.datasets:
        check_split(name, data.train_split, data.prepared)
    ensure_prepared(data, log)
    if len(data.datasets) > 1 and Path(data.prepared).is_dir():
        path = combined_path(data.prepared, data.datasets, data.leak_filter)
        log(write_combined_manifest(path, data.prepared, data.datasets, leaks(data)))


def _draw_scenes(name: str, data: DataConfig) -> Path:
    """Draw a data set of the refshapes family; returns its folder in the original layout."""
    scenes = data.shapes
    source = Path(data.prepared) / "source" / f"{name}-{_named(scenes)}"
    sizes = dict.fromkeys(SPLIT_SIZES, scenes.evaluation) | {"train": scenes.train}
    try:
        write_refshapes(
            source,
            name,
            split_sizes=sizes,
            size=scenes.size,
            seed=scenes.seed,
            style=scenes.style,
            described=scenes.described,
        )
    except OSError as error:
        raise UserError(
            f"could not draw scenes into {source} ({error.strerror or error}); {cure(error, 'choose another')} "
            f"data.prepared"
        ) from error
    return source


def _named(scenes: ShapesConfig) -> str:
    style = "" if scenes.style == ShapesConfig.style else f"{scenes.style}-"
    return f"{style}{scenes.size}px-seed{scenes.seed}"


def check_scenes(data: DataConfig) -> None:
    """Raise UserError if an earlier run drew synthetic scenes with other settings than data.shapes."""
    for name in data.datasets:
        drawn = (read_manifest(Path(data.prepared) / name) or {}).get("drawn")
        if drawn is None:
            continue
        asked, there = asdict(data.shapes), asdict(ShapesConfig(**drawn))
        other = [key for key in asked if asked[key] != there[key]]
        if other:
            differs = ", ".join(f"data.shapes.{key} {there[key]}, not {asked[key]}" for key in other)
            raise UserError(
                f"{Path(data.prepared) / name} holds scenes drawn with {differs}; set it back, remove the folder, or "
                "choose another data.prepared"
            )


def _is_synthetic(name: str) -> bool:
    return name in DATASETS.names() and dataset_spec(name).synthetic


def _synthetic(data: DataConfig) -> bool:
    return any(map(_is_synthetic, data.datasets))
