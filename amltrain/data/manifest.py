"""The manifest of a prepared data set: counts, hashes, skipped entries, and the data set's spec."""

import functools
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from amltrain.data.json_files import load_json
from amltrain.data.specs import DATASETS, Counts, DatasetSpec, dataset_spec
from amltrain.errors import UserError, first_line

MANIFEST = "manifest.json"
_REQUIRED = {"format", "splits", "sources", "skipped"}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared data set; None if there is none. Raises UserError if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = load_json(path)
    if not isinstance(manifest, dict) or not manifest.keys() >= _REQUIRED:
        raise UserError(f"{path} is no manifest of prepared data; remove {folder} and prepare it again")
    return manifest


def find_manifest(prepared: str, name: str) -> dict[str, Any] | None:
    """The manifest of a data set in a folder or a Hub data set; None if there is none. Raises UserError."""
    if Path(prepared).is_dir():
        return read_manifest(Path(prepared) / name)
    return _hub_manifest(prepared, name)


def find_spec(name: str, prepared: str | None = None) -> DatasetSpec:
    """The data set's entry in the table, or what the manifest of `<prepared>/<name>` states.

    prepared: a folder or a Hub data set id. Raises UserError for a name that is known to neither.
    """
    if name in DATASETS or prepared is None:
        return dataset_spec(name)
    manifest = find_manifest(prepared, name)
    if manifest is None:
        own = [path.parent.name for path in sorted(Path(prepared).glob(f"*/{MANIFEST}"))]
        try:
            return dataset_spec(name)
        except UserError as error:
            held = f"; {prepared} holds {', '.join(own)}" if own else ""
            raise UserError(f"{error}{held}; prepare your own data with amltrain prepare --table") from None
    return spec_of(manifest, f"{prepared}/{name}/{MANIFEST}")


def spec_of(manifest: dict[str, Any], place: str) -> DatasetSpec:
    """The spec that a manifest keeps. Raises UserError if it keeps none."""
    kept = manifest.get("spec")
    splits = kept.get("splits") if isinstance(kept, dict) else None
    if kept is None or not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise UserError(f"{place} does not state the splits of the data set; prepare it again")
    metrics = kept.get("metrics", [])
    if not isinstance(metrics, list):
        raise UserError(f"{place} does not state the metrics of the data set; prepare it again")
    return DatasetSpec(
        folder=str(manifest.get("dataset", "")),
        split_by=str(kept.get("split_by", "")),
        splits=tuple(splits),
        generalised=bool(kept.get("generalised")),
        shares_images=bool(kept.get("shares_images")),
        layout="table",
        metrics=tuple(map(str, metrics)),
        exact_splits=True,
    )


def check_split(name: str, split: str, prepared: str | None = None) -> None:
    """Raise UserError unless the data set has that split."""
    spec = find_spec(name, prepared)
    if split not in spec.splits:
        drawn = spec.split_by == "own" and split in ("train", "val", "test")
        few = "; give its table a split column, or more images" if drawn else ""
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(spec.splits)}{few}")


@functools.lru_cache
def _hub_manifest(repository: str, name: str) -> dict[str, Any] | None:
    """Return the manifest of a Hub data set; None if it has none, or if `repository` is not a Hub id."""
    if repository.count("/") != 1 or repository.startswith((".", "/")):
        return None
    try:
        return load_json(Path(hf_hub_download(repository, f"{name}/{MANIFEST}", repo_type="dataset")))
    except LocalEntryNotFoundError as error:
        raise UserError(f"could not reach the Hub data set {repository} ({first_line(error)})") from error
    except (EntryNotFoundError, HfHubHTTPError):
        return None
    except OSError as error:
        raise UserError(f"could not read the Hub data set {repository} ({first_line(error)})") from error


def compare_with_published(spec: DatasetSpec, counts: dict[str, Counts]) -> dict[str, str]:
    """Return `as published`, or the published counts, for every split with published counts."""
    verdicts = {}
    for split, expected in spec.published.items():
        published = {unit: count for unit, count in expected._asdict().items() if count is not None}
        same = all(getattr(counts[split], unit) == count for unit, count in published.items())
        listed = ", ".join(f"{count:,} {unit}" for unit, count in published.items())
        verdicts[split] = "as published" if same else f"published: {listed}"
    return verdicts


def describe(manifest: dict[str, Any]) -> str:
    """Format the manifest for people: a line per split, then warnings and skipped entries."""
    by = "own data" if manifest["split_by"] == "own" else f"split by {manifest['split_by']}"
    lines = [f"{manifest['dataset']} ({by})"]
    for split, count in manifest["splits"].items():
        verdict = manifest["published"].get(split)
        lines.append(
            f"  {split:6} {count['images']:>7,} images {count['refs']:>7,} refs {count['expressions']:>8,} expressions"
            + (f"  {verdict}" if verdict else "")
        )
    for kind, noticed in manifest.get("noticed", {}).items():
        lines.append(f"  {noticed['count']:,} {kind} (e.g. {noticed['first'][0]})")
    lines += [f"  note: {note}" for note in manifest.get("notes", [])]
    skipped = manifest["skipped"]
    if skipped:
        lost = sum(entry["expressions"] for entry in skipped)
        lines.append(f"  {lost} expressions skipped; faults found: {len(skipped)}")
    lines += [f"    {entry['what']}: {entry['why']}" for entry in skipped[:5]]
    if len(skipped) > 5:
        lines.append(f"    ... and {len(skipped) - 5} more, all in {MANIFEST}")
    return "\n".join(lines)
