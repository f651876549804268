"""Parts that most tests need."""

from typing import Any

from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.rows import open_rows
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform


def word_tokenizer(max_tokens: int = 12) -> SentenceTokenizer:
    words = ["the on left right top bottom small big plain striped dotted red green blue yellow purple white"]
    return SentenceTokenizer.train_wordpiece([*words, "square circle triangle star"], max_tokens)


def shapes_dataset(
    prepared: str,
    split: str = "train",
    names: tuple[str, ...] = ("refshapes",),
    *,
    streaming: bool = False,
    **options: Any,
) -> ReferDataset:
    parts = [OpenSplit(name, split, open_rows(prepared, name, split, streaming=streaming)) for name in names]
    return ReferDataset(parts, ImageTransform(32), word_tokenizer(), **options)
