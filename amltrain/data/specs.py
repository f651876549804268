"""The open table of data sets: one entry each with its folder, splits, published counts and special keys.

Counts: RefCOCO val, testA, testB and all expressions were recounted from the files; the others of RefCOCO, RefCOCO+
and RefCOCOg are in official code or papers. PhraseCut, ReasonSeg and RefCOCO-M: as their authors' pages state.
RRSIS-D, Ref-ZOM and RefSegRS: as other papers and catalogues state; the splits add up to the totals of their authors.
"""

from typing import Any, Literal, NamedTuple

from amltrain.errors import UserError, unknown_name

Layout = Literal["refer", "phrasecut", "refcoco-m", "reasonseg", "refsegrs", "table"]
"""Which reader understands the files: REFER's own, one in `amltrain.data.readers`, or a table of your own."""

SPECIAL_KEYS = ("exist", "no_target", "source", "negative", "ignore")
"""Keys that change what a ref or a sentence means. A data set must list the ones that it uses."""


class Counts(NamedTuple):
    """refs: objects referred to; expressions: sentences; images. None where a published count is not known."""

    refs: int | None = None
    expressions: int | None = None
    images: int | None = None


class DatasetSpec(NamedTuple):
    """A data set: `<root>/<folder>/refs(<split_by>).p` (or grefs) and `instances.json` if the layout is "refer".

    published: what the full files hold, by split; empty for synthetic and own data. generalised: several targets or
    none. shares_images: training and evaluation images overlap. special_keys: those of SPECIAL_KEYS that the files use.
    metrics: further metrics that its papers report, registered in `amltrain.evaluation.metrics`. exact_splits: a ref
    belongs to the split of the same name only. image_folders: where its images lie, below the image root.
    """

    folder: str
    split_by: str
    splits: tuple[str, ...]
    published: dict[str, Counts] = {}  # noqa: RUF012 - never mutated
    generalised: bool = False
    shares_images: bool = False
    layout: Layout = "refer"
    special_keys: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    exact_splits: bool = False
    image_folders: tuple[str, ...] = ()

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
        }


_UNC = ("train", "val", "testA", "testB")
_UMD = ("train", "val", "test")
_GREF_KEYS = ("exist", "no_target")
_ROBUST = ("r", "rIoU", "target mIoU", "target oIoU")

DATASETS: dict[str, DatasetSpec] = {
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
        "refcoco-m", "moondream", ("val",), {"val": Counts(2080, 5598, 1190)}, layout="refcoco-m", exact_splits=True
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
    "refshapes": DatasetSpec("refshapes", "unc", _UNC),
    "refshapes+": DatasetSpec("refshapes+", "unc", _UNC),
    "refshapesg": DatasetSpec("refshapesg", "umd", _UMD),
    "grefshapes": DatasetSpec("grefshapes", "unc", _UNC, generalised=True, special_keys=_GREF_KEYS),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The table's entry. Raises UserError for an unknown name, naming the right pair for `refcoco-umd` and the like.

    A data set of your own is not in the table; `amltrain.data.manifest.find_spec` also looks in the prepared folder.
    """
    if name in DATASETS:
        return DATASETS[name]
    folder, _, split_by = name.rpartition("-")
    pairs = {(spec.folder, spec.split_by): known for known, spec in DATASETS.items()}
    if (folder, split_by) in pairs:
        raise UserError(f"{name!r} is called {pairs[folder, split_by]!r} here")
    of_folder = [f"{known} ({spec.split_by})" for known, spec in DATASETS.items() if spec.folder == folder]
    if of_folder:
        raise UserError(f"{folder} has no split by {split_by!r}; it has {', '.join(of_folder)}")
    raise unknown_name("data set", name, DATASETS)


def belongs(ref_split: str, split: str) -> bool:
    """The REFER rule: train and val by equality, testA and testB by letter (`testAB` is in both), test within."""
    if split in ("train", "val"):
        return ref_split == split
    if split == "test":
        return "test" in ref_split
    return "test" in ref_split and split[-1] in ref_split.removeprefix("test")
