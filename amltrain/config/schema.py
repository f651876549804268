"""A run, as plain dataclasses. The docstring under each field is its `--help`.

Leaf functions take plain values; only `build_*` functions and commands see a config.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from amltrain.config.ranges import check_ranges
from amltrain.errors import UserError

Fields = TypeVar("Fields")
MaskParts = Literal["union", "exclusive"]

COMBINED = ("refcoco", "refcoco+", "refcocog")
"""What `combined` stands for, the last one split by umd."""


@dataclass
class ShapesConfig:
    """Synthetic scenes, drawn when a data set of the refshapes family is asked for and not there yet."""

    train: int = 4000
    """Training scenes."""
    evaluation: int = 250
    """Scenes in every other split."""
    size: int = 96
    """Side of a scene, pixels."""
    seed: int = 0
    """Seed of the scenes."""


@dataclass
class DataConfig:
    """Which referring expressions to train on and where they lie."""

    datasets: list[str] = field(default_factory=lambda: ["refshapes"])
    """Data sets to train on: refcoco, refcoco+, refcocog, refcocog-google, grefcoco, or synthetic refshapes,
    refshapes+, refshapesg, grefshapes. More than one is combined training; [combined] means refcoco, refcoco+ and
    refcocog, [combined-unfiltered] the same with leak_filter off."""
    prepared: str = "prepared"
    """Folder with the prepared Parquet data (one folder per data set), or a Hub data set id."""
    refer_root: str | None = None
    """Folder in the original REFER layout (refcoco/refs(unc).p, refcoco/instances.json, ...). When the prepared data is
    missing it is made from here first."""
    image_root: str | None = None
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
    mask_parts: MaskParts | None = None
    """Pixels covered by two polygons of one object: foreground (union) or background (exclusive: LAVT, CGFormer).
    null = the model's own; evaluation may be told otherwise by its protocol."""
    streaming: bool = False
    """Read the Parquet files as a stream instead of from a memory-mapped copy."""
    workers: int = 2
    """Data loading processes per training process."""
    max_skipped: float = 0.001
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
                f"data.datasets names {', '.join(sorted(twice))} more than once; data.weights says how much"
            )


@dataclass
class PreprocessConfig:
    """How an image and a sentence become tensors. null = the model's own protocol."""

    size: int | None = None
    """Side of the square network input, pixels."""
    resize: Literal["square", "letterbox"] | None = None
    """square: stretch, aspect ratio not kept (CARIS, LAVT, ReLA); letterbox: keep it and pad (CRIS, DETRIS)."""
    normalization: Literal["imagenet", "clip", "half"] | None = None
    """Mean and standard deviation subtracted from and divided out of the image (0..1)."""
    tokenizer: str | None = None
    """Hub id or folder of a tokenizer; `wordpiece` builds a vocabulary from the training sentences."""
    max_tokens: int | None = None
    """Tokens per sentence, special tokens included; longer sentences are cut."""
    sentence_field: Literal["sent", "raw"] | None = None
    """Which text of the REFER files: cleaned (sent) or as typed (raw)."""


@dataclass
class ProtocolConfig:
    """How a prediction is scored. null = the model's own protocol."""

    frame: Literal["network", "original"] | None = None
    """Score masks at the network's input size or at every image's own size."""
    threshold: float | None = None
    """A pixel is foreground when its probability exceeds this; 0.5 is the argmax of two channels."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """bilinear: upsample logits (CARIS, LAVT, ReLA); bicubic: upsample probabilities (CRIS, DETRIS)."""
    sentences: Literal["all", "first"] | None = None
    """Score every sentence of a referent, or its first only."""
    ties: Literal["ge", "gt"] | None = None
    """Pr@t counts IoU >= t (LAVT, CARIS, ReLA) or IoU > t (CRIS, DETRIS, which also add 1e-6 to every union)."""
    mask_parts: MaskParts | None = None
    """Ground truth where two polygons of one object overlap: foreground (union) or background (exclusive: LAVT,
    CGFormer). null = data.mask_parts where that is given."""
    no_target_pixels: int | None = None
    """For a model without a no-target head on gRefCOCO: a mask of fewer pixels than this says "nothing in this image"
    (50 is said to be the GRES paper's rule); 0 = never."""


@dataclass
class ModelConfig:
    """Which registered model, and what it starts from."""

    name: str = "caris_tiny"
    """A registered model; `amltrain models` lists them."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's builder, e.g. drop_path_rate."""
    vision_weights: str | None = None
    """Pretrained vision encoder: a timm or Hub name, or an official .pth / .safetensors file. null = random."""
    text_weights: str | None = None
    """Pretrained text encoder: a Hub id or folder, or an official file. null = random."""
    checkpoint: str | None = None
    """Start from all weights of a model folder (…/step-N/model) or a Hub repository."""
    gradient_checkpointing: bool = False
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

    optimizer: Literal["adamw", "adam"] = "adamw"
    """Optimizer."""
    lr: float = 1e-4
    """Base learning rate; a model's parameter groups scale it."""
    weight_decay: float = 0.01
    """Weight decay of the groups that decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    eps: float = 1e-8
    """Adam's epsilon."""
    amsgrad: bool = False
    """Use AMSGrad (CGFormer)."""
    schedule: Literal["poly", "poly_caris", "multistep", "cosine", "constant"] = "poly"
    """poly: (1 - t/T)^power after the warm-up; poly_caris: the CARIS release's rule, whose step 0 runs at full rate."""
    power: float = 0.9
    """Exponent of poly."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    milestones: list[float] = field(default_factory=list)
    """multistep: where to multiply by gamma, as shares of the run."""
    gamma: float = 0.1
    """multistep: factor at each milestone."""
    first_epoch_full_lr: bool = False
    """Train every parameter group at the full lr, unscaled, in the first pass over the training set (also where the run
    is given in steps); the schedule goes on as ever. The CRIS release's CLIP starts so, at ten times its rate."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; null = no clipping."""


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int | None = 50
    """Passes over the training set. Give this or max_steps."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    global_batch_size: int = 16
    """Samples per optimizer step over all processes; kept whatever their number."""
    micro_batch_size: int | None = None
    """Samples per forward pass on one process; null = global_batch_size / processes. The rest is accumulated."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Overrides what `accelerate launch` was told."""
    sync_batchnorm: bool = False
    """Convert batch norms to SyncBN when there is more than one process."""
    compile: bool = False
    """torch.compile the model."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, evaluate and export it; null = off."""
    log_every: int = 10
    """Steps between log lines."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    collective_timeout: float = 10.0
    """Minutes that processes wait for one that does not answer before the run ends."""
    time_limit: float | None = None
    """Hours after which the run saves and stops with exit code 75 (requeue me); null = none."""


@dataclass
class EvaluationConfig:
    """When and on what to evaluate."""

    splits: list[str] = field(default_factory=lambda: ["val"])
    """Splits to evaluate; `refcoco+:val` names a data set where there are several."""
    every_steps: int | None = None
    """Evaluate every so many steps; null = at the end of every epoch."""
    batch_size: int = 16
    """Samples per forward pass on one process."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """How predictions are scored; null fields = the model's own protocol."""
    best_metric: str = "oIoU"
    """Metric that chooses the `best` checkpoint, on the first split unless written `split/metric`."""
    patience: int | None = None
    """Stop after this many evaluations without a better best_metric; null = never."""
    max_samples: int | None = None
    """Score only the first so many samples of a split (a smoke test; said in the results)."""
    shuffle_sentences: bool = False
    """Give every image another sample's sentence: shows whether the model reads the words."""
    pictures: int = 8
    """Predictions drawn per evaluation."""


@dataclass
class CheckpointConfig:
    """What is saved and when."""

    every_steps: int | None = None
    """Save every so many steps, besides before and after every evaluation; null = no other."""
    keep: int = 3
    """Newest checkpoints kept, besides best and last."""


@dataclass
class HubConfig:
    """Publishing on the HuggingFace Hub."""

    push: Literal["never", "best", "last"] = "never"
    """Push every new best, or every new last checkpoint's model, with a model card. This happens in the background: no
    failure of it stops training, and what failed is tried again when the run ends."""
    repo: str | None = None
    """Repository, user/name; made when it is not there."""
    private: bool = True
    """Make the repository private."""


@dataclass
class TrackingConfig:
    """Trackers. Off-line by default."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers: tensorboard, wandb, ...; an empty list turns them off."""


@dataclass
class AMLConfig:
    """Alignment-aware masked learning (arXiv 2602.22740). null = what the preset says."""

    enabled: bool = True
    """false trains the plain baseline."""
    preset: Literal["paper", "released"] = "paper"
    """paper: the equations; released: what the public code does."""
    features: Literal["early", "late", "pred"] | None = None
    """What is scored: features before fusion (early), after it (late), or the first pass's predicted mask (pred)."""
    projection: Literal["random", "learnable", "identity", "linear"] | None = None
    """How visual and text features meet: two fixed Gaussian matrices (random), the same trained with the model by a
    straight-through gradient (learnable), none for encoders that share a space (identity), or the released code's one
    fixed linear map of the text (linear)."""
    dim: int | None = None
    """Width D that random and learnable projections project to; the paper's is 2048."""
    projection_seed: int | None = None
    """Seed of the projections' entries."""
    explicit: bool | None = None
    """Build the two random projections instead of their collapsed form: the same scores, more work."""
    normalize: bool | None = None
    """L2-normalise every feature vector before it is projected."""
    score_padding: bool | None = None
    """Padded tokens take part in the softmax over tokens (released code)."""
    temperature: float | Literal["auto"] | None = None
    """Divides the similarities. auto: solved at the start of training so that the mean score is 0.75, then kept. 1.0 is
    the paper's formula to the letter, which blanks whole images."""
    calibrate_every: int | None = None
    """Solve an automatic temperature anew every so many steps, on the samples of that step; null = once. For encoders
    that start from nothing: what they learn moves the scores away from where they were solved."""
    tau: float | None = None
    """Score under which a pixel is weak; 0 masks nothing."""
    rho: float | None = None
    """Share of the weak pixels (selection pixel, released) or weak blocks (patch) that is selected."""
    block: int | None = None
    """Side of a masked block, pixels."""
    selection: Literal["pixel", "patch", "released"] | None = None
    """Which blocks go: any with a selected pixel (pixel), a share rho of the weak ones (patch), or what the released
    code's indexing does, which is nearly all of them (released)."""
    level: Literal["image", "feature", "random"] | None = None
    """What is masked: image blocks, the decoder's view of the weak positions (feature), or as many image blocks at
    random places (random)."""
    clean_loss_weight: float | None = None
    """Weight of the loss on the unmasked image, 0..1; the masked one gets the rest. Above 0 the unmasked image is
    encoded with gradient, its features are scored, and its text features serve the masked image too."""
    text: Literal["prompted", "plain"] | None = None
    """Token features that are scored, for models that offer it: conditioned on the image as the decoder sees them
    (prompted), or of the sentence alone (plain). null = the model's own choice."""
    stage1_size: int | None = None
    """Score a smaller copy of the image, of this side in pixels; null = the full network input."""
    cache_scores: bool = False
    """Remember each sentence's scores, for models whose scored encoders are frozen."""
    diagnostics_every: int | None = None
    """Steps between rows of alignment statistics (scores, masked share, masked referents; alignment.csv, alignment.png
    and pictures of fixed samples in the output folder, curves in the trackers); null = off."""


@dataclass
class RunConfig:
    """A whole training run."""

    output: str = "runs/quickstart"
    """Folder for checkpoints, logs, results and pictures."""
    seed: int = 0
    """Seed of everything random."""
    resume: str = "auto"
    """auto: go on from output/last when it is there; never: start anew (refuses a folder that has checkpoints); or a
    checkpoint folder."""
    data: DataConfig = field(default_factory=DataConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    aml: AMLConfig = field(default_factory=AMLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.hub.push != "never" and not self.hub.repo:
            raise UserError(f"hub.push={self.hub.push} needs --hub.repo user/name")
        check_ranges(self)


def override(defaults: Fields, own: Fields) -> Fields:
    """`defaults` with every field that `own` sets (is not None)."""
    chosen = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) is not None}  # type: ignore[arg-type]
    return replace(defaults, **chosen)  # type: ignore[type-var]
