"""Encode once: how many expressions a second each model segments, with and without encoding every image once.

    python launch/benchmark.py sentences --models caris_tiny cris_tiny --sentences 7

One image with several sentences, in evaluation mode, float32, random weights and random data. Both ways take turns in
one run. Figures are medians over rounds: seconds of CPU time on a CPU, so that other programs change them little, and
of the clock on a GPU. GFLOP are counted, for one expression. `--count` only counts, in seconds and at any size.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from amltrain.environment import choose_device
from amltrain.errors import UserError, one_line_errors
from amltrain.evaluation.evaluator import ImageCache
from amltrain.models import create_model, list_models, model_builder, model_info
from amltrain.models.base import RISModel
from amltrain.records import Batch
from benchmarks.steps import measured_on, random_batch


class Sharing(NamedTuple):
    """One model. gflop: of an expression, without and with sharing. Only where timed, otherwise None:

    per_second: expressions, without and with; ratio: median of every round's; difference: the largest of the logits.
    """

    model: str
    size: int
    gflop: tuple[float, float]
    per_second: tuple[float, float] | None = None
    ratio: float | None = None
    difference: float | None = None


class OneImage:
    """The part of a data set that `ImageCache` reads: all samples show one image."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def image_groups(self) -> NDArray[np.int64]:
        return np.zeros(self.samples, np.int64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("sentences", "rounds", "threads"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} is {getattr(options, name)} and must be at least 1")
        for name in options.models:
            model_builder(name)  # unknown names are rejected before the first model runs
        torch.set_num_threads(options.threads)
        device = choose_device(options.device)
        print(f"{options.sentences} sentences an image, float32; {measured_on(device)}\n")
        print("| model | px | GFLOP | shared | x | expressions/s | shared | x | largest difference |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        for name in options.models:
            print(row(measure(name, options.sentences, 0 if options.count else options.rounds, device)), flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Build the options of `launch/benchmark.py sentences`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py sentences",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    small = [name for name in list_models() if name.endswith("_tiny") and "swin" not in name]
    parser.add_argument("--models", nargs="+", default=small, help="registered models (default: the tiny ones)")
    parser.add_argument("--sentences", type=int, default=7, help="of the image (default: 7, as RefCOCO val has)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--count", action="store_true", help="only count FLOPs; nothing is timed")
    return parser


def measure(name: str, sentences: int, rounds: int, device: torch.device) -> Sharing:
    """Count and time one model. rounds: 0 = only count."""
    size = int(model_info(name).preprocess.size or 0)
    if not rounds:
        return Sharing(name, size, count(name, sentences))
    torch.manual_seed(0)
    model = create_model(name).to(device).eval()
    batch = one_image(name, sentences, device)
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        difference = float((forward(model, batch, False) - forward(model, batch, True)).abs().max())
        for _ in range(rounds):
            for shared in (False, True):
                start = _clock(device)
                forward(model, batch, shared)
                seconds[shared].append(_clock(device) - start)
    alone, once = (sentences / statistics.median(values) for values in seconds)
    ratio = statistics.median(slow / fast for slow, fast in zip(*seconds, strict=True))
    # last: SAM 3 in transformers keeps tensors between calls, and must not keep those without data
    return Sharing(name, size, count(name, sentences), (alone, once), ratio, difference)


def forward(model: RISModel, batch: Batch, shared: bool) -> torch.Tensor:
    """Logits of a batch whose samples show one image. shared: encode it once, where the model can."""
    if not (shared and model.encodes_image_alone):
        return model(batch).logits
    return ImageCache(model, OneImage(len(batch.image)))(batch, batch).logits


def one_image(name: str, sentences: int, device: torch.device) -> Batch:
    """A random batch in which every sample shows the first one's image."""
    preprocess = model_info(name).preprocess
    assert preprocess.size is not None
    batch = random_batch(sentences, preprocess.size, preprocess.max_tokens or 20, 500, device)
    return batch._replace(image=batch.image[:1].expand_as(batch.image).contiguous())


def count(name: str, sentences: int) -> tuple[float, float]:
    """GFLOP of one expression without and with sharing, counted on tensors without data."""
    with torch.device("meta"):
        model = create_model(name).eval()
    counted = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = model.to_empty(device="cpu").requires_grad_(False)  # the counter hooks what has a gradient
        batch = one_image(name, sentences, torch.device("cpu"))
        for whole in (True, False):
            with FlopCounterMode(display=False) as counter:
                if whole:
                    model(batch)
                elif model.encodes_image_alone:
                    maps = model.encode_image(batch.image[:1])
                    copies = tuple(m.expand(sentences, *m.shape[1:]) for m in maps)
                    model.decode(model.encode_with_image(batch, copies), batch)
            counted.append(counter.get_total_flops() / sentences / 1e9)
    return counted[0], counted[1] or counted[0]


def row(found: Sharing) -> str:
    """One line of the table."""
    alone, once = found.gflop
    cells = [found.model, str(found.size), f"{alone:.2f}", f"{once:.2f}", f"{alone / once:.2f}"]
    if found.per_second is None:
        cells += ["-"] * 4
    else:
        slow, fast = found.per_second
        cells += [f"{slow:.2f}", f"{fast:.2f}", f"{found.ratio:.2f}", f"{found.difference:.1e}"]
    return "| " + " | ".join(cells) + " |"


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
