"""Readers of the original files: REFER's `refs(unc|umd|google).p`, gRefCOCO's `grefs(unc).json`, `instances.json`.

Layout and rules: lichengunc/refer (commit e3bbaa3) and henghuiding/gRefCOCO (commit 41a8f00). A ref's own `file_name`
is not a file on disk; the image's is. RRSIS-D, RefCLEF, Ref-ZOM and R-RefCOCO use the same layout.
"""

from pathlib import Path

from amltrain.data.annotations import Annotations, by_id, check_refs
from amltrain.data.json_files import load_json, load_pickle
from amltrain.data.specs import dataset_spec
from amltrain.errors import UserError
from amltrain.files import sha256


def refer_paths(root: Path, dataset: str) -> tuple[Path, Path]:
    """Return the paths of a data set's refs and instances under a REFER root. Raises UserError if one is missing."""
    spec = dataset_spec(dataset)
    folder = root / spec.folder
    candidates = [folder / f"{spec.refs_name}{ending}" for ending in (".p", ".json")]
    refs_path = next((path for path in candidates if path.is_file()), None)
    instances_path = folder / "instances.json"
    if refs_path is None or not instances_path.is_file():
        wanted = candidates[spec.generalised] if refs_path is None else instances_path
        raise UserError(
            f"{folder} has no {wanted.name}; put {dataset}'s original files there (docs/data.md lists the sources)"
        )
    return refs_path, instances_path


def read_refer(root: Path, dataset: str) -> Annotations:
    """Read the files of `dataset` under a REFER root. Raises UserError that names the file and what is missing."""
    spec = dataset_spec(dataset)
    refs_path, instances_path = refer_paths(root, dataset)
    refs = load_pickle(refs_path) if refs_path.suffix == ".p" else load_json(refs_path)
    instances = load_json(instances_path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise UserError(f"{instances_path} has no list {key!r}; it should be {dataset}'s instances.json")
    if not isinstance(refs, list):
        raise UserError(f"{refs_path} holds a {type(refs).__name__}, not a list of refs")
    check_refs(refs, spec, dataset, str(refs_path))
    place = str(instances_path)
    return Annotations(
        dataset,
        spec,
        refs,
        by_id(instances["images"], "image", ("file_name", "height", "width"), place),
        by_id(instances["annotations"], "annotation", ("segmentation", "bbox", "category_id"), place),
        {key: entry["name"] for key, entry in by_id(instances["categories"], "category", ("name",), place).items()},
        {path.name: sha256(path) for path in (refs_path, instances_path)},
        place,
    )
