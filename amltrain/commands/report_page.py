"""Score a model and write the HTML page: what `amltrain report` does after its arguments are read."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amltrain.config.ranges import ANY, check_number
from amltrain.config.schema import DataConfig, EvaluationConfig, ShapesConfig
from amltrain.data.loaders import build_eval_loaders
from amltrain.errors import UserError, first_line
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.report.collect import choose, predict_cards, sample_rows
from amltrain.evaluation.report.curves import by_length, histogram, read_log, training_charts
from amltrain.evaluation.report.evaluated import read_evaluation
from amltrain.evaluation.report.page import SplitPart, check_writable, render, write_page
from amltrain.hub.find import find_model_folder
from amltrain.hub.model_folder import Pretrained, load_pretrained, read_training
from amltrain.methods.aml.maps import Aligner, build_aligner


class Source(NamedTuple):
    """Where a report comes from. run: the run's folder, None for a model without one; model: folder or repository."""

    run: Path | None
    model: str
    settings: dict[str, Any]


def report(args: argparse.Namespace) -> Path:
    """Write the page and return its path."""
    for flag, low in (("pictures", 0), ("side", 32), ("batch_size", 1), ("max_samples", 1)):
        check_number(f"--{flag}", getattr(args, flag), low, ANY)
    if args.results and args.max_samples:
        raise UserError("--results holds scores of whole splits; leave --max_samples out")
    source = find_source(args.run, args.checkpoint)
    output = Path(args.output) if args.output else (source.run or Path(".")) / "report.html"
    find_model_folder(source.model)  # a name that is nothing at all is refused as such
    if source.run is None and not args.output:
        raise UserError(
            f"{source.model} is not the folder of a run: it has no log.jsonl; correct it, or give --output for a page "
            "about a model alone"
        )
    check_writable(output)
    pretrained = load_pretrained(source.model)
    training = read_training(find_model_folder(source.model))
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    model = accelerator.prepare_model(pretrained.model, evaluation_mode=True)
    aligner = build_aligner(pretrained.model, training)
    data = find_data(source, training, args)
    splits = args.splits or source.settings.get("evaluation", {}).get("splits") or ["val"]
    options = (data, pretrained, splits, args)
    scored, shown = _loaders(*options, pretrained.protocol.frame), _loaders(*options, "original")
    parts = [
        _split_part(accelerator, model, pretrained, scored[name], shown[name], aligner, args, source, first=i == 0)
        for i, name in enumerate(scored)
    ]
    curves = training_charts(read_log(source.run / "log.jsonl")) if source.run else []
    tau = aligner.tau if aligner is not None else None
    page = render(_title(source), _facts(source, pretrained, aligner), curves, parts, tau)
    write_page(output, page)
    return output


def find_source(run: str, checkpoint: str) -> Source:
    """Find the model of a run, or take `run` itself as a model. Raises UserError if a run has no checkpoint."""
    folder = Path(run)
    if not (folder / "log.jsonl").is_file() and not (folder / "config.yaml").is_file():
        return Source(None, run, {})
    settings: Any = {}
    try:
        if (folder / "config.yaml").is_file():
            settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read ({first_line(error)})") from error
    names = [checkpoint, *(["last"] if checkpoint == "best" else [])]
    for name in names:
        if (folder / name).exists():
            return Source(folder, str(folder / name), settings if isinstance(settings, dict) else {})
    raise UserError(f"the run {run} has no checkpoint {' or '.join(names)}; it has saved nothing yet, or name another")


def find_data(source: Source, training: dict[str, Any] | None, args: argparse.Namespace) -> DataConfig:
    """The data that the run used, unless the arguments name others."""
    data = {**((training or {}).get("recipe", {}).get("data") or {}), **(source.settings.get("data") or {})}
    datasets = args.datasets or data.get("datasets")
    if not datasets:
        raise UserError("nothing names the data sets to score on; give --datasets and --prepared")
    shapes = ShapesConfig(**(data.get("shapes") or {}))
    return DataConfig(
        datasets=list(datasets), prepared=args.prepared or data.get("prepared") or "prepared", shapes=shapes, workers=0
    )


def _loaders(
    data: DataConfig,
    pretrained: Pretrained,
    splits: Sequence[str],
    args: argparse.Namespace,
    frame: Literal["network", "original"],
) -> dict[str, DataLoader]:
    if pretrained.tokenizer is None:
        raise UserError(f"{pretrained.folder} has no tokenizer files; save or convert it again with a tokenizer")
    evaluation = EvaluationConfig(splits=list(splits), batch_size=args.batch_size, max_samples=args.max_samples)
    protocol = replace(pretrained.protocol, frame=frame)
    return build_eval_loaders(data, pretrained.preprocess, evaluation, protocol, pretrained.tokenizer)


def _split_part(
    accelerator: Accelerator,
    model: Any,
    pretrained: Pretrained,
    scored: DataLoader,
    shown: DataLoader,
    aligner: Aligner | None,
    args: argparse.Namespace,
    source: Source,
    *,
    first: bool,
) -> SplitPart:
    rule = pretrained.protocol
    if args.results:
        results = read_evaluation(args.results, source.model, rule, scored.dataset)
    else:
        provenance = {"checkpoint": str(args.run), "max_samples": args.max_samples}
        results = evaluate_model(accelerator, model, scored, rule, provenance=provenance)
    rows = sample_rows(results, scored.dataset)
    chosen = list(dict.fromkeys(args.samples)) if first else []
    unknown = set(chosen) - set(rows.sample_id.tolist())
    if unknown:
        raise UserError(f"--samples {min(unknown)} is not a sample id of {results.dataset} {results.split}")
    picked = choose(rows, args.pictures, args.seed, chosen)
    cards = predict_cards(
        accelerator, model, shown, rule, rows, picked, aligner,
        batch_size=args.batch_size, side=args.side,
    )  # fmt: skip
    lengths = by_length("IoU by length of the sentence", rows.iou, rows.words)
    charts = [histogram("Distribution of IoU", rows.iou), lengths]
    return SplitPart(results, charts, list(tqdm(cards, desc="pictures", total=len(picked), leave=False, disable=None)))


def _title(source: Source) -> str:
    return f"Run {source.run.resolve().name}" if source.run else Path(source.model).name


def _facts(source: Source, pretrained: Pretrained, aligner: Aligner | None) -> dict[str, str]:
    preprocess = pretrained.preprocess
    facts = {
        "model": pretrained.name,
        "checkpoint": Path(source.model).resolve().name if source.run else source.model,
        "parameters": f"{sum(p.numel() for p in pretrained.model.parameters()) / 1e6:.1f} M",
        "input": f"{preprocess.size} px, {preprocess.resize}, {preprocess.max_tokens} tokens",
    }
    if aligner is not None:
        s = aligner.settings
        facts["AML masks"] = f"tau {s.tau:g}, rho {s.rho:g}, blocks of {s.block} px, " + (
            "as in this model's training"
            if aligner.trained
            else "the paper's settings; this model did not train with AML"
        )
        if aligner.temperature is not None:
            facts["temperature"] = f"{aligner.temperature:.4g}, solved on the first split"
    return facts
