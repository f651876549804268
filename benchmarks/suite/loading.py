"""Samples per second of the training's loader."""

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from amltrain.config.schema import DataConfig
from amltrain.data.dataset import OpenSplit, ReferDataset, read_sentences
from amltrain.data.loaders import build_train_loader
from amltrain.data.prepare import available_cores, prepare_files
from amltrain.data.rows import open_rows
from amltrain.data.sources.table import read_table
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform, prepare_batch
from amltrain.environment import choose_device

BATCH = 16
IMAGES = 32
NAME = "generated"


def loader(*, device: str, size: int, seconds: float = 2.5) -> dict[str, Any]:
    """Rates by decoder and number of loader processes, with the copy to the device and the normalisation there.

    Pictures are generated: clouds of noise with the file size of photographs, 640 x 480. seconds: of every measurement,
    after the batches that were loaded ahead.
    """
    chosen = choose_device(device)
    counts = sorted({count for count in (0, 1, 2, 4, 8, 16, available_cores()) if count <= available_cores()})
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        size_of_files = _prepare(Path(folder))
        rows = open_rows(folder, NAME, "train")
        tokenizer = SentenceTokenizer.train_wordpiece(read_sentences(rows, "sent"), 20)
        transform = ImageTransform(size, "square", "imagenet")
        found = []
        for decoder in ("pil", "torchvision"):
            dataset = ReferDataset([OpenSplit(NAME, "train", rows)], transform, tokenizer, decoder=decoder)  # type: ignore[arg-type]
            for workers in counts:
                rate = _rate(dataset, workers, chosen, seconds)
                found.append({"decoder": decoder, "workers": workers, "rate": rate})
    return {"size": size, "batch": BATCH, "file_bytes": size_of_files, "rows": found}


def _rate(dataset: ReferDataset, workers: int, device: torch.device, seconds: float) -> float:
    made = build_train_loader(
        dataset,
        DataConfig(workers=workers),
        seed=0,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        total_steps=1_000_000,
        first_step=0,
    )
    batches = iter(made)
    for _ in range(2 * workers + 1):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        batch = next(batches).mapped(lambda part: part.to(device, non_blocking=True))
        prepare_batch(batch, dataset.transform.normalization)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return BATCH * count / (time.perf_counter() - start)


def _prepare(folder: Path) -> int:
    """Write and prepare generated pictures; return their mean file size in bytes."""
    generator = torch.Generator().manual_seed(0)
    images, lines, total = folder / "images", [], 0
    images.mkdir()
    for number in range(IMAGES):
        content = _photograph(generator)
        (images / f"{number}.jpg").write_bytes(content)
        total += len(content)
        polygon = [100, 100, 400, 120, 420, 380, 260, 420, 90, 300]
        row = {"image": f"{number}.jpg", "sentence": "the cloud in the middle", "mask": [polygon], "split": "train"}
        lines.append(json.dumps(row))
    table = folder / "table.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    prepare_files(read_table(table, images, NAME), folder, images, progress=False)
    return total // IMAGES


def _photograph(generator: torch.Generator) -> bytes:
    """Noise at every scale, as a JPEG."""
    total = torch.full((1, 3, 480, 640), 128.0)
    for cells in (4, 16, 64, 160, 640):
        noise = torch.randn(1, 3, cells * 3 // 4, cells, generator=generator)
        total += F.interpolate(noise, (480, 640), mode="bilinear") * 200 / cells**0.5
    file = io.BytesIO()
    pixels = total[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
