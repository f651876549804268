"""Time and count training steps: what `python launch/benchmark.py` does after its arguments are read."""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from amltrain.environment import choose_device, processor_name
from amltrain.errors import UserError
from amltrain.evaluation.results import write_text
from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import Method, build_method
from amltrain.models import create_model, model_info
from amltrain.randomness import random_key
from amltrain.records import Batch
from amltrain.training.optim import build_optimizer

STAGES = ("stage 1", "forward", "backward", "optimizer")


Precision = Literal["fp32", "bf16", "fp16"]


AUTOCAST: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


STAGE_ONE = ("score", "blocks", "masked_image")


class Timing(NamedTuple):
    """Seconds of one step by stage; `forward` is without stage 1."""

    stages: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.stages)


class Contender(NamedTuple):
    """A training method by name, and its options; None = the defaults."""

    method: str
    options: Any = None


class Result(NamedTuple):
    """A contender's median step in seconds, its ratio to the baseline, each stage's share, peak bytes or None."""

    name: str
    seconds: float
    ratio: float
    shares: tuple[float, ...]
    memory: int | None


def contenders(size: int, stage1_size: int | None = None) -> dict[str, Contender]:
    """Return the steps to compare, the baseline first. size: side of the input; stage1_size: by default half of it."""
    stage1_size = stage1_size or size // 2
    return {
        "baseline": Contender("supervised"),
        "paper": Contender("aml", AMLOptions(preset="paper")),
        f"paper, stage1_size {stage1_size}": Contender("aml", AMLOptions(preset="paper", stage1_size=stage1_size)),
        "released": Contender("aml", AMLOptions(preset="released")),
    }


class Bench:
    """Times training steps of several tasks that share one model and one optimizer."""

    def __init__(
        self,
        tasks: dict[str, Method],
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        precision: Precision = "fp32",
    ) -> None:
        """tasks: by name, the baseline first."""
        self.tasks, self.optimizer, self.batch = tasks, optimizer, batch
        self.device, self.dtype = batch.image.device, AUTOCAST[precision]
        # where the usual 65536 overflows, steps are skipped and cost less than they do in training
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=precision == "fp16")

    def run(self, rounds: int, warmup: int = 1) -> list[Result]:
        """Warm up, time `rounds` interleaved rounds, measure memory."""
        timings: dict[str, list[Timing]] = {name: [] for name in self.tasks}
        memory = {}
        steps = (warmup + rounds + 1) * len(self.tasks)
        with tqdm(total=steps, unit="step", desc="benchmark", leave=False, disable=None) as progress:
            for number in range(warmup + rounds):
                for name, task in self.tasks.items():
                    timing = self.step(task)
                    if number >= warmup:
                        timings[name].append(timing)
                    progress.update()
            for name, task in self.tasks.items():
                memory[name] = self.peak_memory(task)
                progress.update()
        baseline = next(iter(timings.values()))
        return [summarise(name, timings[name], baseline, memory[name]) for name in self.tasks]

    def step(self, task: Method) -> Timing:
        """Run one training step, timed by stage."""
        with stage_one_clock(task, self.clock) as stage_one:
            start = self.clock()
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                result = task(self.batch)
            forward = self.clock()
        self.scaler.scale(result["loss"]).backward()
        backward = self.clock()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        end = self.clock()
        return Timing((stage_one[0], forward - start - stage_one[0], backward - forward, end - backward))

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_memory(self, task: Method) -> int | None:
        """Bytes in use at the peak of one step; None where this system does not tell."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(task)
            return torch.cuda.max_memory_allocated(self.device)
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds would count
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except (OSError, AttributeError):
            return None
        self.step(task)
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


@contextmanager
def stage_one_clock(task: nn.Module, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Adds up the seconds that AML spends on scores, blocks and masking; yields a list of that one number."""
    seconds = [0.0]

    def timed(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            start = clock()
            result = method(*arguments)
            seconds[0] += clock() - start
            return result

        return call

    names = [name for name in STAGE_ONE if hasattr(task, name)]
    for name in names:
        setattr(task, name, timed(getattr(task, name)))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(task, name)


def summarise(name: str, timings: Sequence[Timing], baseline: Sequence[Timing], memory: int | None) -> Result:
    """Medians over rounds."""
    total = statistics.median(t.total for t in timings)
    ratio = statistics.median(own.total / other.total for own, other in zip(timings, baseline, strict=True))
    stages = [statistics.median(t.stages[i] for t in timings) for i in range(len(STAGES))]
    return Result(name, total, ratio, tuple(s / sum(stages) for s in stages), memory)


def random_batch(batch: int, size: int, tokens: int, vocab_size: int, device: torch.device) -> Batch:
    """Normal noise with a square referent; sentences of 5 to `tokens` tokens."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(batch, size, size, dtype=torch.uint8)
    target[:, size // 4 : size // 2, size // 4 : size // 2] = 255
    lengths = torch.randint(min(5, tokens), tokens + 1, (batch, 1), generator=generator)
    parts = Batch(
        image=torch.randn(batch, 3, size, size, generator=generator),
        input_ids=torch.randint(1, vocab_size, (batch, tokens), generator=generator),
        text_mask=torch.arange(tokens).expand(batch, -1) < lengths,
        target=target,
        no_target=torch.zeros(batch, dtype=torch.bool),
        sample_id=torch.arange(batch),
        random_key=torch.tensor([random_key(0, 0, i) for i in range(batch)]),
        geometry=torch.tensor([[size, size, 1.0, 1.0, 0.0, 0.0]] * batch, dtype=torch.float64),
    )
    return parts.mapped(lambda part: part.to(device))


def count_flops(model_name: str, size: int, configs: dict[str, Contender]) -> dict[str, float]:
    """FLOPs (2 per multiply-add) of one sample's training step by contender, on tensors without data.

    Counted are matrix products, convolutions and attention, as torch's counter does; in a step of two samples, as some
    models' batch norm cannot train on one.
    """
    samples = 2
    info = model_info(model_name)
    with torch.device("meta"):
        model = create_model(model_name).train()
    counted = {}
    with FakeTensorMode(allow_non_fake_inputs=True):  # autocast knows no device "meta"
        model = model.to_empty(device="cpu")
        loss = create_loss(info.loss, **info.loss_kwargs)
        data = random_batch(samples, size, info.preprocess.max_tokens or 20, 500, torch.device("cpu"))
        for name, contender in configs.items():
            task = build_method(contender.method, model, loss, contender.options)
            with FlopCounterMode(display=False) as counter:
                task(data)["loss"].backward()
            counted[name] = counter.get_total_flops() / samples
    return counted


def build_bench(
    model_name: str, configs: dict[str, Contender], *, batch: int, size: int, precision: Precision, device: torch.device
) -> Bench:
    """Contenders around one model and one optimizer."""
    info = model_info(model_name)
    torch.manual_seed(0)
    model = create_model(model_name).to(device).train()
    groups = model.param_groups(1e-6, 0.01)
    optimizer = build_optimizer(groups, "adamw", lr=1e-6, betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
    loss = create_loss(info.loss, **info.loss_kwargs).to(device)
    data = random_batch(batch, size, info.preprocess.max_tokens or 20, 500, device)
    tasks = {}
    for name, contender in configs.items():
        task = build_method(contender.method, model, loss, contender.options).to(device)
        task.setup([data])
        tasks[name] = task
    return Bench(tasks, optimizer, data, precision)


@contextmanager
def too_few_samples_rejected(batch: int) -> Iterator[None]:
    """Batch norm's error for a single value per channel as a UserError: which models raise it only running tells."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(f"this model's batch norm cannot train on --batch {batch}; use --batch 2 or more") from error


def table(results: Sequence[Result], batch: int) -> str:
    """Markdown: one row per contender."""
    baseline = results[0].memory
    lines = [
        "| step | ms | images/s | x baseline | peak MiB | x baseline | " + " | ".join(STAGES) + " |",
        "|---" * (6 + len(STAGES)) + "|",
    ]
    for r in results:
        memory = "-" if r.memory is None else f"{r.memory / 2**20:.0f}"
        times = "-" if r.memory is None or not baseline else f"{r.memory / baseline:.3f}"
        shares = " | ".join(f"{share:.1%}" for share in r.shares)
        lines.append(
            f"| {r.name} | {1000 * r.seconds:.1f} | {batch / r.seconds:.3f} | {r.ratio:.3f} | {memory} | {times} "
            f"| {shares} |"
        )
    return "\n".join(lines)


def counted_table(flops: dict[str, float]) -> str:
    """Markdown: GFLOP of one sample's step, and their ratio to the baseline."""
    baseline = next(iter(flops.values()))
    lines = ["| step | GFLOP a sample | x baseline |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {n} | {f / 1e9:.1f} | {f / baseline:.3f} |" for n, f in flops.items())])


def measured_on(device: torch.device) -> str:
    """Describe processor, threads and versions in one line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def check_ranges(options: argparse.Namespace) -> None:
    """Raise UserError naming the first flag whose number is too small; None is a default."""
    smallest = {"size": 2, "batch": 1, "stage1_size": 1, "rounds": 1, "warmup": 0, "threads": 1}
    for name, least in smallest.items():
        given = getattr(options, name)
        if given is not None and given < least:
            raise UserError(f"--{name.replace('_', '-')} is {given}, but must be at least {least}")


def run(options: argparse.Namespace) -> None:
    """Check the options, then time or count, and print the table."""
    check_ranges(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    size = options.size or model_info(options.model).preprocess.size or 448
    configs = contenders(size, options.stage1_size)
    if options.count:
        print(f"{options.model}, {size} px, one sample, forward and backward")
        flops = count_flops(options.model, size, configs)
        print(counted_table(flops))
        baseline = next(iter(flops.values()))
        write_json(options, size, {n: {"gflop": f / 1e9, "ratio": f / baseline} for n, f in flops.items()})
        return
    with too_few_samples_rejected(options.batch):
        bench = build_bench(
            options.model, configs, batch=options.batch, size=size, precision=options.precision, device=device
        )
        results = bench.run(options.rounds, options.warmup)
    print(f"{options.model}, {size} px, batch {options.batch}, {options.precision}, {options.rounds} rounds")
    print(measured_on(device))
    print(table(results, options.batch))
    baseline_memory = results[0].memory
    steps = {r.name: {"seconds": r.seconds, "ratio": r.ratio, "memory": r.memory} for r in results}
    for values in steps.values():
        values["memory_ratio"] = values["memory"] / baseline_memory if values["memory"] and baseline_memory else None
    write_json(options, size, steps, batch=options.batch, precision=options.precision, hardware=measured_on(device))


def write_json(options: argparse.Namespace, size: int, steps: dict[str, Any], **more: Any) -> None:
    """Write the figures of every step by its name to `--json`, if it was given."""
    if options.json is None:
        return
    values = {"model": options.model, "size": size, **more, "steps": steps}
    write_text(options.json, json.dumps(values, indent=2) + "\n")
