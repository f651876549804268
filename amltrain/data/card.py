"""The data card of a prepared folder: `load_dataset(folder, "refcoco")` and the Hub's viewer read its `configs`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from amltrain.data.catalog import MANIFEST, read_manifest

CARD = "README.md"
_MARK = "<!-- written by amltrain data prepare; remove this line to keep your own text -->"
_LOADING = """```python
from amltrain import decode_mask
from datasets import load_dataset

rows = load_dataset("{folder}", "{first}", split="{split}")
row = rows[0]
row["image"]                                    # a PIL image
referent = row["referents"][0]
referent["sentences"][0]["raw"]                 # "the woman on the left"
decode_mask(referent["mask"])                   # [height, width] uint8, 1 = the object
```"""


def write_data_card(output: Path, repository: str | None = None) -> None:
    """Write or refresh the card of everything prepared under `output`, unless a person has written one.

    repository: the Hub id that the card shows. Raises OSError.
    """
    path = output / CARD
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    temporary = path.with_name(f".{CARD}.{os.getpid()}")
    temporary.write_text(data_card(output, repository), encoding="utf-8")
    temporary.replace(path)


def data_card(output: Path, repository: str | None = None, names: Sequence[str] | None = None) -> str:
    """The card's text. names: data sets to list; None = all. Raises UserError for a damaged manifest."""
    folders = sorted(path.parent for path in output.glob(f"*/{MANIFEST}"))
    folders = [folder for folder in folders if names is None or folder.name in names]
    found = {folder.name: manifest for folder in folders if (manifest := read_manifest(folder)) is not None}
    header = {
        "task_categories": ["image-segmentation"],
        "tags": ["referring-image-segmentation", "amltrain"],
        "configs": [_config(name, manifest, number == 0) for number, (name, manifest) in enumerate(found.items())],
    }
    first = next(iter(found), "refcoco")
    splits = list(found[first]["splits"]) if found else ["train"]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        _MARK,
        f"# {(repository or 'Referring image segmentation').rpartition('/')[2]}",
        "Images with sentences, and for every sentence the mask of the object that it refers to. One row per image; "
        "`referents` holds its objects with their sentences and masks (COCO run lengths).",
        _LOADING.format(folder=repository or output.name, first=first, split=splits[0]),
        *(_section(name, manifest) for name, manifest in found.items()),
        "The images keep their own licences; check them before you publish this folder.",
    ]
    return "\n\n".join(parts) + "\n"


def _config(name: str, manifest: dict[str, Any], default: bool) -> dict[str, Any]:
    used = [split for split, counts in manifest["splits"].items() if counts["images"]]
    files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in used]
    return {"config_name": name, "data_files": files, **({"default": True} if default else {})}


def _section(name: str, manifest: dict[str, Any]) -> str:
    rows = [
        f"| {split} | {counts['images']:,} | {counts['refs']:,} | {counts['expressions']:,} |"
        for split, counts in manifest["splits"].items()
    ]
    table = ["| split | images | referents | sentences |", "|---|---|---|---|", *rows]
    source = ", ".join(re.sub(r".*[/\\]", "", place) for place in manifest["sources"])
    lost = sum(entry["expressions"] for entry in manifest["skipped"])
    return "\n".join([f"## {name}", "", *table, "", f"Made from {source}; {lost:,} sentences could not be used."])
