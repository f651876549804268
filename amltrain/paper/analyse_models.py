"""Robustness, occlusion, activation, convergence and errors: from the command line to a table and a picture."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from amltrain.config.schema import ProtocolOverrides
from amltrain.data.loaders import collate
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError, unknown_name
from amltrain.evaluation.compare import read_runs
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.metrics import list_metrics
from amltrain.evaluation.perturbations import PAPER, Perturbation, build_perturbation
from amltrain.evaluation.results import Results, merge_results, run_protocol, write_text
from amltrain.evaluation.tables import describe
from amltrain.hub.model_folder import read_training
from amltrain.inference.evaluate import trained_data
from amltrain.paper.analysed import (
    Analysed,
    data_of,
    load_model,
    load_models,
    loaders_of,
    moved,
    parse_models,
    parse_seeds,
    single_process,
)
from amltrain.paper.breakdown import break_down, breakdown_markdown, draw_breakdown, worst_cases
from amltrain.paper.figures import Evidence, draw_activation, evidence
from amltrain.paper.grids import (
    Grid,
    convergence_table,
    draw_convergence,
    draw_levels,
    draw_rows,
    epoch_losses,
    level_table,
    read_epoch_losses,
    read_losses,
    robustness_table,
    steps_per_epoch,
)
from amltrain.run_folder import RESULTS_FILE, find_model_folder


def robustness(args: argparse.Namespace) -> str:
    """The seven perturbations of the AML paper and the clean row, on every data set."""
    perturbations = {"clean": None, **{name: build_perturbation(name, None, args.seed) for name in PAPER}}
    grid, scored = _grid(args, perturbations)
    text = robustness_table(grid, args.metric) + "\n" + _protocols(scored)
    write_text(args.output / "robustness.md", text + "\n")
    draw_rows(grid, args.metric, args.output / f"robustness.{args.format}")
    return text


def occlusion(args: argparse.Namespace) -> str:
    """A share of the image's 32 px blocks in grey, with the drops from the smallest share."""
    for share in args.shares:
        if not 0 <= share <= 1:
            raise UserError(f"--shares: {share:g} is not a share of the image, 0 to 1")
    shares = sorted(set(args.shares))
    named = {f"{100 * s:g} %": build_perturbation("occluded", s, args.seed) if s else None for s in shares}
    grid, scored = _grid(args, named)
    text = level_table(grid, args.metric) + "\n" + _protocols(scored)
    write_text(args.output / "occlusion.md", text + "\n")
    draw_levels(grid, [100 * s for s in shares], args.metric, args.output / f"occlusion.{args.format}")
    return text


def _grid(args: argparse.Namespace, perturbations: dict[str, Perturbation | None]) -> tuple[Grid, list[Results]]:
    """Score every seed of every model on every data set under every perturbation.

    Rows go to OUTPUT/results.json as they come. One model is in memory at a time.
    """
    if args.metric not in list_metrics():
        raise unknown_name("--metric", args.metric, list_metrics())
    places = [(name, place) for name, seeds in parse_seeds(args.models).items() for place in seeds]
    for _, place in places:
        find_model_folder(place)  # a wrong name is rejected before the first model is scored
    data = data_of(args, places[0][1])
    accelerator = single_process(data)
    values: Grid = {}
    scored: list[Results] = []
    for model_name, place_of_seed in places:
        model = load_model(model_name, place_of_seed)
        for name, perturbation in perturbations.items():
            protocol = run_protocol(model.pretrained.protocol, data, ProtocolOverrides())
            for loader in loaders_of(args, data, model, protocol, perturbation).values():
                provenance = {
                    "checkpoint": model.place,
                    "perturbation": perturbation.describe() if perturbation else None,
                    "max_samples": args.max_samples,
                    "seed": args.seed,
                }
                result = evaluate_model(accelerator, moved(accelerator, model), loader, protocol, provenance=provenance)
                scored.append(result)
                merge_results(args.output / RESULTS_FILE, [result])
                place = f"{result.dataset} {result.split}"
                of_model = values.setdefault(place, {}).setdefault(name, {})
                of_model.setdefault(model.name, []).append(result.score(args.metric))
    return values, scored


def _protocols(results: Sequence[Results]) -> str:
    limits = {r.provenance["max_samples"] for r in results} - {None}
    partial = [f"Only the first {limit} samples of every split were scored." for limit in limits]
    return "\n".join([*dict.fromkeys(f"Scored {describe(r)}." for r in results), *partial])


def activation(args: argparse.Namespace) -> str:
    """Maps of positive and negative evidence of samples spread over the split, one picture per data set."""
    models = load_models(args.models)
    data = data_of(args, models[0].place)
    accelerator = single_process(data)
    lines = ["| data set | sample | sentence | model | positive in truth | positive outside |"]
    samples: list[dict[str, Any]] = []
    lines.append("| -------- | -----: | -------- | ----- | ----------------: | ---------------: |")
    sets = {
        m.name: loaders_of(args, data, m, run_protocol(m.pretrained.protocol, data, ProtocolOverrides()))
        for m in models
    }
    for name in sets[models[0].name]:
        dataset: Any = sets[models[0].name][name].dataset
        count = min(args.count, len(dataset))
        chosen = [i * len(dataset) // count for i in range(count)]
        maps = {m.name: _evidence(accelerator, m, sets[m.name][name].dataset, chosen) for m in models}
        truths = [dataset[i].target > 127 for i in chosen]
        infos = [dataset.info(i) for i in chosen]
        path = args.output / f"activation-{infos[0].dataset}-{infos[0].split}.{args.format}"
        draw_activation([dataset.picture(i) for i in chosen], [i.sentence for i in infos], truths, maps, path)
        for k, (sample, info) in enumerate(zip(chosen, infos, strict=True)):
            for m in models:
                inside, outside = maps[m.name].shares(k, truths[k])
                of = {"model": m.name, "dataset": info.dataset, "sample": sample}
                samples.append({**of, "positive_in_truth": inside, "positive_outside": outside})
                shown = f"{100 * inside:.1f} % | {100 * outside:.1f} %"
                lines.append(f"| {info.dataset} | {sample} | {info.sentence} | {m.name} | {shown} |")
    text = "\n".join([*lines, "", "Share of the pixels in and outside the true object with a positive margin."])
    write_text(args.output / "activation.json", json.dumps({"samples": samples}, indent=2) + "\n")
    write_text(args.output / "activation.md", text + "\n")
    return text


def _evidence(accelerator: Accelerator, model: Analysed, dataset: Any, chosen: Sequence[int]) -> Evidence:
    samples = collate([dataset[i] for i in chosen])
    batch = prepare_batch(samples, dataset.describe()["normalization"], accelerator.device)
    with torch.no_grad():
        return evidence(moved(accelerator, model)(batch).logits, batch.image.shape[-2:])


def convergence(args: argparse.Namespace) -> str:
    """Mean training loss of every epoch, from the runs' log.jsonl."""
    losses = {}
    for name, place in parse_models(args.models).items():
        training = read_training(find_model_folder(place))
        batch = training["recipe"]["train"]["global_batch_size"] if training else 1
        losses[name] = list(read_epoch_losses(place).values())
        losses[name] = losses[name] or epoch_losses(
            read_losses(place), steps_per_epoch(place, trained_data(place), batch)
        )
    text = convergence_table(losses)
    write_text(args.output / "convergence.md", text + "\n")
    draw_convergence(losses, args.output / f"convergence.{args.format}")
    return text


def errors(args: argparse.Namespace) -> str:
    """Scores by aspect of the expression and the object, from the samples of an evaluation."""
    found = read_runs(args.results)
    wanted = tuple(args.split.split(":")) if args.split else None
    if wanted is not None and wanted not in found:
        raise unknown_name("--split", args.split, [":".join(split) for split in found])
    texts = []
    for (dataset, split), runs in found.items():
        if wanted not in (None, (dataset, split)):
            continue
        run = runs[0]
        if run.samples is None:
            raise UserError(f"{run.place} has no samples of {dataset} {split}; run amltrain evaluate again")
        result = run.results
        groups = break_down(run.samples, result.protocol["ties"], result.kind, result.metrics)
        text = f"{dataset} {split}\n\n" + breakdown_markdown(groups, worst_cases(run.samples, args.worst))
        write_text(args.output / f"errors-{dataset}-{split}.md", text + "\n")
        draw_breakdown(groups, args.output / f"errors-{dataset}-{split}.{args.format}")
        texts.append(text)
    return "\n\n".join(texts)
