"""The one table of data sets: where their files lie, which splits they have, and how many of what there should be.

Counts: RefCOCO val/testA/testB and all expressions recounted from the files; training images after the literature.
"""

from typing import NamedTuple

from amltrain.errors import UserError, unknown_name


class Counts(NamedTuple):
    """refs: objects referred to; expressions: sentences; images."""

    refs: int
    expressions: int
    images: int | None = None


class DatasetSpec(NamedTuple):
    """A data set in the REFER layout: `<root>/<folder>/refs(<split_by>).p` (or grefs) and `instances.json`.

    published: what the full files hold, by split; empty for synthetic data.
    shares_images: training and evaluation images overlap.
    """

    folder: str
    split_by: str
    splits: tuple[str, ...]
    published: dict[str, Counts] = {}  # noqa: RUF012 - never mutated
    generalised: bool = False
    shares_images: bool = False

    @property
    def refs_name(self) -> str:
        """File name of the referring expressions without its ending."""
        return f"{'grefs' if self.generalised else 'refs'}({self.split_by})"

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split in self.splits if split != "train")


_UNC = ("train", "val", "testA", "testB")
_UMD = ("train", "val", "test")

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
    "grefcoco": DatasetSpec("grefcoco", "unc", _UNC, generalised=True),
    "refshapes": DatasetSpec("refshapes", "unc", _UNC),
    "refshapes+": DatasetSpec("refshapes+", "unc", _UNC),
    "refshapesg": DatasetSpec("refshapesg", "umd", _UMD),
    "grefshapes": DatasetSpec("grefshapes", "unc", _UNC, generalised=True),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The table's entry. Raises UserError for an unknown name, naming the right pair for `refcoco-umd` and the like."""
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


def check_split(name: str, split: str) -> None:
    """Raise UserError unless the data set has that split."""
    splits = dataset_spec(name).splits
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits)}")


def belongs(ref_split: str, split: str) -> bool:
    """The REFER rule: train and val by equality, testA and testB by letter (`testAB` is in both), test within."""
    if split in ("train", "val"):
        return ref_split == split
    if split == "test":
        return "test" in ref_split
    return "test" in ref_split and split[-1] in ref_split.removeprefix("test")
