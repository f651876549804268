"""Render a report: one HTML file without outside references.

Score a model and write the HTML page: what `amltrain report` does after its arguments are read.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from accelerate import Accelerator
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amltrain import __version__
from amltrain.config.fields import ANY, check_number
from amltrain.config.schema import DataConfig, EvaluationConfig, Protocol, ShapesConfig
from amltrain.data.loaders import build_eval_loaders
from amltrain.errors import UserError, first_line
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import describe, split_label
from amltrain.files import new_file, writing
from amltrain.hub.facts import training_facts
from amltrain.hub.model_folder import Pretrained, load_pretrained, read_training
from amltrain.methods.aml.masker import Aligner, build_aligner
from amltrain.report.collect import Card, Rows, choose, predict_cards, read_evaluation, sample_rows, with_earlier
from amltrain.report.curves import Chart, by_length, histogram, numbers, training_charts
from amltrain.run_folder import (
    BEST,
    LAST,
    LOG_FILE,
    RUN_CONFIG,
    TRAINING_FILE,
    find_model_folder,
    public_name,
    read_log,
)

GROUPS = ("chosen", "best", "worst", "gained", "lost", "random")


class SplitPart(NamedTuple):
    """Content of the page for one split: its scores, charts over all samples, and the predictions shown.

    before: scores of the model that this one is compared with.
    """

    results: Results
    charts: Sequence[Chart]
    cards: Sequence[Card]
    before: Results | None = None


def render(
    title: str, facts: Mapping[str, str], curves: Sequence[Chart], splits: Sequence[SplitPart], tau: float | None = None
) -> str:
    """Return the page. facts: name -> text, shown at its top; tau: AML's threshold, None without masks."""
    environment = Environment(
        loader=PackageLoader("amltrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cards = [card for split in splits for card in split.cards]
    return environment.get_template("report.html.j2").render(
        title=title,
        version=__version__,
        facts=facts,
        curves=[(c.title, Markup(c.svg)) for c in curves],
        splits=[_split(split) for split in splits],
        tables=_tables(splits),
        cards=cards,
        groups=[g for g in GROUPS if any(c.group == g for c in cards)],
        datasets=sorted({c.dataset for c in cards}),
        split_names=sorted({c.split for c in cards}),
        longest=max((c.words for c in cards), default=1),
        has_scores=any(c.layers.scores for c in cards),
        tau=tau,
    )


def check_writable(path: Path) -> None:
    """Raise UserError if a page cannot be written here; called before minutes of scoring."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; choose another --output")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()


def write_page(path: Path, page: str) -> None:
    """Write the page atomically. Raises UserError when it cannot be written."""
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _split(split: SplitPart) -> dict[str, Any]:
    results = split.results
    return {
        "name": f"{results.dataset} {results.split}",
        "protocol": describe(results),
        "samples": results.counts["samples"],
        "scored": results.alteration or f"all {results.counts['samples']} samples",
        "shown": len(split.cards),
        "all_missed": bool(split.cards) and all(card.iou == 0 for card in split.cards),
        "charts": [(c.title, Markup(c.svg)) for c in split.charts],
    }


def _tables(splits: Sequence[SplitPart]) -> list[dict[str, Any]]:
    """Return a table for each kind of metrics: its columns, and its rows."""
    groups: dict[tuple[str, ...], list[tuple[Results, str]]] = {}
    for split in splits:
        rows = (
            [(split.results, "")] if split.before is None else [(split.before, ", before"), (split.results, ", after")]
        )
        for result, when in rows:
            groups.setdefault(tuple(result.metrics), []).append((result, when))
    return [
        {
            "columns": names,
            "rows": [(r.dataset, split_label(r) + when, r.counts["samples"], _cells(r)) for r, when in group],
        }
        for names, group in groups.items()
    ]


def _cells(results: Results) -> list[str]:
    return ["–" if math.isnan(value) else f"{value:.2f}" for value in results.metrics.values()]


class Source(NamedTuple):
    """Where a report comes from. run: the run's folder, None for a model without one; model: folder or repository."""

    run: Path | None
    model: str
    settings: dict[str, Any]


@dataclass(kw_only=True)
class ReportOptions:
    """What a page shows; fields as the flags of `amltrain report`, with the same defaults. None = as the run has it."""

    run: str
    checkpoint: str = BEST
    splits: Sequence[str] | None = None
    datasets: Sequence[str] | None = None
    prepared: str | None = None
    results: str | None = None
    output: str | None = None
    pictures: int = 60
    samples: Sequence[int] = ()
    side: int = 320
    max_samples: int | None = None
    batch_size: int = 16
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    before: str | None = None


def report(options: ReportOptions) -> Path:
    """Write the page and return its path."""
    for flag, low in (("pictures", 0), ("side", 32), ("batch_size", 1), ("max_samples", 1)):
        check_number(f"--{flag}", getattr(options, flag), low, ANY)
    if options.results and options.max_samples:
        raise UserError("--results holds scores of whole splits; leave --max_samples out")
    source = find_source(options.run, options.checkpoint)
    output = Path(options.output) if options.output else (source.run or Path(".")) / "report.html"
    find_model_folder(source.model)  # a name that is nothing at all is rejected as such
    if source.run is None and not options.output:
        raise UserError(
            f"{source.model} is not the folder of a run: it has no {LOG_FILE}; correct it, or give --output for a page "
            "about a model alone"
        )
    check_writable(output)
    pretrained = load_pretrained(source.model)
    training = read_training(Path(pretrained.folder))
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model = accelerator.prepare_model(pretrained.model, evaluation_mode=True)
    aligner = build_aligner(pretrained.model, training)
    data = find_data(source, training, options)
    splits = options.splits or source.settings.get("evaluation", {}).get("splits") or ["val"]
    shared = (data, pretrained, splits, options)
    scored, shown = _loaders(*shared, pretrained.protocol.frame), _loaders(*shared, "original")
    earlier = None if options.before is None else _earlier(accelerator, options, data, splits)
    parts = [
        _split_part(
            accelerator, model, pretrained, scored[name], shown[name], aligner, options, source, earlier,
            name=name, first=i == 0,
        )
        for i, name in enumerate(scored)
    ]  # fmt: skip
    curves = training_charts(numbers(read_log(source.run))) if source.run else []
    tau = aligner.tau if aligner is not None else None
    rows = read_log(source.run) if source.run else []
    facts = _facts(source, pretrained, aligner, training, rows)
    if earlier is not None:
        facts["before"] = f"{earlier.pretrained.name}, {public_name(str(options.before))}"
    page = render(_title(source), facts, curves, parts, tau)
    write_page(output, page)
    return output


def find_source(run: str, checkpoint: str) -> Source:
    """Find the model of a run, or take `run` itself as a model. Raises UserError if a run has no checkpoint."""
    folder = Path(run)
    if not (folder / LOG_FILE).is_file() and not (folder / RUN_CONFIG).is_file():
        return Source(None, run, {})
    settings: Any = {}
    try:
        if (folder / RUN_CONFIG).is_file():
            settings = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read ({first_line(error)})") from error
    names = [checkpoint, *([LAST] if checkpoint == BEST else [])]
    for name in names:
        if (folder / name).exists():
            return Source(folder, str(folder / name), settings if isinstance(settings, dict) else {})
    raise UserError(f"the run {run} has no checkpoint {' or '.join(names)}; it has saved nothing yet, or name another")


def find_data(source: Source, training: dict[str, Any] | None, options: ReportOptions) -> DataConfig:
    """The data that the run used, unless the arguments name others."""
    data = {**((training or {}).get("recipe", {}).get("data") or {}), **(source.settings.get("data") or {})}
    datasets = options.datasets or data.get("datasets")
    if not datasets:
        raise UserError("nothing names the data sets to score on; give --datasets and --prepared")
    shapes = ShapesConfig(**(data.get("shapes") or {}))
    return DataConfig(
        datasets=list(datasets),
        prepared=options.prepared or data.get("prepared") or "prepared",
        shapes=shapes,
        workers=0,
    )


def _loaders(
    data: DataConfig,
    pretrained: Pretrained,
    splits: Sequence[str],
    options: ReportOptions,
    frame: Literal["network", "original"],
) -> dict[str, DataLoader[Any]]:
    if pretrained.tokenizer is None:
        raise UserError(f"{pretrained.folder} has no tokenizer files; save or convert it again with a tokenizer")
    evaluation = EvaluationConfig(splits=list(splits), batch_size=options.batch_size, max_samples=options.max_samples)
    protocol = replace(pretrained.protocol, frame=frame)
    boxes = pretrained.model.needs_boxes
    return build_eval_loaders(data, pretrained.preprocess, evaluation, protocol, pretrained.tokenizer, boxes=boxes)


class Before(NamedTuple):
    """The model that this one is compared with. scored, shown: its loaders by split."""

    pretrained: Pretrained
    model: Any
    scored: dict[str, DataLoader[Any]]
    shown: dict[str, DataLoader[Any]]


def _earlier(accelerator: Accelerator, options: ReportOptions, data: DataConfig, splits: Sequence[str]) -> Before:
    """Load the model of `--before`. Raises UserError."""
    pretrained = load_pretrained(find_source(str(options.before), BEST).model)
    model = accelerator.prepare_model(pretrained.model, evaluation_mode=True)
    scored, shown = (
        _loaders(data, pretrained, splits, options, frame) for frame in (pretrained.protocol.frame, "original")
    )
    return Before(pretrained, model, scored, shown)


def _split_part(
    accelerator: Accelerator,
    model: Any,
    pretrained: Pretrained,
    scored: DataLoader[Any],
    shown: DataLoader[Any],
    aligner: Aligner | None,
    options: ReportOptions,
    source: Source,
    earlier: Before | None,
    *,
    name: str,
    first: bool,
) -> SplitPart:
    rule = pretrained.protocol
    provenance: dict[str, Any] = {"checkpoint": str(options.run), "max_samples": options.max_samples}
    if options.results:
        results = read_evaluation(options.results, source.model, rule, scored.dataset)
    else:
        results = evaluate_model(accelerator, model, scored, rule, provenance=provenance)
    rows = sample_rows(results, scored.dataset)
    chosen = list(dict.fromkeys(options.samples)) if first else []
    unknown = set(chosen) - set(rows.sample_id.tolist())
    if unknown:
        raise UserError(f"--samples {min(unknown)} is not a sample id of {results.dataset} {results.split}")
    before, old = None, None
    if earlier is not None:
        own = earlier.pretrained.protocol
        before = evaluate_model(accelerator, earlier.model, earlier.scored[name], own, provenance=provenance)
        old = sample_rows(before, earlier.scored[name].dataset)
        if old.sample_id.tolist() != rows.sample_id.tolist():
            raise UserError(f"{options.before} is scored on other samples of {name}; compare models of one protocol")
    picked = choose(rows, options.pictures, options.seed, chosen, old)

    def drawn(
        model: Any, loader: DataLoader[Any], rule: Protocol, rows: Rows, aligner: Aligner | None
    ) -> Iterable[Card]:
        sizes = {"batch_size": options.batch_size, "side": options.side}
        return predict_cards(accelerator, model, loader, rule, rows, picked, aligner, **sizes)

    cards = drawn(model, shown, rule, rows, aligner)
    if earlier is not None and old is not None:
        rest = drawn(earlier.model, earlier.shown[name], earlier.pretrained.protocol, old, None)
        cards = with_earlier(cards, rest)
    lengths = by_length("IoU by length of the sentence", rows.iou, rows.words)
    charts = [histogram("Distribution of IoU", rows.iou), lengths]
    return SplitPart(
        results, charts, list(tqdm(cards, desc="pictures", total=len(picked), leave=False, disable=None)), before
    )


def _title(source: Source) -> str:
    return f"Run {source.run.resolve().name}" if source.run else Path(source.model).name


def _facts(
    source: Source,
    pretrained: Pretrained,
    aligner: Aligner | None,
    training: dict[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """What was trained, how, on what, when and where; what nothing records is left out. rows: of log.jsonl."""
    preprocess = pretrained.preprocess
    facts = {
        "model": pretrained.name,
        "checkpoint": Path(source.model).resolve().name if source.run else source.model,
        "parameters": f"{sum(p.numel() for p in pretrained.model.parameters()) / 1e6:.1f} M",
        "input": f"{preprocess.size} px, {preprocess.resize}, {preprocess.max_tokens} tokens",
        **training_facts(training, rows),
    }
    if source.run and (saved := find_model_folder(source.model) / TRAINING_FILE).is_file():
        facts["saved"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved.stat().st_mtime))
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
