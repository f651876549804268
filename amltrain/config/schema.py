"""A run, as plain dataclasses. The docstring under each field is its `--help`.

Leaf functions take plain values; only `build_*` functions and commands see a config.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from amltrain.config.fields import FREE, LOCAL, POSITIVE, SAID, Partial, check_ranges, check_types, key, partial_of
from amltrain.errors import UserError

MaskParts = Literal["union", "exclusive"]

COMBINED = ("refcoco", "refcoco+", "refcocog")
"""The data sets of `combined`; the last one is split by umd."""


@dataclass
class ShapesConfig:
    """Synthetic scenes, drawn when a run uses a data set of the refshapes family that does not exist yet."""

    train: int = key(4000, low=1)
    """Training scenes."""
    evaluation: int = key(250, low=1)
    """Scenes in every other split."""
    size: int = key(96, low=16)  # amltrain.data.sources.shapes.SMALLEST_SCENE
    """Side of a scene, pixels."""
    seed: int = key(0, low=0)
    """Seed of the scenes."""
    style: Literal["simple", "cluttered", "alike"] = "simple"
    """simple: 3 to 6 objects of 4 forms on a grey ground. cluttered: 4 to 8 smaller objects of 9 forms and 9 colours on
    a ground of coloured stains and shards. alike: as cluttered, with 7 objects of one form, so that a referent has six
    distractors."""
    described: int = key(3, low=1)
    """Most objects of a scene that get sentences; those without a sentence that fits them alone never do."""


@dataclass
class DataConfig:
    """Which referring expressions to train on and where they lie."""

    datasets: list[str] = key(default_factory=lambda: ["refshapes"], basic=True)
    """Data sets to train on: refcoco, refcoco+, refcocog, refcocog-google, grefcoco, or synthetic refshapes,
    refshapes+, refshapesg, grefshapes. More than one is combined training; [combined] means refcoco, refcoco+ and
    refcocog, [combined-unfiltered] the same with leak_filter off."""
    prepared: str = key("prepared", scope=LOCAL, basic=True)
    """Folder with the prepared Parquet data (one folder per data set), or a Hub data set id."""
    refer_root: str | None = key(None, scope=LOCAL)
    """Folder in the original REFER layout (refcoco/refs(unc).p, refcoco/instances.json, ...). When the prepared data is
    missing it is made from here first."""
    image_root: str | None = key(None, scope=LOCAL)
    """Folder with the COCO train2014 images; by default looked for under refer_root."""
    leak_filter: bool = True
    """In combined training drop every image that is in a val or test split of any of the data sets. false reproduces
    DETRIS- and UNINEXT-style numbers, whose test images are partly seen in training."""
    also_held_out: list[str] = field(default_factory=list)
    """Further prepared data sets whose val and test images the leak filter drops, e.g. refcocog-google, grefcoco."""
    held_out_ids: str | None = None
    """JSON list of further image ids that the leak filter drops."""
    weights: list[float] | None = None
    """Sampling weight of each data set in combined training; null = every referent once per epoch."""
    train_split: str = "train"
    """Split to train on."""
    train_unit: Literal["referent", "sentence"] = "referent"
    """An epoch visits every referent once with a random sentence, or every sentence once."""
    sentences_per_image: int = key(1, low=1)
    """Samples of one picture that follow each other, as far as there are: a language model reads up to so many
    sentences in one conversation (GSVA: 3)."""
    mask_parts: MaskParts | None = None
    """Pixels covered by two polygons of one object: foreground (union) or background (exclusive: LAVT, CGFormer).
    null = the model's own; the evaluation's protocol may override it."""
    augment: list[str] = key(default_factory=list, basic=True)
    """Augmentations of the training samples, in order; `amltrain list augmentations` lists them. Options of each are in
    the section of its name."""
    streaming: bool = key(False, scope=FREE)
    """Read the Parquet files as a stream instead of from a memory-mapped copy."""
    decoder: Literal["pil", "torchvision"] = "pil"
    """torchvision decodes and resizes about twice as fast; square images differ by at most one grey level of 255."""
    presized: bool | None = None
    """Read images and masks that were resized once (`amltrain data presize`): the same numbers, about ten times faster.
    null = where they are there; true = stop if they are not; false = never."""
    workers: int = key(2, low=0, scope=LOCAL, basic=True)
    """Data loading processes per training process."""
    max_skipped: float = key(0.001, low=0, high=1, scope=FREE)
    """Share of expressions that may be unusable (counted, reported and skipped) before preparing gives up."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """Synthetic scenes."""

    def __post_init__(self) -> None:
        if self.datasets in (["combined"], ["combined-unfiltered"]):
            self.leak_filter = self.leak_filter and self.datasets == ["combined"]
            self.datasets = list(COMBINED)
        if not self.datasets:
            raise UserError("data.datasets is empty; name at least one data set")
        twice = {name for name in self.datasets if self.datasets.count(name) > 1}
        if twice:
            raise UserError(
                f"data.datasets names {', '.join(sorted(twice))} more than once; set its share with data.weights"
            )


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image and a sentence become tensors."""

    size: int = key(low=1, basic=True)
    """Side of the square network input, pixels."""
    resize: Literal["square", "square_aliased", "letterbox", "longest"]
    """square: stretch, aspect ratio not kept (CARIS, LAVT, ReLA); square_aliased: the same without antialiasing (C3VG,
    DeRIS); letterbox: keep it and pad around (CRIS, DETRIS); longest: keep it and pad below or on the right (SAM)."""
    normalization: Literal["imagenet", "clip", "half"]
    """Mean and standard deviation subtracted from and divided out of the image (0..1)."""
    tokenizer: str
    """Hub id or folder of a tokenizer; `wordpiece` builds a vocabulary from the training sentences; `packaged` is
    MiniLM's, of the extra pretrained-lite."""
    max_tokens: int = key(low=1)
    """Tokens per sentence, special tokens included; longer sentences are cut."""
    sentence_field: Literal["sent", "raw"]
    """Which text of the REFER files: cleaned (sent) or as typed (raw)."""
    conversation: Literal["", "gsva", "lisa"] = ""
    """Whose questions and answers a language model reads around the sentences; empty = the sentence alone."""
    conversation_tokens: int = key(769, low=16)
    """Tokens of a training conversation, the image counted once; longer ones are cut."""
    image_tokens: int = key(256, low=1)
    """Tokens that a picture takes in a conversation: patches of `view_size`."""
    view_size: int = key(0, low=0)
    """Side in pixels of a second picture for the model's other image encoder; 0 = it makes one of the first."""
    view: Literal["centre", "bilinear", "bicubic"] = "centre"
    """centre: the square in its middle (CLIP in GSVA and LISA); bilinear, bicubic: all of it, stretched without
    antialiasing (BEiT-3 in DeRIS and EVF-SAM)."""


@partial_of(Preprocess)
class PreprocessOverrides(Partial):
    """What a run changes of how its model reads images and sentences. null = the model's own."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a prediction is scored."""

    frame: Literal["network", "original"]
    """Score masks at the network's input size or at every image's own size."""
    threshold: float = key(low=0, high=1)
    """A pixel is foreground when its probability exceeds this; 0.5 is the argmax of two channels."""
    interpolation: Literal["bilinear", "bicubic", "nearest", "cropped"]
    """bilinear: upsample logits (CARIS, LAVT, ReLA); bicubic: upsample probabilities (CRIS, DETRIS); nearest: take the
    nearest logit at the original size (ReMamber); cropped: cut the padding of resize `longest` off, then upsample
    logits (SAM, GSVA)."""
    sentences: Literal["all", "first"]
    """Score every sentence of a referent, or its first only."""
    ties: Literal["ge", "gt"]
    """Pr@t counts IoU >= t (LAVT, CARIS, ReLA) or IoU > t (CRIS, DETRIS, which also add 1e-6 to every union)."""
    mask_parts: MaskParts
    """Ground truth where two polygons of one object overlap: foreground (union) or background (exclusive: LAVT,
    CGFormer). A run's data.mask_parts comes before the model's own."""
    no_target_pixels: int = key(0, low=0)
    """For a model without a no-target head on gRefCOCO: a mask of fewer pixels than this means "nothing in this image"
    (50 is reported as the GRES paper's rule); 0 = never."""
    answers: Literal["given", "written"] = "given"
    """Where a language model reads conversations: given = the ground truth's answers are in its input, as GSVA and LISA
    are scored; written = it answers itself, one sentence per question."""


@partial_of(Protocol)
class ProtocolOverrides(Partial):
    """What a run changes of how its model is scored. null = the model's own protocol."""


@dataclass
class ModelConfig:
    """The registered model and its initial weights."""

    name: str = key("caris_tiny", basic=True)
    """A registered model; `amltrain list models` lists them."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's builder, e.g. drop_path_rate."""
    vision_weights: str | None = key(None, basic=True)
    """Pretrained vision encoder: a timm or Hub name, or an official .pth / .safetensors file. null = random."""
    text_weights: str | None = key(None, basic=True)
    """Pretrained text encoder: a Hub id or folder, or an official file. null = random."""
    freeze: list[str] = field(default_factory=list)
    """Modules that keep their weights, by name or pattern: [text], ["vision.layers.[01]"]."""
    lora: dict[str, int] = field(default_factory=dict)
    """Modules that learn by low-rank updates of their linear layers, by name or pattern, with the rank: {text: 16}."""
    checkpoint: str | None = key(None, basic=True)
    """Start from all weights of a model folder (…/step-N/model) or a Hub repository (user/name[@revision])."""
    allow_random_frozen: bool = key(False, scope=FREE)
    """Train although a frozen encoder has random weights, which it keeps."""
    gradient_checkpointing: bool = key(False, scope=FREE)
    """Recompute encoder activations in the backward pass: less memory, about a third more time."""


@dataclass
class LossConfig:
    """The segmentation loss. null = the model's own."""

    name: str | None = None
    """A loss of amltrain.losses, e.g. weighted_cross_entropy."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the loss, e.g. background_weight."""


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: str = "adamw"
    """adamw or adam, or one of timm's: sgd, nadamw, lamb, lion, adafactor, muon, ...; `amltrain list optimizers`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {momentum: 0.9, nesterov: true} of sgd, {betas: [0.9, 0.99]} of lion."""
    layer_decay: float | None = key(None, low=POSITIVE, high=1)
    """Factor of the rate from block to block of the encoders, towards their input, e.g. 0.75; null = one rate."""
    lr: float = key(1e-4, low=0, basic=True)
    """Base learning rate; a model's parameter groups scale it."""
    weight_decay: float = key(0.01, low=0, basic=True)
    """Weight decay of the groups that decay."""
    betas: tuple[float, float] = key((0.9, 0.999), low=0, high=math.nextafter(1.0, 0.0))
    """Adam's betas."""
    eps: float = key(1e-8, low=0)
    """Adam's epsilon."""
    amsgrad: bool = False
    """Use AMSGrad (CGFormer)."""
    schedule: Literal["poly", "poly_caris", "multistep", "cosine", "constant", "warmup_decay"] = key("poly", basic=True)
    """poly: (1 - t/T)^power after the warm-up; poly_caris: the official CARIS rule, whose step 0 runs at full rate;
    warmup_decay: linear up and down, as GSVA and LISA, whose step 0 runs at full rate too."""
    power: float = key(0.9, low=0)
    """Exponent of poly."""
    warmup_steps: int = key(0, low=0)
    """Steps of linear warm-up."""
    milestones: list[float] = key(default_factory=list, low=0, high=1)
    """multistep: where to multiply by gamma, as shares of the run."""
    gamma: float = key(0.1, low=0)
    """multistep: factor at each milestone."""
    per_epoch: bool = False
    """The schedule moves once per epoch instead of every step, as in the official code of C3VG, DeRIS and ReMamber."""
    epoch_lag: int = key(0, low=0)
    """per_epoch: epochs by which the schedule is late; 1 in ReMamber, whose first two epochs run at the full rate."""
    first_epochs: list[float] = key(default_factory=list, low=0, high=1)
    """Factors of the first epochs, on top of the schedule: [0.25, 0.5, 0.75] in C3VG, [0.5] in DeRIS on RefCOCO."""
    min_lr: float = key(0.0, low=0)
    """Rate that the schedule ends at instead of 0, for every group with a larger base rate."""
    first_epoch_full_lr: bool = False
    """Train every parameter group at the full lr, unscaled, in the first pass over the training set (also where the run
    is given in steps); the schedule is unchanged. In the official CRIS code CLIP starts so, at ten times its rate."""
    clip_norm: float | None = key(1.0, low=POSITIVE)
    """Largest norm of the whole gradient; null = no clipping."""


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int | None = key(50, low=1, scope=SAID, basic=True)
    """Passes over the training set. Give this or max_steps."""
    max_steps: int | None = key(None, low=1, scope=SAID, basic=True)
    """Optimizer steps; overrides epochs."""
    stop_after: int | None = key(None, low=1, scope=FREE)
    """End after this many epochs (steps, where max_steps is given) on the learning-rate schedule of the whole run: the
    same bits as the start of the whole run. Rerun with a larger value, or null, to continue."""
    global_batch_size: int = key(16, low=1, basic=True)
    """Samples per optimizer step over all processes; the same for any number of processes."""
    micro_batch_size: int | None = key(None, low=1, scope=FREE, basic=True)
    """Samples per forward pass on one process; null = global_batch_size / processes. The rest is accumulated."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = key(None, scope=SAID, basic=True)
    """Overrides the setting of `accelerate launch`."""
    sync_batchnorm: bool = False
    """Convert batch norms to SyncBN when there is more than one process."""
    tf32: bool = key(True, scope=FREE)
    """Let float32 matrix products use TensorFloat-32 on GPUs that have it: faster, 10 bits of mantissa."""
    compile: bool = key(False, scope=FREE)
    """Compile the blocks that the model repeats with torch.compile. Costs minutes at the start; evaluation runs as it
    is."""
    ema_decay: float | None = key(None, low=0, high=1)
    """Keep an exponential moving average of the weights, evaluate and export it; null = off."""
    log_every: int = key(10, low=1, scope=FREE)
    """Steps between log lines."""
    limit_samples: int | None = key(None, low=1)
    """Train on the first N samples only (a smoke test); null = all."""
    dry_run: bool = key(False, scope=LOCAL)
    """Check everything, train one step, evaluate one batch, and leave nothing behind."""
    profile: int | None = key(None, low=1, scope=LOCAL)
    """Profile N steps, after two others, into OUTPUT/profile; null = off."""
    loader_timeout: float = key(10.0, low=POSITIVE, scope=LOCAL)
    """Minutes to wait for a batch before data loading counts as broken."""
    max_bad_steps: int = key(10, low=1, scope=FREE)
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    collective_timeout: float = key(10.0, low=POSITIVE, scope=FREE)
    """Minutes that processes wait for one that does not answer before the run ends."""
    callbacks: list[str] = key(default_factory=list, scope=FREE)
    """Callbacks of your own or of plugins, by name; `amltrain list callbacks` lists them. Options of each are in the
    section of its name."""
    time_limit: float | None = key(None, low=0, scope=FREE)
    """Hours after which the run saves and stops with exit code 75 (requeue me); null = none."""


@dataclass
class EvaluationConfig:
    """When and on what to evaluate."""

    splits: list[str] = key(default_factory=lambda: ["val"], scope=FREE, basic=True)
    """Splits to evaluate; `refcoco+:val` names a data set if there are several."""
    every_steps: int | None = key(None, low=1, scope=FREE)
    """Evaluate every N steps; null = at the end of every epoch."""
    batch_size: int = key(16, low=1, scope=FREE)
    """Samples per forward pass on one process."""
    protocol: ProtocolOverrides = key(default_factory=ProtocolOverrides, scope=FREE)
    """How predictions are scored; null fields = the model's own protocol."""
    best_metric: str = key("oIoU", basic=True)
    """Metric that chooses the `best` checkpoint, on the first split unless written `split/metric`."""
    patience: int | None = key(None, low=1, scope=FREE)
    """Stop after this many evaluations without a better best_metric; null = never."""
    max_samples: int | None = key(None, low=1, scope=FREE)
    """Score only the first N samples of a split (a smoke test; recorded in the results)."""
    shuffle_sentences: bool = key(False, scope=FREE)
    """Give every image another sample's sentence: shows whether the model reads the words."""
    pictures: int = key(8, low=0, scope=FREE)
    """Predictions drawn per evaluation."""


@dataclass
class CheckpointConfig:
    """Which checkpoints are saved, and when."""

    every_steps: int | None = key(None, low=1)
    """Save every N steps, besides before and after every evaluation; null = no other."""
    keep: int | Literal["all"] = key(3, low=1)
    """Newest checkpoints kept, besides best and last; all = every one."""
    initial: bool = False
    """Also save the model before the first step, as step-000000 (`keep` counts it)."""
    frozen: Literal["saved", "left_out"] = key("saved", scope=FREE)
    """left_out: parameters that do not train are not written; a checkpoint names the weights that they come from
    (model.vision_weights, text_weights or checkpoint) and their SHA-256, and needs them again to be loaded."""


@dataclass
class HubConfig:
    """Publishing on the HuggingFace Hub."""

    push: Literal["never", "best", "last", "state"] = key("never", basic=True)
    """Push every new best, or every new last checkpoint's model, with a model card; state: the last one's model and all
    that `--resume user/name` needs to go on elsewhere. This happens in the background: no failure of it stops training,
    and what failed is tried again when the run ends."""
    repo: str | None = None
    """Repository, user/name; made when it is not there."""
    private: bool = True
    """Make the repository private."""
    picture: bool = True
    """Show one prediction on held-out data on the card; false where photographs must not leave the machine."""


@dataclass
class TrackingConfig:
    """Trackers. Off-line by default."""

    trackers: list[str] = key(default_factory=lambda: ["tensorboard"], basic=True)
    """Accelerate trackers: tensorboard, wandb, trackio, ...; an empty list turns them off."""
    project: str = "amltrain"
    """Project in trackers that have projects."""
    name: str | None = None
    """Name of the run in the trackers; null = the name of the output folder."""
    group: str | None = None
    """Group of runs in trackers that have groups."""
    optional: bool = False
    """Train without a tracker that cannot start, instead of ending the run."""


@dataclass
class RunConfig:
    """A whole training run."""

    output: str | None = key(None, scope=LOCAL, basic=True)
    """Folder for checkpoints, logs, results and pictures; null = runs/MODEL-METHOD-DATA."""
    seed: int = key(0, low=0, high=2**32 - 1, basic=True)
    """Seed of everything random."""
    resume: str = key("auto", scope=LOCAL, basic=True)
    """auto: resume from output/last if it exists, or with `hub.push state` from the Hub; never: start a new run (a
    folder that has checkpoints is rejected); or a checkpoint folder; or user/name: go on with the run that the Hub has,
    in `output`."""
    method: str = key("aml", basic=True)
    """Training method; `amltrain list methods` lists them. Its options are in the section of its name, e.g. aml.tau."""
    method_options: Any = None
    """Options of the chosen method, read from its section; None = the method's defaults."""
    augment_options: dict[str, Any] = field(default_factory=dict)
    """Options of the augmentations that data.augment names, read from the sections of the same names."""
    callback_options: dict[str, Any] = field(default_factory=dict)
    """Options of the callbacks that train.callbacks names, read from the sections of the same names."""
    imports: list[str] = key(default_factory=list, scope=FREE)
    """Plugins that the run was started with (--import), for the record. A config never imports them by itself."""
    data: DataConfig = field(default_factory=DataConfig)
    preprocess: PreprocessOverrides = field(default_factory=PreprocessOverrides)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = key(default_factory=CheckpointConfig, scope=FREE)
    hub: HubConfig = key(default_factory=HubConfig, scope=LOCAL)
    tracking: TrackingConfig = key(default_factory=TrackingConfig, scope=LOCAL)

    def __post_init__(self) -> None:
        if self.hub.push != "never" and not self.hub.repo:
            raise UserError(f"hub.push={self.hub.push} needs --hub.repo user/name")
        if self.hub.push == "state" and not self.hub.private:
            raise UserError(
                "hub.push=state needs a private repository: a run's state names your folders; leave hub.private"
            )
        check_types(self)
        check_ranges(self)
        if self.output is None:
            self.output = f"runs/{self.model.name}-{self.method}-{'+'.join(self.data.datasets)}"

    @property
    def folder(self) -> Path:
        """The output folder."""
        assert self.output is not None  # set above
        return Path(self.output)


def sectioned(config: RunConfig) -> dict[str, Any]:
    """A run as plain nested values, with the options of its method and augmentations in sections of their own names."""
    values = asdict(config)
    options, augmentations = values.pop("method_options"), values.pop("augment_options")
    sections = {config.method: options, **augmentations, **values.pop("callback_options")}
    return {**values, **{name: section for name, section in sections.items() if section}}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values as in a YAML file, where dotted keys ("train.max_steps") may stand for groups too.

    Raises UserError for anything but a mapping, for a key that is not a text and for one that is set twice.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"a run is a RunConfig, nested values or the name of a YAML file, not of type {type(values).__name__}"
        )
    result: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{name!r} is of type {type(name).__name__}; write the name of a key as a text")
        _add(result, name, value, "")
    return result


def _add(result: dict[str, Any], name: str, value: Any, prefix: str) -> None:
    """Set one key, or a group of them, in nested values."""
    group, _, rest = name.partition(".")
    inner = {rest: value} if rest else value
    if not isinstance(inner, Mapping) or not isinstance(result.setdefault(group, {}), dict):
        if group in result:
            raise UserError(f"{prefix}{group} is set twice; keep one of them")
        result[group] = inner
        return
    for name_below, below in inner.items():
        if not isinstance(name_below, str):
            raise UserError(
                f"{name_below!r} in {prefix}{group} is of type {type(name_below).__name__}; write the key as a text"
            )
        _add(result[group], name_below, below, f"{prefix}{group}.")


def free_options(config: RunConfig) -> list[str]:
    """Keys of the method's options that a resumed run may change."""
    if config.method_options is None:
        return []
    own = fields(config.method_options)
    return [f"{config.method}.{option.name}" for option in own if option.metadata.get("scope") == FREE]
