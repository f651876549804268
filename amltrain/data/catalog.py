"""The open table of data sets: one entry each with its folder, splits, published counts and special keys.

Counts: RefCOCO val, testA, testB and all expressions were recounted from the files; the others of RefCOCO, RefCOCO+
and RefCOCOg are in official code or papers. PhraseCut, ReasonSeg and RefCOCO-M: as their authors' pages state.
RRSIS-D, Ref-ZOM and RefSegRS: as other papers and catalogues state; the splits add up to the totals of their authors.
GSEval, PBench and Ref-Adv-s: as their own pages state.

The manifest of a prepared data set: counts, hashes, skipped entries, and the data set's spec.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from amltrain.errors import UserError, first_line, unknown_name
from amltrain.files import load_json
from amltrain.registry import DATASETS, READERS

SPECIAL_KEYS = ("exist", "no_target", "source", "negative", "ignore")
"""Keys that change what a ref or a sentence means. A data set must list the ones that it uses."""


class Counts(NamedTuple):
    """refs: objects referred to; expressions: sentences; images. None where a published count is not known."""

    refs: int | None = None
    expressions: int | None = None
    images: int | None = None


FORM_NAMES = ("labelme", "cvat", "label-studio", "yolo", "coco", "voc", "fiftyone", "table", "folder", "hf")
"""Forms of own annotations, in `amltrain.data.sources.detect`; here, because a command line lists them quickly."""


class DatasetSpec(NamedTuple):
    """A data set: `<root>/<folder>/refs(<split_by>).p` (or grefs) and `instances.json` if the layout is "refer".

    published: what the full files hold, by split; empty for synthetic and own data. generalised: several targets or
    none. shares_images: training and evaluation images overlap. special_keys: those of SPECIAL_KEYS that the files use.
    metrics: further metrics that its papers report, registered in `amltrain.evaluation.metrics`. exact_splits: a ref
    belongs to the split of the same name only. image_folders: where its images lie, below the image root. stretch: some
    pictures as published have other proportions than their annotations state; the official code resizes both apart.
    synthetic: drawn by `amltrain.data.sources.shapes`. layout: "refer", "table" (own data), or a registered reader.
    box_only: the truth is boxes, so that `metrics` alone are reported. source: where its files are, for messages.
    """

    folder: str
    split_by: str
    splits: tuple[str, ...]
    published: dict[str, Counts] = {}  # noqa: RUF012 - never mutated
    generalised: bool = False
    shares_images: bool = False
    layout: str = "refer"
    special_keys: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    exact_splits: bool = False
    image_folders: tuple[str, ...] = ()
    stretch: bool = False
    synthetic: bool = False
    box_only: bool = False
    source: str = ""

    @property
    def refs_name(self) -> str:
        """File name of the referring expressions without its ending."""
        return f"{'grefs' if self.generalised and self.layout == 'refer' else 'refs'}({self.split_by})"

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """Every split but `train`."""
        return tuple(split for split in self.splits if split != "train")

    def has(self, ref_split: str, split: str) -> bool:
        """Whether a ref that the files file under `ref_split` belongs to `split`."""
        return ref_split == split if self.exact_splits else belongs(ref_split, split)

    def to_manifest(self) -> dict[str, Any]:
        """Return the spec for the manifest, so that commands do not need this table."""
        return {
            "splits": list(self.splits),
            "split_by": self.split_by,
            "generalised": self.generalised,
            "shares_images": self.shares_images,
            "layout": self.layout,
            "metrics": list(self.metrics),
            **({"box_only": True} if self.box_only else {}),
        }


_UNC = ("train", "val", "testA", "testB")
_UMD = ("train", "val", "test")
_GREF_KEYS = ("exist", "no_target")
_ROBUST = ("r", "rIoU", "target mIoU", "target oIoU")
_BOX = ("Acc@0.5", "Acc@0.75", "Acc@0.9")

_SPECS: dict[str, DatasetSpec] = {
    "refcoco": DatasetSpec(
        "refcoco",
        "unc",
        _UNC,
        {
            "train": Counts(42404, 120624, 16994),
            "val": Counts(3811, 10834, 1500),
            "testA": Counts(1975, 5657, 750),
            "testB": Counts(1810, 5095, 750),
        },
    ),
    "refcoco+": DatasetSpec(
        "refcoco+",
        "unc",
        _UNC,
        {
            "train": Counts(42278, 120191, 16992),
            "val": Counts(3805, 10758, 1500),
            "testA": Counts(1975, 5726, 750),
            "testB": Counts(1798, 4889, 750),
        },
    ),
    "refcocog": DatasetSpec(
        "refcocog",
        "umd",
        _UMD,
        {
            "train": Counts(42226, 80512, 21899),
            "val": Counts(2573, 4896, 1300),
            "test": Counts(5023, 9602, 2600),
        },
    ),
    "refcocog-google": DatasetSpec(
        "refcocog",
        "google",
        ("train", "val"),
        {"train": Counts(44822, 85474), "val": Counts(5000, 9536, 4650)},
        shares_images=True,
    ),
    "grefcoco": DatasetSpec("grefcoco", "unc", _UNC, generalised=True, special_keys=_GREF_KEYS),
    "refclef": DatasetSpec("refclef", "berkeley", _UMD, image_folders=("images/saiapr_tc-12", "saiapr_tc-12")),
    "refclef-unc": DatasetSpec(
        "refclef",
        "unc",
        ("train", "val", "testA", "testB", "testC"),
        image_folders=("images/saiapr_tc-12", "saiapr_tc-12"),
    ),
    "rrsis-d": DatasetSpec(
        "rrsisd",
        "unc",
        _UMD,
        {"train": Counts(expressions=12181), "val": Counts(expressions=1740), "test": Counts(expressions=3481)},
        image_folders=("images/rrsisd/JPEGImages", "JPEGImages"),
        stretch=True,
    ),
    "ref-zom": DatasetSpec(
        "ref-zom",
        "final",
        ("train", "test"),
        {"train": Counts(images=43749), "test": Counts(images=11329)},
        special_keys=("source",),
        metrics=("zero-target accuracy", "target mIoU", "target oIoU"),
        image_folders=("trainval2014", "images/trainval2014", "coco/trainval2014"),
    ),
    "r-refcoco": DatasetSpec("rrefcoco", "unc", _UNC, special_keys=("exist",), metrics=_ROBUST),
    "r-refcoco+": DatasetSpec("rrefcoco+", "unc", _UNC, special_keys=("exist",), metrics=_ROBUST),
    "r-refcocog": DatasetSpec("rrefcocog", "umd", _UMD, special_keys=("exist",), metrics=_ROBUST),
    "phrasecut": DatasetSpec(
        "VGPhraseCut_v0",
        "phrasecut",
        _UMD,
        {
            "train": Counts(expressions=310816, images=71746),
            "val": Counts(expressions=20316, images=2971),
            "test": Counts(expressions=14354, images=2545),
        },
        layout="phrasecut",
        exact_splits=True,
    ),
    "refcoco-m": DatasetSpec(
        "refcoco-m",
        "moondream",
        ("val",),
        {"val": Counts(2080, 5598, 1190)},
        layout="refcoco-m",
        exact_splits=True,
        source="moondream/refcoco-m on the Hub",
    ),
    "gseval": DatasetSpec(
        "GSEval",
        "gseval",
        ("test",),
        {"test": Counts(expressions=3800)},
        layout="gseval",
        exact_splits=True,
        metrics=("Acc@0.5",),
        source="hustvl/GSEval on the Hub, with COCO's unlabeled2017 images",
    ),
    "pbench": DatasetSpec(
        "PBench",
        "pbench",
        ("level_0", "level_1", "level_2", "level_3", "level_4", "dense"),
        {
            "level_0": Counts(expressions=1930),
            "level_1": Counts(expressions=1108),
            "level_2": Counts(expressions=969),
            "level_3": Counts(expressions=1089),
            "level_4": Counts(expressions=861),
            "dense": Counts(expressions=381),
        },
        generalised=True,
        layout="pbench",
        metrics=("zero-target accuracy",),
        exact_splits=True,
        source="tiiuae/PBench on the Hub",
    ),
    "ref-adv-s": DatasetSpec(
        "ref-adv-s",
        "ref-adv-s",
        ("test",),
        {"test": Counts(expressions=1142)},
        layout="ref-adv-s",
        exact_splits=True,
        metrics=_BOX,
        box_only=True,
        source="dddraxxx/ref-adv-s on the Hub",
    ),
    "nwpu-refer": DatasetSpec(
        "NWPU-Refer",
        "unc",
        _UMD,
        generalised=True,
        layout="nwpu-refer",
        special_keys=("no_target",),
        metrics=("target mIoU", "target oIoU"),
        image_folders=("NWPU-Refer/image/image", "NWPU-Refer/image", "image/image", "image"),
        source="the links of github.com/CVer-Yang/NWPU-Refer",
    ),
    "reasonseg": DatasetSpec(
        "ReasonSeg",
        "lisa",
        _UMD,
        {"train": Counts(images=239), "val": Counts(images=200), "test": Counts(images=779)},
        layout="reasonseg",
        exact_splits=True,
    ),
    "refsegrs": DatasetSpec(
        "RefSegRS",
        "refsegrs",
        _UMD,
        {"train": Counts(expressions=2172), "val": Counts(expressions=431), "test": Counts(expressions=1817)},
        layout="refsegrs",
        exact_splits=True,
    ),
    "refshapes": DatasetSpec("refshapes", "unc", _UNC, synthetic=True),
    "refshapes+": DatasetSpec("refshapes+", "unc", _UNC, synthetic=True),
    "refshapesg": DatasetSpec("refshapesg", "umd", _UMD, synthetic=True),
    "grefshapes": DatasetSpec("grefshapes", "unc", _UNC, generalised=True, special_keys=_GREF_KEYS, synthetic=True),
}

SUITES = {"out_of_domain": ("gseval", "pbench", "ref-adv-s", "nwpu-refer", "refcoco-m")}
"""Data sets that are scored in one table, by the name of the suite."""


def register_dataset(name: str, spec: DatasetSpec) -> None:
    """Add a data set to the table. Its files are read by the reader that `spec.layout` names."""
    if spec.layout not in READERS:
        raise unknown_name(f"layout of data set {name}", spec.layout, READERS.names())
    DATASETS.add(name, spec)


def dataset_spec(name: str) -> DatasetSpec:
    """The table's entry. Raises UserError for an unknown name, naming the right pair for `refcoco-umd` and the like.

    A data set of your own is not in the table; `amltrain.data.catalog.find_spec` also looks in the prepared folder.
    """
    if name in DATASETS:
        return DATASETS[name].value
    folder, _, split_by = name.rpartition("-")
    specs = {entry.name: entry.value for entry in DATASETS.entries()}
    pairs = {(spec.folder, spec.split_by): known for known, spec in specs.items()}
    if (folder, split_by) in pairs:
        raise UserError(f"{name!r} is called {pairs[folder, split_by]!r} here")
    of_folder = [f"{known} ({spec.split_by})" for known, spec in specs.items() if spec.folder == folder]
    if of_folder:
        raise UserError(f"{folder} has no split by {split_by!r}; it has {', '.join(of_folder)}")
    raise unknown_name("data set", name, specs)


def belongs(ref_split: str, split: str) -> bool:
    """The REFER rule: train and val by equality, testA and testB by letter (`testAB` is in both), test within."""
    if split in ("train", "val"):
        return ref_split == split
    if split == "test":
        return "test" in ref_split
    return "test" in ref_split and split[-1] in ref_split.removeprefix("test")


MANIFEST = "manifest.json"
_REQUIRED = {"format", "splits", "sources", "skipped"}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared data set; None if there is none. Raises UserError if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = load_json(path)
    if not isinstance(manifest, dict) or not manifest.keys() >= _REQUIRED:
        raise UserError(f"{path} is not a manifest of prepared data; remove {folder} and prepare it again")
    return manifest


def find_manifest(prepared: str, name: str) -> dict[str, Any] | None:
    """The manifest of a data set in a folder or a Hub data set; None if there is none. Raises UserError."""
    if Path(prepared).is_dir():
        return read_manifest(Path(prepared) / name)
    return _hub_manifest(prepared, name)


def fingerprint(manifest: Mapping[str, Any] | None, split: str) -> str:
    """What identifies the contents of a prepared split, wherever it lies; "" for data prepared before this was kept."""
    contents = (manifest or {}).get("contents")
    return str(contents.get(split, "")) if isinstance(contents, dict) else ""


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
            raise UserError(f"{error}{held}; prepare your own data with amltrain data prepare --table") from None
    return spec_of(manifest, f"{prepared}/{name}/{MANIFEST}")


def spec_of(manifest: dict[str, Any], place: str) -> DatasetSpec:
    """The spec that a manifest keeps. Raises UserError if it keeps none."""
    kept = manifest.get("spec")
    splits = kept.get("splits") if isinstance(kept, dict) else None
    if kept is None or not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise UserError(f"{place} does not state the splits of the data set; prepare it again")
    metrics = kept.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        raise UserError(f"{place} does not state the metrics of the data set; prepare it again")
    if not isinstance(kept.get("split_by", ""), str):
        raise UserError(f"{place}: spec.split_by is {kept['split_by']!r}, not a text; prepare it again")
    for key in ("generalised", "shares_images", "box_only"):
        if not isinstance(kept.get(key, False), bool):
            raise UserError(f"{place}: spec.{key} is {kept[key]!r}, not true or false; prepare it again")
    return DatasetSpec(
        folder=str(manifest.get("dataset", "")),
        split_by=str(kept.get("split_by", "")),
        splits=tuple(splits),
        generalised=bool(kept.get("generalised")),
        shares_images=bool(kept.get("shares_images")),
        layout="table",
        metrics=tuple(map(str, metrics)),
        exact_splits=True,
        box_only=bool(kept.get("box_only")),
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


for _name, _spec in _SPECS.items():
    register_dataset(_name, _spec)
