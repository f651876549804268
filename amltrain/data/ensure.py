"""Prepare missing data sets of a run."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amltrain.config.schema import DataConfig, ShapesConfig
from amltrain.data.leakage import combined_path, write_combined_manifest
from amltrain.data.loaders import leaks
from amltrain.data.manifest import check_split, describe, find_spec, read_manifest
from amltrain.data.prepare import prepare, prepare_files
from amltrain.data.readers import READERS
from amltrain.data.refer import refer_paths
from amltrain.data.shapes import SPLIT_SIZES, write_refshapes
from amltrain.data.specs import DATASETS, dataset_spec
from amltrain.errors import UserError


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
                manifest = prepare_files(READERS[dataset_spec(name).layout](root, name), prepared, images, **options)
        log(describe(manifest))


def _check_source(name: str, data: DataConfig) -> None:
    """Raise UserError if there is nothing that a data set could be prepared from."""
    find_spec(name, data.prepared)
    if _is_synthetic(name):
        return
    if data.refer_root is None:
        raise UserError(
            f"{Path(data.prepared) / name} is not prepared; give data.refer_root (and data.image_root), or run "
            f"amltrain prepare --dataset {name}"
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
        write_refshapes(source, name, split_sizes=sizes, size=scenes.size, seed=scenes.seed, style=scenes.style)
    except OSError as error:
        raise UserError(
            f"could not draw scenes into {source} ({error.strerror or error}); make room, or choose another "
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
    return name in DATASETS and "shapes" in name


def _synthetic(data: DataConfig) -> bool:
    return any(map(_is_synthetic, data.datasets))
