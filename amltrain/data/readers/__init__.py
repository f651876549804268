"""Readers of data sets that are not in the REFER layout, one file each: (root, name) -> Annotations."""

from collections.abc import Callable
from pathlib import Path

from amltrain.data.annotations import Annotations
from amltrain.data.readers.phrasecut import read_phrasecut
from amltrain.data.readers.reasonseg import read_reasonseg
from amltrain.data.readers.refcoco_m import read_refcoco_m
from amltrain.data.readers.refsegrs import read_refsegrs

READERS: dict[str, Callable[[Path, str], Annotations]] = {
    "phrasecut": read_phrasecut,
    "reasonseg": read_reasonseg,
    "refcoco-m": read_refcoco_m,
    "refsegrs": read_refsegrs,
}
"""By `DatasetSpec.layout`."""
