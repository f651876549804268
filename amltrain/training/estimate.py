"""What a run will cost, before it is paid for: memory, arithmetic and hours, without a card, weights or data.

One training step runs on tensors that have shapes and no values (torch's fake tensors), so that a model of any size is
measured in seconds on any machine. Live bytes are counted as torch's allocator would hand them out. Two things that a
card does and a CPU does not are put in their place (`CardArithmetic`): the operations that autocast keeps in float32,
and attention that keeps no matrix of dropped weights.

Held against the allocator of a simulated card (tests/training/test_estimate.py). What kernels use as workspace, what
a fragmented allocator loses, and the buckets in which several processes add their gradients are not seen; `RESERVE` is
left for them.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from amltrain.config.fields import override
from amltrain.config.schema import Preprocess, RunConfig
from amltrain.data.catalog import dataset_spec, find_manifest
from amltrain.distributed import BatchPlan, plan_batches
from amltrain.errors import UserError, first_line
from amltrain.evaluation.tables import markdown
from amltrain.methods.base import Method, build_method
from amltrain.models import create_model, model_info
from amltrain.records import Batch, Conversation, Vocabulary
from amltrain.registry import DATASETS, METHODS
from amltrain.training.build import build_loss, model_kwargs
from amltrain.training.optim import arguments, build_optimizer, optimizer_groups
from amltrain.training.run import count_steps

GIB = 2**30
BLOCK = 512
"""Bytes to whose multiple torch's allocator rounds a tensor."""
PICTURE = (480, 640)
"""Height and width of an original picture, where a loss reads masks at that size."""
WORDS = Vocabulary(1000, 0, 3, (0, 1, 2, 3, 4))
RESERVE = 0.08
"""Share of a card's memory that is left for the driver, workspaces and fragments."""
REACHED = 0.35
"""Share of a card's arithmetic that training usually reaches: an assumption."""
LAUNCH_SECONDS = 25e-6
"""Time of a processor to start one operation of a step, forward and backward: an assumption."""


class Card(NamedTuple):
    """A card: GiB of memory, and TFLOP/s of dense products as its maker states them.

    half: in bfloat16 or float16. tf32: in TensorFloat-32, as float32 training uses it.
    """

    name: str
    gib: float
    half: float
    tf32: float


CARDS = (
    Card("L4 24 GB", 22.5, 121, 60),
    Card("RTX 4090 24 GB", 23.6, 165, 83),
    Card("A100 40 GB", 39.5, 312, 156),
    Card("A100 80 GB", 79.2, 312, 156),
    Card("H100 80 GB", 79.1, 989, 495),
    Card("H200 141 GB", 139.8, 989, 495),
)


class StepCost(NamedTuple):
    """One optimizer step on one process.

    weights, states, peak: bytes of parameters and buffers, of the optimizer, and of everything at the fullest moment.
    flops: of products, convolutions and attention. launches: operations that move or change data.
    """

    weights: int
    states: int
    peak: int
    flops: float
    launches: int


class Meter(TorchDispatchMode):
    """Counts live bytes, FLOPs and operations."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.launches = 0
        self.flops = 0.0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def start(self) -> None:
        """Count peak, FLOPs and operations from here on."""
        self.peak, self.flops, self.launches = self.live, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for made in tree_iter(out):
            if isinstance(made, Tensor):
                self.add(made)
        self.launches += func.namespace == "aten" and not func.is_view
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _named(*names: str) -> frozenset[Any]:
    """The functions of torch, torch.nn.functional and Tensor that bear these names."""
    places = (torch, F, Tensor)
    return frozenset(getattr(place, name) for name in names for place in places if hasattr(place, name))


_KEPT_IN_FLOAT32 = _named(
    "softmax", "log_softmax", "layer_norm", "group_norm", "norm", "normalize", "exp", "expm1", "log", "log10", "log2",
    "log1p", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "cumsum", "cumprod", "prod", "sum", "cosh", "sinh",
    "tan", "acos", "asin", "erfinv", "cosine_similarity", "cosine_embedding_loss", "cdist", "dist", "renorm",
    "softplus", "softmin", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cross_entropy", "triplet_margin_loss", "margin_ranking_loss",
    "hinge_embedding_loss",
)  # fmt: skip
"""Source: PyTorch, Automatic Mixed Precision package, CUDA ops that autocast to float32."""


_ATTENTION = {
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"),
    F.multi_head_attention_forward: tuple(inspect.signature(F.multi_head_attention_forward).parameters),
}


class CardArithmetic(TorchFunctionMode):
    """What a card does and a CPU does not: autocast's operations in float32, and attention without a dropped matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _KEPT_IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_single(value) for value in args)
        elif func in _ATTENTION:
            args, kwargs = (), dict(zip(_ATTENTION[func], args, strict=False)) | kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


def _single(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def blank_batch(preprocess: Preprocess, rows: int, *, tokens: int | None = None) -> Batch:
    """A batch of zeros as a model reads it after `prepare_batch`, for what needs shapes only.

    tokens: of a conversation, its picture counted once; None = those of the protocol.
    """
    size, view = preprocess.size, preprocess.view_size
    each = torch.arange(rows)
    words = torch.zeros(rows, preprocess.max_tokens, dtype=torch.int64)
    talk = None
    if preprocess.conversation:
        length = preprocess.conversation_tokens if tokens is None else tokens
        ids = torch.zeros(rows, length, dtype=torch.int64)
        place = torch.full((rows,), length - 2)
        talk = Conversation(ids, ids.clone(), torch.ones_like(ids, dtype=torch.bool), each, place, each, each)
    target = torch.zeros(rows, size, size, dtype=torch.uint8)
    return Batch(
        image=torch.zeros(rows, 3, size, size),
        input_ids=words,
        text_mask=torch.ones_like(words, dtype=torch.bool),
        target=target,
        no_target=torch.zeros(rows, dtype=torch.bool),
        sample_id=each,
        random_key=each.clone(),
        geometry=torch.ones(rows, 6, dtype=torch.float64),
        original_target=tuple(torch.zeros(PICTURE, dtype=torch.uint8) for _ in each) if talk else (),
        regions=target.clone(),
        view=torch.zeros(rows, 3, view, view) if view else None,
        conversation=talk,
        box=torch.tensor([0.0, 0.0, size, size]).repeat(rows, 1),
        view_geometry=torch.ones(rows, 6, dtype=torch.float64) if view else None,
    )


def step_cost(config: RunConfig, rows: int, *, accumulated: bool = False) -> StepCost:
    """The cost of one optimizer step of a run on one process. Raises UserError for what needs values to be measured.

    rows: samples of a forward pass. accumulated: gradients of an earlier pass are in memory.
    """
    info = model_info(config.model.name)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.mixed_precision or "no")
    with torch.device("meta"):
        model = create_model(config.model.name, **model_kwargs(config.model))
    if config.model.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    with FakeTensorMode(allow_non_fake_inputs=True), _needs_no_values(config):
        _without_values(model)
        options = config.method_options if config.method_options is not None else METHODS.options(config.method)()
        method = build_method(config.method, model, build_loss(config, info), options, WORDS).train()
        o = config.optim
        optimizer = build_optimizer(optimizer_groups(method, o), **arguments(o))
        batch = blank_batch(override(info.preprocess, config.preprocess), rows)
        return _measured_step(method, optimizer, batch, half, accumulated)


def _measured_step(
    method: Method, optimizer: Optimizer, batch: Batch, half: torch.dtype | None, accumulated: bool
) -> StepCost:
    def backward() -> None:
        with CardArithmetic():  # checkpointed blocks run again in backward
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = method(batch)["loss"]
            # backward() itself would leave the mode, which blocks that are computed again still need
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    with Meter() as meter:
        for tensor in (*method.parameters(), *method.buffers()):
            meter.add(tensor)
        weights = meter.live
        method.before_step(0, [batch])
        backward()
        optimizer.step()  # its state exists from here on
        optimizer.zero_grad()
        states = meter.live - weights
        if accumulated:
            backward()
        meter.start()
        backward()
        flops, launches = meter.flops, meter.launches
        nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        return StepCost(weights, states, meter.peak, flops, launches)


def _without_values(model: nn.Module) -> None:
    """Give parameters and buffers of the meta device the CPU's shapes."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _needs_no_values(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise UserError(
            f"the step of {config.model.name} with method {config.method} cannot be estimated: it reads values of "
            f"tensors ({first_line(error)})"
        ) from error


class MemoryLine(NamedTuple):
    """Bytes at the fullest moment of a step by samples of a forward pass: fixed + each * samples, and at least `least`.

    least: where a small batch is fullest when all gradients are there, or in the optimizer.
    """

    fixed: float
    each: float
    least: float = 0.0

    def at(self, samples: int) -> float:
        """Bytes for so many samples."""
        return max(self.least, self.fixed + self.each * samples)

    def most(self, gib: float) -> int:
        """The most samples that a card with so much memory holds; 0 = none."""
        free = gib * GIB * (1 - RESERVE)
        return 0 if self.least > free else max(0, int((free - self.fixed) / self.each))


def _peak(measured: Callable[[int], StepCost], samples: int) -> int:
    return measured(samples).peak


LARGEST = 512
"""Samples of the largest step that is measured for a line."""


def memory_line(peaks: Callable[[int], int], samples: int) -> MemoryLine:
    """The line through two steps that are large enough for their samples to fill most of the memory.

    peaks: bytes by samples. samples: of the run, whose own step is measured too.
    """
    small = max(32, samples)
    while small < LARGEST and peaks(2 * small) < 1.5 * peaks(small):
        small *= 2
    large = 2 * small  # `small` itself may be at the lower end
    each = max(1.0, (peaks(2 * large) - peaks(large)) / large)
    line = MemoryLine(peaks(large) - each * large, each)
    measured = peaks(samples)
    return line._replace(least=measured) if measured > 1.02 * line.at(samples) else line


class Estimate(NamedTuple):
    """What a run costs on each of `plan.processes` cards.

    step: of one forward pass of `plan.micro` samples with its share of the optimizer. memory, memory_checkpointed: by
    samples of a forward pass, without and with gradient checkpointing. average: bytes of the weights' average. steps:
    of the run; None where the number of its samples is not known.
    """

    plan: BatchPlan
    step: StepCost
    memory: MemoryLine
    memory_checkpointed: MemoryLine
    average: int
    steps: int | None

    def hours(self, card: Card, precision: str) -> float | None:
        """Hours of training on such cards; precision as `train.mixed_precision`, "no" for float32."""
        if self.steps is None:
            return None
        seconds = max(self._arithmetic_seconds(card, precision), self.launch_seconds)
        return self.steps * self.plan.accumulation * seconds / 3600

    def bound(self, card: Card, precision: str) -> str:
        """What takes the time on such a card: "arithmetic", or "launches" where the processor is the slower one."""
        return "arithmetic" if self._arithmetic_seconds(card, precision) > self.launch_seconds else "launches"

    def _arithmetic_seconds(self, card: Card, precision: str) -> float:
        speed = (card.tf32 if precision == "no" else card.half) * 1e12 * REACHED
        return self.step.flops / speed

    @property
    def launch_seconds(self) -> float:
        """Seconds in which a processor starts the operations of one pass."""
        return self.step.launches * LAUNCH_SECONDS


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """Measure a run's step without a card; takes a minute for a full-size model. Raises UserError."""
    plan = plan_batches(config.train, processes)
    model, lines, costs = config.model, [], []
    for checkpointed in (False, True):
        chosen = replace(config, model=replace(model, gradient_checkpointing=checkpointed))
        measured = cache(partial(step_cost, chosen, accumulated=plan.accumulation > 1))
        lines.append(memory_line(partial(_peak, measured), plan.micro))
        costs.append(measured(plan.micro))
    step = costs[model.gradient_checkpointing]
    average = step.weights if config.train.ema_decay is not None else 0
    lines = [line._replace(fixed=line.fixed + average, least=line.least and line.least + average) for line in lines]
    samples = training_samples(config)
    steps = (
        None if samples is None and config.train.max_steps is None else count_steps(config.train, samples or 0, plan)[1]
    )
    return Estimate(plan, step, lines[0], lines[1], average, steps)


def training_samples(config: RunConfig) -> int | None:
    """Samples of an epoch: as the prepared data state, else as published; None where neither is known."""
    unit = "refs" if config.data.train_unit == "referent" else "expressions"
    counts: list[int | None] = []
    for name in config.data.datasets:
        manifest = find_manifest(config.data.prepared, name)
        if manifest is not None:
            counts.append(manifest["splits"].get("train", {}).get(unit))
        elif name in DATASETS:
            published = dataset_spec(name).published.get("train")
            counts.append(getattr(published, unit) if published else None)
        else:
            counts.append(None)
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def describe(config: RunConfig, found: Estimate) -> str:
    """The estimate on one screen."""
    precision = config.train.mixed_precision or "no"
    size = override(model_info(config.model.name).preprocess, config.preprocess).size
    step, line = found.step, found.memory_checkpointed if config.model.gradient_checkpointing else found.memory
    peak = line.at(found.plan.micro)
    rest = peak - step.weights - step.states - found.average
    parts = f"weights {step.weights / GIB:.1f}, optimizer {step.states / GIB:.1f}, "
    parts += f"average {found.average / GIB:.1f}, " if found.average else ""
    steps = "" if found.steps is None else f", {found.steps:,} steps"
    rows = [
        f"{config.model.name}, {config.method}, {size} px, {'float32' if precision == 'no' else precision}",
        f"  batch       {found.plan}{steps}",
        f"  memory      {peak / GIB:.1f} GiB of each card ({parts}gradients and activations {rest / GIB:.1f})",
        f"  one pass    {step.flops / 1e12:.1f} TFLOP, {step.launches:,} operations to start",
        "",
    ]
    table: list[Sequence[str]] = [("card", "samples that fit", "with gradient_checkpointing", "hours", "bound by")]
    for card in CARDS:
        fits, hours = line.most(card.gib) >= found.plan.micro, found.hours(card, precision)
        told = "-" if hours is None or not fits else f"{hours:.1f}"
        most = [str(kind.most(card.gib)) for kind in (found.memory, found.memory_checkpointed)]
        table.append((card.name, *most, told, "-" if told == "-" else found.bound(card, precision)))
    rows += [
        *markdown(table),
        "",
        f"Samples per forward pass (train.micro_batch_size), {RESERVE:.0%} of the card kept free; sharding takes less.",
        f"Hours assume {REACHED:.0%} of the stated arithmetic and {LAUNCH_SECONDS * 1e6:.0f} microseconds to start an "
        f"operation, whichever is longer,",
        "and no evaluation: neither was measured on a card. `-`: it does not fit, or the samples are not known.",
    ]
    return "\n".join(rows)
