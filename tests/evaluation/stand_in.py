"""A split and a model small enough to know every answer: 13 scenes of one bright rectangle on a dark ground."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from amltrain.data.loaders import collate
from amltrain.records import Batch, ModelOutput, Sample

SIZE = 24
COUNT = 13


class Info(NamedTuple):
    dataset: str
    split: str
    image_id: int
    ref_id: int
    sent_id: int
    sentence: str


class Scenes(Dataset):
    """Sample i: a rectangle; two sentences to a referent, two referents to an image; `empty` mean nothing."""

    def __init__(self, empty: tuple[int, ...] = (), original: tuple[int, int] = (SIZE, SIZE)) -> None:
        self.empty, self.original = empty, original

    def __len__(self) -> int:
        return COUNT

    def info(self, sample_id: int) -> Info:
        return Info("scenes", "val", sample_id // 4, sample_id // 2, sample_id, f"the bright one {sample_id}")

    def counts(self) -> dict[str, int]:
        return {"images": len({i // 4 for i in range(COUNT)}), "refs": len({i // 2 for i in range(COUNT)})}

    def describe(self) -> dict[str, str]:
        return {"mask_parts": "union"}

    def __getitem__(self, index: int) -> Sample:
        picture, truth = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
        picture[3 : 9 + index, 4:12] = 1
        if index not in self.empty:
            truth[3 : 9 + index // 2, 4:12] = 1
        height, width = self.original
        geometry = [height, width, SIZE / height, SIZE / width, 0, 0]
        original = nn.functional.interpolate(truth[None, None], self.original)[0, 0]
        return Sample(
            image=picture.expand(3, SIZE, SIZE),
            input_ids=torch.zeros(4, dtype=torch.int64),
            text_mask=torch.ones(4, dtype=torch.bool),
            target=(255 * truth).to(torch.uint8),
            no_target=torch.tensor(index in self.empty),
            sample_id=torch.tensor(index),
            random_key=torch.tensor(index),
            geometry=torch.tensor(geometry, dtype=torch.float64),
            original_target=(255 * original).to(torch.uint8),
        )


def loader(dataset: Scenes, batch_size: int = 4) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


class SeesBright(nn.Module):
    """Segments what is bright, at full size; optionally says "no target" for every third sample."""

    def __init__(self, head: bool = False, channels: int = 2) -> None:
        super().__init__()
        self.head, self.channels = head, channels
        self.norm = nn.BatchNorm2d(3)

    def forward(self, batch: Batch) -> ModelOutput:
        margin = 20 * (batch.image.mean(1, keepdim=True) - 0.5)
        logits = torch.cat([-margin / 2, margin / 2], dim=1) if self.channels == 2 else margin
        third = (batch.sample_id % 3 == 0).float()
        return ModelOutput(logits, {"no_target": torch.stack([1 - third, third], dim=1)} if self.head else {})
