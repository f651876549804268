"""What `amltrain finetune` chooses, and why: `BASES` says which model, `RULES` how long and how large.

`make_plan` turns what is known about data and machine into `Choice`s, each with its reason; nothing else decides.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from amltrain.environment import LITE, TEXT, VISION, Machine
from amltrain.errors import UserError, unknown_name


class Base(NamedTuple):
    """A model to start from, the config `models/NAME`.

    card: GiB of a card's memory from which on it is taken, None = also without a card. sizes: input sides that it may
    have, pixels. fixed, sample: GiB of weights, gradients and optimizer, and of one sample at `sizes[-1]`. kwargs:
    `model.kwargs`. lr: None = its config's. needs: module -> what installs it. weights: Hub repositories.
    """

    name: str
    card: float | None
    sizes: tuple[int, ...]
    fixed: float
    sample: float
    kwargs: Mapping[str, str]
    lr: float | None
    needs: Mapping[str, str]
    weights: tuple[str, ...]
    why: str


PACKAGED = f"pip install {LITE}"
FROZEN, LORA = ({"vision_tuning": kind, "text_tuning": kind} for kind in ("frozen", "lora"))
BASES = (
    Base(
        "sam3", 40, (1008,), 5.1, 8.5, LORA, None, {"peft": "pip install peft"}, ("facebook/sam3",),
        "SAM 3 with low-rank updates; the largest model that fits this card",
    ),
    Base(
        "caris_swin_base", 16, (320, 384, 448), 3.0, 1.5, {}, None, {},
        ("timm/swin_base_patch4_window7_224.ms_in22k", "bert-base-uncased"),
        "Swin-B and BERT, trained whole: the usual encoders of published methods",
    ),
    Base(
        "dual_dinov3_base", 8, (320, 384, 448), 1.5, 1.25, LORA, None, {"peft": "pip install peft"},
        ("timm/vit_base_patch16_dinov3.lvd1689m", "bert-base-uncased"),
        "DINOv3 and BERT with low-rank updates, for cards under 16 GiB",
    ),
    Base(
        "caris_lite", None, (192, 256, 320), 1.0, 0.21, FROZEN, 1e-3,
        {TEXT: PACKAGED, VISION: PACKAGED}, (),
        "EfficientNet-lite0 and MiniLM, pretrained and frozen; a small decoder learns, which a CPU can do",
    ),
)  # fmt: skip
"""From the largest. Memory is that of `amltrain train --estimate` in bf16, that of caris_lite was measured on a CPU."""


class Rules(NamedTuple):
    """Numbers behind the choices; docs/finetune.md shows them as a table."""

    visits_cpu: int = 12_000
    """Times that referents are seen in a run, on a CPU."""
    visits_card: int = 200_000
    epochs_cpu: tuple[int, int] = (5, 60)
    """Fewest and most passes over the training set that `visits` is turned into."""
    epochs_card: tuple[int, int] = (10, 40)
    minutes_cpu: float = 60.0
    """Longest training on a CPU; --minutes changes it. A card has no limit."""
    core_seconds: float = 0.21
    """Seconds of one core per sample of 256 px on a CPU (caris_lite, measured on a Xeon)."""
    object_pixels: int = 24
    """Three of four objects should be at least so wide in the input."""
    tiny_pixels: int = 12
    """An object that is smaller in the input is likely to be missed."""
    batch: int = 16
    steps_per_epoch: int = 4
    """At least so many steps per epoch: small data gets a smaller batch."""
    warmup_share: float = 0.1
    evaluations: int = 5
    evaluated_cpu: int = 200
    """Samples of each evaluation during training on a CPU; the last one scores all."""
    most_tokens: int = 64
    tokens_beyond: int = 4
    """Room for sentences longer than those of the data."""
    flip_below: int = 20_000
    """Sets of fewer referents are mirrored at random."""
    few_refs: int = 200
    """Objects in training, below which a model mostly remembers; it is then scored on its training pictures too."""
    reads_words: float = 5.0
    """Points of mIoU that the model should lose with another sample's sentence."""


RULES = Rules()


class Facts(NamedTuple):
    """What the choices depend on, of prepared data.

    images, refs, sentences: of the training split. scored: the split that is evaluated in training; final: that of the
    last score. side: first quartile of the objects' sides as a share of the picture's. photo: median width and height.
    english: share of sentences with common English words. texts: different sentences. findings: what a person should
    know before it trains.
    """

    name: str
    prepared: str
    images: int
    refs: int
    sentences: int
    scored: str
    scored_samples: int
    final: str
    final_refs: int
    side: float
    photo: tuple[int, int]
    english: float
    texts: tuple[str, ...]
    findings: tuple[str, ...]


class Choice(NamedTuple):
    """One key of the run, its value and why."""

    key: str
    value: Any
    reason: str


class Plan(NamedTuple):
    """What will be trained. minutes: about so long, None where it was not measured for this kind of machine."""

    base: str
    choices: tuple[Choice, ...]
    findings: tuple[str, ...]
    steps: int
    minutes: float | None

    def __str__(self) -> str:
        lines = [f"  {c.key:28} {_shown(c.value):24} {c.reason}" for c in self.choices]
        return "\n".join([*lines, *(f"  NOTE: {finding}" for finding in self.findings)])


def choose_base(machine: Machine, wanted: str | None, *, own_weights: bool = False) -> Base:
    """The first of `BASES` that fits the machine and whose packages and weights are available.

    wanted: its name, if the user chose it. own_weights: the user named other weights, so none are looked for. Raises
    UserError.
    """
    if wanted is not None:
        named = {base.name: base for base in BASES}
        if wanted not in named:
            raise unknown_name("model of finetune", wanted, named)
        lacking = missing(named[wanted])
        if lacking and not own_weights:
            raise UserError(f"{wanted} cannot start: {lacking}")
        return named[wanted]
    memory = machine.memory if machine.device == "cuda" else 0.0
    lacking = ""
    for base in BASES:
        if base.card is None or memory >= base.card:
            lacking = missing(base)
            if not lacking:
                return base
    raise UserError(f"no pretrained model is available: {lacking}")


def missing(base: Base) -> str:
    """What a model lacks here, with the line that brings it; empty = nothing."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    for module, line in base.needs.items():
        if importlib.util.find_spec(module) is None:
            return f"{base.name} needs the package {module}: {line}"
    for repository in base.weights:
        if any(
            isinstance(try_to_load_from_cache(repository, file), str) for file in ("config.json", "model.safetensors")
        ):
            continue
        if constants.HF_HUB_OFFLINE:
            return (
                f"{repository} is not in the cache and HF_HUB_OFFLINE is set; where there is a network: "
                f"hf download {repository}"
            )
        if repository == "facebook/sam3" and get_token() is None:
            return f"{repository} is given on request: ask at huggingface.co/{repository}, then hf auth login"
    return ""


class _Chooser:
    """Collects choices; a key that the user gave wins over ours."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given, self.choices = dict(given), list[Choice]()

    def pick(self, key: str, value: Any, reason: str) -> Any:
        """Note a key's value and reason; returns the value that holds."""
        if key in self._given:
            value, reason = self._given.pop(key), "given by you"
        self.choices.append(Choice(key, value, reason))
        return value

    def rest(self) -> None:
        """Note what the user gave and nothing here chooses."""
        self.choices += [Choice(key, value, "given by you") for key, value in self._given.items()]


def make_plan(
    facts: Facts,
    machine: Machine,
    base: Base,
    run: Path,
    given: Mapping[str, Any],
    *,
    method: str = "supervised",
    seed: int = 0,
    minutes: float | None = None,
) -> Plan:
    """Choose every key of the run. given: keys that the user sets. Raises UserError without the model's tokenizer."""
    chooser, on_card = _Chooser(given), machine.device == "cuda"
    pick = chooser.pick
    pick("output", str(run), "one folder for all of the run; the same command continues it")
    pick("method", method, METHODS_SAY.get(method, "given by you"))
    pick("seed", seed, "of every random choice")
    pick(
        "data.datasets",
        [facts.name],
        f"{facts.images:,} pictures, {facts.refs:,} objects, {facts.sentences:,} sentences",
    )
    pick("data.prepared", facts.prepared, "where they are prepared")
    pick("data.workers", max(1, min(8, machine.threads - 1)) if on_card else 1, "processes that read pictures")
    if facts.refs < RULES.flip_below and facts.english > 0.5:
        pick("data.augment", ["flip"], "few pictures; mirrored ones exchange left and right in the sentence")
    pick("model.name", base.name, base.why)
    if base.kwargs:
        kinds = " and ".join(dict.fromkeys(base.kwargs.values()))
        pick("model.kwargs", dict(base.kwargs), f"how its encoders learn: {kinds}")
    size, size_findings = _choose_size(pick, facts, base)
    tokens_findings = _choose_tokens(pick, facts, base, given.get("preprocess.tokenizer"))
    batch, steps, length = _choose_length(pick, given, facts, machine, size, minutes)
    _choose_micro(pick, base, machine, size, batch)
    if on_card:
        pick("train.mixed_precision", "bf16" if machine.bf16 else "fp16", f"what {machine.name} computes fastest")
        if base.name == "sam3":
            pick("model.gradient_checkpointing", True, "5,184 patches per picture: less memory, a third more time")
    if base.lr is not None:
        pick("optim.lr", base.lr, "only a small decoder learns, from nothing")
    warmup = pick("optim.warmup_steps", int(steps * RULES.warmup_share), "a tenth of the run")
    every = pick("evaluation.every_steps", max(1, math.ceil(steps / RULES.evaluations)), "five scores on the way")
    pick(
        "evaluation.splits",
        [facts.scored],
        "pictures that are not trained on" if facts.scored != "train" else "no other split",
    )
    pick("evaluation.best_metric", "mIoU", "every object counts alike, small ones too")
    if not on_card and facts.scored_samples > RULES.evaluated_cpu:
        pick("evaluation.max_samples", RULES.evaluated_cpu, "on the way; the last score is of all")
    pick("train.log_every", max(1, min(20, steps // 10)), "lines in the log")
    chooser.rest()
    findings = [
        *facts.findings,
        *size_findings,
        *tokens_findings,
        *_run_findings(length, steps, warmup, every, batch, facts),
    ]
    expected = None if on_card or base.name != "caris_lite" else _minutes(steps * batch, size, machine.threads)
    return Plan(base.name, tuple(chooser.choices), tuple(findings), steps, expected)


METHODS_SAY = {
    "supervised": "no masking method was better in the fair test (docs/aml.md)",
    "aml": "masks blocks of low alignment in training",
}


def _choose_size(pick: Any, facts: Facts, base: Base) -> tuple[int, list[str]]:
    """The smallest input in which three of four objects are wide enough."""
    fits = [size for size in base.sizes if facts.side * size >= RULES.object_pixels]
    best = fits[0] if fits else base.sizes[-1]
    reason = f"three of four objects are at least {facts.side * best:.0f} px wide in it"
    if len(base.sizes) == 1:
        reason = "fixed by the model"
    size = int(pick("preprocess.size", best, reason))
    if facts.side * size >= RULES.tiny_pixels:
        return size, []
    width, height = facts.photo
    return size, [
        f"the pictures ({width} x {height}) are far larger than the input of {size} px: a quarter of the objects is "
        f"less than {facts.side * size:.0f} px wide there and likely to be missed; cut the pictures into tiles, or "
        f"give a larger preprocess.size"
    ]


def _choose_tokens(pick: Any, facts: Facts, base: Base, wanted: str | None) -> list[str]:
    """Sentence length from the data, and findings about words that the vocabulary lacks. wanted: another tokenizer."""
    from amltrain.config.fields import override
    from amltrain.config.parse import config_of
    from amltrain.data.text import SentenceTokenizer
    from amltrain.models.registry import model_info

    config = config_of({}, f"models/{base.name}")
    preprocess = override(model_info(config.model.name).preprocess, config.preprocess)
    texts = facts.texts[:5000]
    name = wanted or preprocess.tokenizer
    own = name == "wordpiece"
    tokenizer = SentenceTokenizer.train_wordpiece(texts, 512) if own else SentenceTokenizer.load(name, 512)
    longest = max(int(tokenizer(text)[1].sum()) for text in texts)
    limit = RULES.most_tokens if base.name != "sam3" else 32
    tokens = int(pick(
        "preprocess.max_tokens",
        min(limit, longest + RULES.tokens_beyond),
        f"the longest sentence has {longest} tokens",
    ))  # fmt: skip
    found = []
    if longest > tokens:
        cut = sum(int(tokenizer(text)[1].sum()) > tokens for text in texts)
        found.append(f"{cut:,} of {len(texts):,} sentences are longer than {tokens} tokens and will be cut")
    unknown = [(text, words) for text in texts if (words := tokenizer.unknown(text))]
    if len(unknown) > 0.02 * len(texts):
        examples = ", ".join(dict.fromkeys(word for _, words in unknown[:5] for word in words[:1]))
        found.append(
            f"{len(unknown):,} of {len(texts):,} sentences have words that the vocabulary of {base.name} lacks (e.g. "
            f"{examples}); other languages than English need another text model (docs/any-encoder.md)"
        )
    return found


def _choose_length(
    pick: Any, given: Mapping[str, Any], facts: Facts, machine: Machine, size: int, minutes: float | None
) -> tuple[int, int, str]:
    """Batch and steps; also the run's length in words."""
    on_card = machine.device == "cuda"
    batch = RULES.batch
    while batch > 1 and facts.refs / batch < RULES.steps_per_epoch:
        batch //= 2
    reason = (
        "samples per step"
        if batch == RULES.batch
        else f"{facts.refs} objects: at least {RULES.steps_per_epoch} steps per epoch"
    )
    batch = int(pick("train.global_batch_size", batch, reason))
    if "train.epochs" in given and "train.max_steps" not in given:
        epochs = int(pick("train.epochs", 1, ""))
        return batch, max(1, epochs * facts.refs // batch), f"{epochs} epochs"
    visits, (low, high) = (RULES.visits_card, RULES.epochs_card) if on_card else (RULES.visits_cpu, RULES.epochs_cpu)
    epochs = min(high, max(low, round(visits / facts.refs)))
    steps = max(1, epochs * facts.refs // batch)
    reason = f"{epochs} epochs of {facts.refs:,} objects"
    limit = minutes if minutes is not None else None if on_card else RULES.minutes_cpu
    if limit is not None and not on_card:
        fit = max(1, int(steps * limit / max(1e-9, _minutes(steps * batch, size, machine.threads))))
        if fit < steps:
            steps, reason = (
                fit,
                f"{fit * batch / facts.refs:.1f} of {epochs} epochs: what {limit:g} minutes allow (--minutes)",
            )
    steps = int(pick("train.max_steps", steps, reason))
    return batch, steps, f"{steps * batch / facts.refs:.1f} epochs"


def _minutes(samples: float, size: int, threads: int) -> float:
    """Minutes of training on a CPU, roughly: two cores do not halve the time."""
    return samples * RULES.core_seconds * (size / 256) ** 2 / threads**0.8 / 60


def _choose_micro(pick: Any, base: Base, machine: Machine, size: int, batch: int) -> None:
    """The most samples at a time that fit into the free memory; the rest is accumulated."""
    each = base.sample * (size / base.sizes[-1]) ** 2
    free = 0.8 * machine.memory - base.fixed
    micro = batch
    while micro > 1 and micro * each > free:
        micro //= 2
    kind = f"{machine.memory:.0f} GiB of {'memory' if machine.device != 'cuda' else machine.name}"
    share = "all at once" if micro == batch else f"{batch // micro} times accumulated"
    pick("train.micro_batch_size", micro, f"{kind} holds about {max(0.0, free) / each:.0f} samples: {share}")


def _run_findings(length: str, steps: int, warmup: int, every: int, batch: int, facts: Facts) -> list[str]:
    found = []
    if warmup >= steps:
        found.append(
            f"the warm-up of {warmup:,} steps is as long as the run ({steps:,}): the learning rate never arrives; "
            f"lower optim.warmup_steps"
        )
    if every > steps:
        found.append(f"evaluation.every_steps {every:,} is beyond the run ({steps:,} steps): only its end is scored")
    if steps * batch < 2 * facts.refs:
        found.append(
            f"{length} of training are short: most objects are seen once at most; train for longer, or use a card"
        )
    return found


def as_config(chosen: Plan) -> str:
    """The plan as a config file, a reason behind every key; the same run is `amltrain train --config FILE`."""
    tree: dict[str, Any] = {}
    for choice in chosen.choices:
        group, _, key = choice.key.rpartition(".")
        inner = tree
        for part in group.split(".") if group else ():
            inner = inner.setdefault(part, {})
        inner[key] = choice
    lines = [
        "# Written by amltrain finetune; every key with its reason.",
        f"base: [models/{chosen.base}]",
        *_lines(tree, 0),
    ]
    return "\n".join(lines) + "\n"


def _lines(tree: Mapping[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    for key, entry in tree.items():
        if isinstance(entry, dict):
            lines += [f"{'  ' * depth}{key}:", *_lines(entry, depth + 1)]
        else:
            text = f"{'  ' * depth}{key}: {_shown(entry.value)}"
            lines.append(f"{text:44}  # {entry.reason}" if entry.reason else text)
    return lines


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
