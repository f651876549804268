"""Score a trained model, or masks that any model predicted, on splits of prepared data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amltrain.config.fields import ANY, check_number
from amltrain.config.schema import DataConfig, EvaluationConfig, Preprocess, Protocol, ProtocolOverrides
from amltrain.data.catalog import SUITES, dataset_spec, find_manifest, find_spec
from amltrain.data.loaders import build_eval_loaders, resolve_splits
from amltrain.data.prepare import check_scenes, ensure_prepared
from amltrain.distributed import PREPARATION, on_main_process
from amltrain.errors import UserError
from amltrain.evaluation.evaluator import evaluate_model, evaluate_predictions
from amltrain.evaluation.perturbations import PAPER, Perturbation, build_perturbation
from amltrain.evaluation.prediction_files import PredictionWriter, find_predictions, split_contents
from amltrain.evaluation.results import (
    Results,
    merge_results,
    moved_models,
    named_preprocess,
    named_protocol,
    presets,
    read_results,
    run_protocol,
)
from amltrain.evaluation.samples import sample_table, write_samples
from amltrain.evaluation.tables import write_tables
from amltrain.files import writing
from amltrain.hub.model_folder import load_pretrained, read_training
from amltrain.run_folder import BEST, MODEL, RESULTS_FILE, RUN_CONFIG, SAMPLES, find_model_folder


@dataclass(kw_only=True)
class EvaluateOptions:
    """What `evaluate` scores, and how; fields as the flags of `amltrain evaluate`, which have the same defaults.

    Give `checkpoint` (run, model folder, Hub repository) or `predictions` (masks, with a `preset`).
    """

    checkpoint: str | None = None
    predictions: str | None = None
    data: DataConfig
    splits: Sequence[str] = ("val",)
    output: str | None = None
    preset: str | None = None
    protocol: ProtocolOverrides = field(default_factory=ProtocolOverrides)
    batch_size: int = 16
    max_samples: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    pictures: int = 8
    save_predictions: Literal["rle", "masks"] | None = None
    seed: int = 0
    shuffle_sentences: bool = False
    perturbations: Sequence[str] = ()
    severity: Sequence[float] = ()
    encode_once: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.output or _default_output(str(self.checkpoint or self.predictions)))


class Source(NamedTuple):
    """Subject of an evaluation: a model, or predictions in files (then `model` and `folder` are None)."""

    model: nn.Module | None
    tokenizer: Any
    preprocess: Preprocess
    protocol: Protocol
    folder: Path | None
    identity: Mapping[str, Any] = MappingProxyType({})


class NoText:
    """Stands in for a tokenizer where no model reads the sentences."""

    max_tokens = 1

    def __call__(self, sentence: str) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)


def evaluate(options: EvaluateOptions) -> list[Results]:
    """Score every split under every perturbation; every process returns the same results, the main one writes them."""
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    output = options.folder
    perturbations = _perturbations(options)
    splits = evaluation_splits(options.splits, options.data)
    source = _source(options)
    protocol = run_protocol(source.protocol, options.data, options.protocol)
    if source.model is None:
        for dataset, split, _ in resolve_splits(splits, options.data.datasets, options.data.prepared):
            find_predictions(str(options.predictions), dataset, split)
    on_main_process(accelerator, lambda: _check_output(output))
    on_main_process(accelerator, lambda: ensure_prepared(options.data, accelerator.print), wait=PREPARATION)
    check_scenes(options.data)
    if source.model is not None:
        source = source._replace(model=accelerator.prepare_model(source.model, evaluation_mode=True))
    results: list[Results] = []
    rows: list[Results] = []
    for perturbation in perturbations:
        for loader in _loaders(options, splits, source, protocol, perturbation).values():
            result = _score(accelerator, options, source, protocol, loader, perturbation, output)
            results.append(result)
            # after every split, so a failed evaluation keeps finished splits
            rows = on_main_process(accelerator, partial(_merge, output / RESULTS_FILE, result))
    if accelerator.is_main_process:
        for line in moved_models(rows):
            accelerator.print(f"WARNING: {line}")
    return results


def _merge(path: Path, result: Results) -> list[Results]:
    """Add a row; returns all rows as a file has them, without samples."""
    merge_results(path, [result], also=write_tables)
    return read_results(path)


def _score(
    accelerator: Accelerator,
    options: EvaluateOptions,
    source: Source,
    protocol: Protocol,
    loader: DataLoader[Any],
    perturbation: Perturbation | None,
    output: Path,
) -> Results:
    """Score one split, and write its samples, picture and predictions on the main process."""
    dataset: Any = loader.dataset
    provenance = _provenance(options, source, perturbation)
    if source.model is None:
        first = dataset.info(0)
        predictions = find_predictions(str(options.predictions), first.dataset, first.split)
        result = evaluate_predictions(
            accelerator, predictions, loader, protocol, pictures=options.pictures, provenance=provenance
        )
        writer = None
    else:
        writer = _writer(accelerator, options, dataset, output)
        result = evaluate_model(
            accelerator,
            source.model,
            loader,
            protocol,
            pictures=options.pictures,
            provenance=provenance,
            writer=writer,
            encode_once=options.encode_once,
        )
    files = {"samples": f"{SAMPLES}/{result.stem()}.parquet"}
    if writer is not None:
        facts = {**source.identity, "checkpoint": options.checkpoint, "data_fingerprint": split_contents(dataset)}
        files["predictions"] = f"predictions/{writer.finish(output / 'predictions' / result.stem(), facts).name}"
    if options.pictures:
        files["picture"] = f"pictures/{result.stem()}.png"

    def write() -> None:
        write_samples(output / files["samples"], sample_table(result, dataset), result.provenance)
        if options.pictures:
            from amltrain.evaluation.draw import prediction_sheet, save_picture  # matplotlib takes a second

            save_picture(prediction_sheet(result, dataset), output / files["picture"])

    on_main_process(accelerator, write)
    return replace(result, files=files)


def _writer(accelerator: Accelerator, options: EvaluateOptions, dataset: Any, output: Path) -> PredictionWriter | None:
    if options.save_predictions is None:
        return None
    return PredictionWriter(output / "predictions", options.save_predictions, accelerator)


def _source(options: EvaluateOptions) -> Source:
    own = named_protocol(options.preset) if options.preset else None
    if options.predictions:
        if own is None:
            raise UserError(f"--predictions needs a protocol: give --preset ({', '.join(presets())})")
        return Source(None, NoText(), named_preprocess(str(options.preset)), own, None)
    pretrained = load_pretrained(str(options.checkpoint))
    if pretrained.tokenizer is None:
        raise UserError(f"{options.checkpoint} has no tokenizer files; save or convert it again with a tokenizer")
    assert pretrained.identity is not None, "load_pretrained checks what it loads"
    return Source(
        pretrained.model,
        pretrained.tokenizer,
        pretrained.preprocess,
        own or pretrained.protocol,
        Path(pretrained.folder),
        pretrained.identity.described(),
    )


def evaluation_splits(names: Sequence[str], data: DataConfig) -> list[str]:
    """The splits named, each once; `all`: every evaluation split of every data set. Raises UserError for any other."""
    if "all" in names:
        specs = {name: find_spec(name, data.prepared) for name in data.datasets}
        names = [f"{name}:{split}" for name, spec in specs.items() for split in spec.evaluation_splits]
    resolve_splits(names, data.datasets, data.prepared)
    return list(dict.fromkeys(names))


def choose_suite(name: str, prepared: str) -> tuple[list[str], str]:
    """The data sets of a suite that are prepared, and a sentence about the others, empty if there are none.

    Raises UserError with that sentence if nothing is prepared.
    """
    found = [member for member in SUITES[name] if find_manifest(prepared, member) is not None]
    others = [f"{member} ({dataset_spec(member).source})" for member in SUITES[name] if member not in found]
    if not others:
        return found, ""
    absent = (
        f"Not prepared: {', '.join(others)}; put the files into one folder and run amltrain data prepare "
        f"--dataset NAME --refer_root FOLDER --output {prepared}"
    )
    if not found:
        raise UserError(f"{prepared} holds no data set of the suite {name}. {absent}")
    return found, f"{absent}."


def _perturbations(options: EvaluateOptions) -> list[Perturbation | None]:
    """None is the image as it is; `all` the seven of the paper; every one at every severity."""
    names = [n for name in options.perturbations or ["none"] for n in (PAPER if name == "all" else [name])]
    found: list[Perturbation | None] = []
    for name in dict.fromkeys(names):
        severities: Sequence[float | None] = options.severity or [None]
        found += [None] if name == "none" else [build_perturbation(name, s, options.seed) for s in severities]
    return found


def _loaders(
    options: EvaluateOptions, splits: list[str], source: Source, protocol: Protocol, perturbation: Perturbation | None
) -> dict[str, DataLoader[Any]]:
    evaluation = EvaluationConfig(
        splits=splits,
        batch_size=options.batch_size,
        max_samples=options.max_samples,
        shuffle_sentences=options.shuffle_sentences,
    )
    return build_eval_loaders(
        options.data,
        source.preprocess,
        evaluation,
        protocol,
        source.tokenizer,
        seed=options.seed,
        perturb=perturbation,
        boxes=getattr(source.model, "needs_boxes", False),
    )


def _provenance(options: EvaluateOptions, source: Source, perturbation: Perturbation | None) -> dict[str, Any]:
    described = {
        "max_samples": options.max_samples,
        "perturbation": perturbation.describe() if perturbation else None,
        "seed": options.seed,
    }
    if source.folder is None:
        return {"predictions": options.predictions, **described}
    training = read_training(source.folder)
    data = training["recipe"]["data"] if training else {}
    return {
        "checkpoint": options.checkpoint,
        "trained_on": data.get("datasets"),
        "train_split": data.get("train_split"),
        "leak_filter": data.get("leak_filter"),
        "train_seed": training["recipe"]["seed"] if training else None,
        "commit": training["commit"] if training else None,
        **source.identity,
        **described,
    }


def as_trained(checkpoint: str) -> dict[str, Any]:
    """Return default data settings: the model's training data sets and their place."""
    data = trained_data(checkpoint)
    shapes = {f"data.shapes.{key}": value for key, value in data.get("shapes", {}).items()}
    return {f"data.{name}": data[name] for name in ("datasets", "prepared") if name in data} | shapes


def _check(options: EvaluateOptions) -> None:
    if not options.checkpoint and not options.predictions:
        raise UserError("give --checkpoint (a run or model folder) or --predictions (masks to score)")
    if options.checkpoint and options.predictions:
        raise UserError("give --checkpoint or --predictions, not both")
    if options.severity and not options.perturbations:
        raise UserError("--severity belongs to perturbations; give --perturbations as well")
    if options.predictions:
        for flag in ("perturbations", "save_predictions", "shuffle_sentences"):
            if getattr(options, flag):
                raise UserError(f"--{flag} needs a model; it cannot be used with --predictions")
    for flag, low in (("batch_size", 1), ("max_samples", 1), ("pictures", 0)):
        check_number(f"--{flag}", getattr(options, flag), low, ANY)
    for severity in options.severity:
        check_number("--severity", severity, 0, ANY)
    check_number("--protocol.threshold", options.protocol.threshold, 0, 1)


def _default_output(source: str) -> str:
    """evaluation/RUN-best for RUN and RUN/best/model, evaluation/user-name for a Hub repository."""
    if (Path(source) / BEST / MODEL).is_dir():
        source = str(Path(source) / BEST)
    parts = [part for part in Path(source).parts if part not in ("/", "..", MODEL)]
    return str(Path("evaluation") / "-".join(parts[-2:]))


def _check_output(folder: Path) -> None:
    """Make the folder, and raise UserError if it cannot be written or holds a damaged results.json."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / RESULTS_FILE).exists():
        read_results(folder / RESULTS_FILE)


def trained_data(place: str) -> dict[str, Any]:
    """The `data` section of a model's recipe; empty where the model folder does not record it.

    A model folder leaves out paths, because it may be published; `prepared` comes from the config.yaml of the run that
    the folder lies in, and is only there where that path exists.
    """
    folder = find_model_folder(place)
    training = read_training(folder)
    data = {} if training is None else {k: v for k, v in training["recipe"]["data"].items() if k != "prepared"}
    prepared = _prepared(folder)
    return data | ({"prepared": prepared} if data and prepared else {})


def _prepared(folder: Path) -> str | None:
    """RUN/config.yaml for RUN/model, RUN/best/model and RUN/step-N/model."""
    for run in folder.absolute().parents[:2]:
        try:
            config = yaml.safe_load((run / RUN_CONFIG).read_text(encoding="utf-8"))
            prepared = config["data"]["prepared"]
        except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
            continue
        return prepared if isinstance(prepared, str) and Path(prepared).is_dir() else None
    return None
