"""What large data cost: indexing a split, ordering an epoch, resuming late, and dealing batches to many processes.

    python launch/benchmark.py scale
    python launch/benchmark.py scale --images 2000 --draws 100000 --step 5000 --processes 8   # in seconds

Writes a data set of `--images` images with 2 referents each and 5 sentences in all to a temporary folder (its images
are a few bytes), and opens it in processes of their own: memory is what a process holds alone, beyond the imports.
Seconds are CPU time of one thread. Dealing is simulated with Accelerate's own sampler of a process, for `--steps`
optimizer steps of 8 samples per process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.rows import ROWS_PER_GROUP, SHOWN_FEATURES, open_rows
from amltrain.data.sampler import EpochSampler
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError, one_line_errors
from benchmarks.steps import measured_on

SENTENCES = (3, 2)
"""Sentences of the two referents of an image."""
PER_PROCESS = 8
Row = tuple[str, str, str, str]
"""What, how many, seconds, MiB."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("images", "draws", "step", "processes", "steps"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} is {getattr(options, name)} and must be at least 1")
        torch.set_num_threads(1)
        print(measured_on(torch.device("cpu")) + "\n")
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            rows = [*index_rows(Path(folder), options.images), *sampler_rows(options.draws, options.step)]
        rows += deal_rows(options.images, options.processes, options.steps)
        print("| what | how many | CPU seconds | MiB |\n|---|---|---|---|")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200_000, help="images of the data set (default: 200000)")
    parser.add_argument("--draws", type=int, default=10_000_000, help="samples per epoch (default: 10000000)")
    parser.add_argument("--step", type=int, default=500_000, help="step to resume at, of 16 samples (default: 500000)")
    parser.add_argument("--processes", type=int, default=64, help="processes to deal to (default: 64)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps to deal (default: 200)")
    return parser


def write_split(folder: Path, images: int) -> None:
    """Write one Parquet file of a split `train` of the data set `refcoco`."""
    group = [_row(number) for number in range(ROWS_PER_GROUP)]
    table = pa.Table.from_pylist(group, schema=SHOWN_FEATURES.arrow_schema)
    folder.mkdir(parents=True)
    with pq.ParquetWriter(folder / "train-00000-of-00001.parquet", table.schema, write_page_checksum=True) as writer:
        for first in range(0, images, ROWS_PER_GROUP):
            ids = pa.array(np.arange(first, min(first + ROWS_PER_GROUP, images)))
            writer.write_table(table.slice(0, len(ids)).set_column(0, table.schema.field(0), ids))


def _row(number: int) -> dict[str, Any]:
    referents = [
        {
            "ref_id": place,
            "ann_ids": [place],
            "category": "person",
            "bbox": [1.0, 2.0, 30.0, 40.0],
            "no_target": False,
            "mask": {"size": [480, 640], "counts": "0" * 250},  # the usual length in RefCOCO
            "mask_exclusive": None,
            "sentences": [{"sent_id": s, "sent": "the man on the left", "raw": "man on left"} for s in range(count)],
        }
        for place, count in enumerate(SENTENCES)
    ]
    name = f"COCO_train2014_{number:012d}.jpg"
    image = {"bytes": bytes(16), "path": name}
    return {
        "image_id": number,
        "file_name": name,
        "height": 480,
        "width": 640,
        "image": image,
        "referents": referents,
    }


def index_rows(folder: Path, images: int) -> list[Row]:
    """Time and memory of opening and indexing the split, mapped and streamed."""
    write_split(folder / "prepared/refcoco", images)
    found = []
    for streaming in (False, True):
        command = [
            sys.executable,
            "-m",
            "benchmarks.scale",
            "--index",
            str(folder / "prepared"),
            str(int(streaming)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(folder))
        if done.returncode:
            raise UserError(f"indexing failed: {done.stderr.strip().splitlines()[-1]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        what = f"index, {'streamed' if streaming else 'memory-mapped'}"
        count = f"{measured['expressions']:,} sentences of {images:,} images"
        found.append((what, count, f"{measured['seconds']:.1f}", f"{measured['mib']:.0f}"))
    return found


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def index_split(prepared: str, streaming: bool) -> None:
    """Open and index the split in this process; print what it took. The memory-mapped copy is made before, untimed."""
    tokenizer = SentenceTokenizer.train_wordpiece(["the man on the left"], 20)
    if not streaming:
        open_rows(prepared, "refcoco", "train")
    before, start = private_mib(), time.process_time()
    rows = open_rows(prepared, "refcoco", "train", streaming=streaming)
    dataset = ReferDataset([OpenSplit("refcoco", "train", rows)], ImageTransform(64), tokenizer)
    seconds, memory = time.process_time() - start, private_mib() - before
    print(json.dumps({"expressions": len(dataset), "seconds": seconds, "mib": memory}))


def private_mib() -> float:
    """Memory that this process alone holds, MiB; NaN where the system does not tell."""
    path = Path("/proc/self/smaps_rollup")
    if not path.is_file():
        return float("nan")
    kilobytes = [int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("Private_")]
    return sum(kilobytes) / 1024


def sampler_rows(draws: int, step: int) -> list[Row]:
    """Time of ordering an epoch, of a draw, and of the first draw after a resume."""
    sampler = EpochSampler([draws], seed=1, global_batch_size=16, total_steps=10**9)
    before, start = private_mib(), time.process_time()
    order = sampler.order(0)
    ordered, memory = time.process_time() - start, private_mib() - before
    del order
    drawn = iter(sampler)
    next(drawn)
    count = min(draws, 1_000_000)
    start = time.process_time()
    for _ in islice(drawn, count):
        pass
    each = (time.process_time() - start) / count
    resumed = EpochSampler([draws], seed=1, global_batch_size=16, total_steps=10**9, first_step=step)
    start = time.process_time()
    next(iter(resumed))
    return [
        ("order an epoch", f"{draws:,} draws", f"{ordered:.2f}", f"{memory:.0f}"),
        ("draw", f"{count:,} draws", f"{each * count:.2f}", ""),
        ("first draw after a resume", f"step {step:,}", f"{time.process_time() - start:.2f}", ""),
    ]


def deal_rows(images: int, processes: int, steps: int) -> list[Row]:
    """Samples and row groups that each process gets, mapped and streamed."""
    found = []
    sentences = images * sum(SENTENCES)
    groups = np.repeat(np.arange(images) // ROWS_PER_GROUP, sum(SENTENCES))
    for streaming in (False, True):
        sampler = EpochSampler(
            [sentences],
            seed=1,
            global_batch_size=PER_PROCESS * processes,
            total_steps=steps,
            row_groups=groups if streaming else None,
        )
        batches = list(BatchSampler(sampler, PER_PROCESS, drop_last=False))  # type: ignore[arg-type]  # of draws
        samples, read = [], []
        start = time.process_time()
        for process in range(processes):
            own = [draw.index for batch in BatchSamplerShard(batches, processes, process) for draw in batch]
            samples.append(len(own))
            read.append(len(np.unique(groups[own])))
        seconds = time.process_time() - start
        count = f"{processes} processes, {steps} steps: {_spread(samples)} samples"
        if streaming:
            count += f", {_spread(read)} row groups each"
        found.append((f"deal, {'streamed' if streaming else 'memory-mapped'}", count, f"{seconds:.2f}", ""))
    return found


def _spread(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--index"]:
        index_split(sys.argv[2], sys.argv[3] == "1")
    else:
        main()
