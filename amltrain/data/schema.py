"""The prepared form: one row per image, its referents nested, so that image bytes are stored once."""

from typing import Any, Literal

from datasets import Features, Image, Sequence, Value

_RLE = {"size": Sequence(Value("int32")), "counts": Value("string")}

FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "height": Value("int32"),
        "width": Value("int32"),
        "image": Image(decode=False),  # the file's own bytes; decoded once, where a sample is made
        "referents": [
            {
                "ref_id": Value("int64"),
                "ann_ids": Sequence(Value("int64")),
                "category": Value("string"),
                "bbox": Sequence(Value("float32")),  # x, y, width, height in pixels; of all annotations together
                "no_target": Value("bool"),
                "mask": _RLE,
                "mask_exclusive": _RLE,  # null unless parts of the object overlap
                "sentences": [{"sent_id": Value("int64"), "sent": Value("string"), "raw": Value("string")}],
            }
        ],
    }
)

MaskParts = Literal["union", "exclusive"]


def choose_rle(referent: dict[str, Any], mask_parts: MaskParts) -> dict[str, Any]:
    """Choose the run lengths of a referent's mask. exclusive: without the pixels that several polygons cover."""
    exclusive = referent["mask_exclusive"]
    if mask_parts == "exclusive" and exclusive is not None and exclusive["counts"] is not None:
        return exclusive
    return referent["mask"]
