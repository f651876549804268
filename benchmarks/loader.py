"""How fast samples load: this package's ways side by side with loaders like those of the official codes, in one run.

    python launch/benchmark.py loader --prepared prepared --dataset refcoco --size 448

Every contender makes the same batches of 16 (image, tokens, mask) in this process, on one thread, in interleaved
rounds; the figure is samples per second of CPU time, so other programs on the machine change it little. Files are read
before: the disk is not measured.

official-like  the loading of CARIS and LAVT (square) or of CRIS, ETRIS and DETRIS (letterbox), written for
               this benchmark: Pillow, or OpenCV 4 (left out where `pip install "opencv-python<5"` was not run);
               float32 images normalised per sample. Masks come from run lengths or PNGs in memory.
float          this package's default, with images normalised per sample as float32
pil            this package's default
torchvision    data.decoder: torchvision
presized       data.presized: written to a temporary folder first
"""

import argparse
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor

from amltrain.data.cache import PresizedImages, write_presized
from amltrain.data.dataset import OpenSplit, ReferDataset, read_sentences
from amltrain.data.images import Decoder
from amltrain.data.loaders import collate
from amltrain.data.rows import Rows, open_rows
from amltrain.data.segmentation import decode_rle
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import MEAN_STD, ImageTransform, Normalization, Resize, normalise
from amltrain.errors import UserError, one_line_errors
from amltrain.records import Batch
from benchmarks.steps import measured_on

Make = Callable[[list[int]], object]
"""Makes one batch of the samples with these indices."""
BATCH = 16


class Original(NamedTuple):
    """What an official data loader finds on the disk for one sample."""

    image: bytes
    mask: dict[str, Any]
    mask_png: bytes
    sentence: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("size", "rounds", "samples"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} is {getattr(options, name)} and must be at least 1")
        torch.set_num_threads(1)
        rows = open_rows(options.prepared, options.dataset, options.split)
        print(f"{options.dataset}/{options.split}, {options.size} px, one thread; {measured_on(torch.device('cpu'))}\n")
        for resize in ("square", "letterbox"):
            made = contenders(rows, options.size, resize)
            print(table(resize, measure(made, options.samples, options.rounds)) + "\n")


def contenders(rows: Rows, size: int, resize: Resize) -> dict[str, Make]:
    """Ways to load the samples of one split, the official-like one first where it can run."""
    normalization: Normalization = "imagenet" if resize == "square" else "clip"
    transform = ImageTransform(size, resize, normalization)
    tokenizer = SentenceTokenizer.train_wordpiece(read_sentences(rows, "sent"), 20)

    def dataset(decoder: Decoder = "pil", presized: PresizedImages | None = None) -> ReferDataset:
        return ReferDataset([OpenSplit("data", "split", rows, presized)], transform, tokenizer, decoder=decoder)

    pil, torchvision, sized = dataset(), dataset("torchvision"), dataset(presized=_presized(rows, transform))
    made: dict[str, Make] = {}
    official = _official_square(transform) if resize == "square" else _official_letterbox(transform)
    if official is not None:
        files = [_original(pil, index) for index in range(len(pil))]
        made["official-like"] = lambda chosen: _official_batch([files[i] for i in chosen], official, tokenizer)
    made["float"] = lambda chosen: _float_batch(pil, chosen, normalization)
    for name, source in (("pil", pil), ("torchvision", torchvision), ("presized", sized)):
        made[name] = partial(_collated, source)
    return {name: _cycled(make, len(pil)) for name, make in made.items()}


def measure(made: dict[str, Make], samples: int, rounds: int) -> dict[str, list[float]]:
    """Samples per CPU second of every contender in every round. A first, unmeasured batch fills caches."""
    order = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        chosen = [order.randrange(1 << 30) for _ in range(samples if number else BATCH)]
        for name, make in made.items():
            start = time.process_time()
            for first in range(0, len(chosen), BATCH):
                make(chosen[first : first + BATCH])
            if number:
                rates[name].append(len(chosen) / (time.process_time() - start))
    return rates


def table(resize: str, rates: dict[str, list[float]]) -> str:
    """Markdown: medians over rounds, and the median of every round's ratio to the first contender."""
    first = next(iter(rates))
    lines = [f"| {resize} | samples/s per core | x {first} |", "|---|---|---|"]
    for name, values in rates.items():
        ratio = statistics.median(own / other for own, other in zip(values, rates[first], strict=True))
        lines.append(f"| {name} | {statistics.median(values):.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepared", default="prepared", help="folder with the prepared data (default: prepared)")
    parser.add_argument("--dataset", default="refcoco", help="a prepared data set (default: refcoco)")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--size", type=int, default=448, help="side of the network input, pixels (default: 448)")
    parser.add_argument("--samples", type=int, default=128, help="samples per round (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    return parser


def _collated(source: ReferDataset, chosen: Sequence[int]) -> Batch:
    return collate([source[i] for i in chosen])


def _presized(rows: Rows, transform: ImageTransform) -> PresizedImages:
    """Presized images in a temporary folder that stays until the program ends."""
    folder = tempfile.TemporaryDirectory(prefix="presized-")
    written = write_presized(folder.name, "data", "split", rows, transform, progress=False)
    images = PresizedImages(written)
    images.keep_alive = folder  # type: ignore[attr-defined]  # deleted with the images
    return images


def _cycled(make: Make, length: int) -> Make:
    return lambda chosen: make([index % length for index in chosen])


def _float_batch(dataset: ReferDataset, chosen: list[int], normalization: Normalization) -> object:
    samples = [dataset[index] for index in chosen]
    return collate([s._replace(image=normalise(s.image, normalization)) for s in samples])


def _original(dataset: ReferDataset, index: int) -> Original:
    number, row, _ = dataset._place(index)
    referent = dataset._referent(index)
    png = io.BytesIO()
    Image.fromarray(decode_rle(referent["mask"]) * np.uint8(255)).save(png, "PNG")
    image = dataset.splits[number].rows.image_bytes(row)
    rle = referent["mask"]
    return Original(image, {**rle, "counts": rle["counts"].encode()}, png.getvalue(), dataset.info(index).sentence)


def _official_batch(
    files: list[Original], load: Callable[[Original], tuple[Tensor, Tensor]], tokenizer: SentenceTokenizer
) -> object:
    loaded = [(*load(file), *tokenizer(file.sentence)) for file in files]
    return [torch.stack(column) for column in zip(*loaded, strict=True)]


def _official_square(transform: ImageTransform) -> Callable[[Original], tuple[Tensor, Tensor]]:
    """Pillow to a square, float tensors by torchvision's functions, one sample at a time."""
    from torchvision.transforms import functional

    mean, std = MEAN_STD[transform.normalization]
    side = (transform.size, transform.size)

    def load(file: Original) -> tuple[Tensor, Tensor]:
        image = Image.open(io.BytesIO(file.image)).convert("RGB")
        mask = Image.fromarray(coco.decode(file.mask), mode="P")
        image, mask = image.resize(side, Image.Resampling.BILINEAR), mask.resize(side, Image.Resampling.NEAREST)
        tensor = functional.normalize(functional.to_tensor(image), list(mean), list(std))
        return tensor, torch.as_tensor(np.asarray(mask).copy(), dtype=torch.int64)

    return load


def _official_letterbox(transform: ImageTransform) -> Callable[[Original], tuple[Tensor, Tensor]] | None:
    """OpenCV from JPEG and PNG to a warped pair, normalised one sample at a time; None without OpenCV 4."""
    try:
        import cv2
    except ImportError:
        return None
    if not cv2.__version__.startswith("4."):
        return None
    cv2.setNumThreads(1)
    size = transform.size
    mean, std = (torch.tensor(values)[:, None, None] for values in MEAN_STD[transform.normalization])
    border = [255 * value for value in MEAN_STD[transform.normalization][0]]

    def load(file: Original) -> tuple[Tensor, Tensor]:
        image = cv2.cvtColor(cv2.imdecode(np.frombuffer(file.image, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        mask = cv2.imdecode(np.frombuffer(file.mask_png, np.uint8), cv2.IMREAD_GRAYSCALE)
        matrix = _affine(cv2, image.shape[0], image.shape[1], size)
        warped = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC, borderValue=border)
        covered = cv2.warpAffine(mask, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0.0)
        pixels = torch.from_numpy(warped.transpose(2, 0, 1)).float().div_(255).sub_(mean).div_(std)
        return pixels, torch.from_numpy(covered / 255.0).float()

    return load


def _affine(cv2: Any, height: int, width: int, size: int) -> NDArray[np.float64]:
    scale = min(size / height, size / width)
    x, y = (size - scale * width) / 2, (size - scale * height) / 2
    source = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    target = np.array([[x, y], [x + scale * width, y], [x, y + scale * height]], np.float32)
    return cv2.getAffineTransform(source, target)


if __name__ == "__main__":
    main()
