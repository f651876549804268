"""Predictions of chosen samples, several models side by side: from the command line to a figure of a paper."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from amltrain.config.schema import Protocol, ProtocolOverrides
from amltrain.data.loaders import collate
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError
from amltrain.evaluation.masks import network_size, original_probability, to_original
from amltrain.evaluation.results import run_protocol, write_text
from amltrain.evaluation.tables import markdown
from amltrain.paper.analysed import Analysed, data_of, load_models, loaders_of, moved, single_process
from amltrain.paper.figures import PaperExample, draw_examples, iou


def pictures(args: argparse.Namespace) -> str:
    """One figure per data set: image, truth and every model's prediction, with a legend."""
    models = load_models(args.models)
    data = data_of(args, models[0].place)
    accelerator = single_process(data)
    rules = {m.name: run_protocol(m.pretrained.protocol, data, ProtocolOverrides()) for m in models}
    sets = {m.name: loaders_of(args, data, m, rules[m.name]) for m in models}
    rows: list[Sequence[str]] = [("data set", "sample", "sentence", *(m.name for m in models))]
    for name in sets[models[0].name]:
        dataset: Any = sets[models[0].name][name].dataset
        chosen = choose_samples(dataset, args.count, args.samples)
        masks = {m.name: predict(accelerator, m, sets[m.name][name].dataset, chosen, rules[m.name]) for m in models}
        infos = [dataset.info(i) for i in chosen]
        examples = [
            PaperExample(dataset.picture(i), info.sentence, truth_of(dataset, i), {m: masks[m][k] for m in masks})
            for k, (i, info) in enumerate(zip(chosen, infos, strict=True))
        ]
        draw_examples(examples, args.output / f"pictures-{infos[0].dataset}-{infos[0].split}.{args.format}")
        for i, info, e in zip(chosen, infos, examples, strict=True):
            scores = [f"{iou(mask, e.truth):.1f}" for mask in e.predictions.values()]
            rows.append((info.dataset, str(i), info.sentence, *scores))
    text = "\n".join([*markdown(rows, text_columns=3), "", "IoU of each sample at the image's own size."])
    write_text(args.output / "pictures.md", text + "\n")
    return text


def choose_samples(dataset: Any, count: int, wanted: Sequence[int]) -> list[int]:
    """The wanted samples, or `count` spread over the split that show one referent each.

    Raises UserError for an id that does not exist or is given twice.
    """
    for sample in wanted:
        if not 0 <= sample < len(dataset):
            raise UserError(f"--samples {sample} is not a sample id of this split, 0 to {len(dataset) - 1}")
    if len(set(wanted)) < len(wanted):
        raise UserError("--samples: an id is given twice")
    if wanted:
        return list(wanted)
    chosen: dict[int, int] = {}
    for place in np.linspace(0, len(dataset) - 1, min(4 * count, len(dataset))).astype(int).tolist():
        chosen.setdefault(dataset.info(place).ref_id, place)
    spread = list(chosen.values())
    return [spread[i * len(spread) // min(count, len(spread))] for i in range(min(count, len(spread)))]


def predict(
    accelerator: Accelerator, model: Analysed, dataset: Any, chosen: Sequence[int], protocol: Protocol
) -> list[NDArray[np.bool_]]:
    """Masks of the chosen samples at their images' own size."""
    masks = []
    for sample in chosen:
        host = collate([dataset[sample]])
        batch = prepare_batch(host, dataset.describe()["normalization"], accelerator.device)
        with torch.no_grad():
            logits = moved(accelerator, model)(batch).logits
        geometry = host.geometry.tolist()
        [probability] = original_probability(logits, network_size(host), geometry, protocol.interpolation)
        masks.append((probability > protocol.threshold).cpu().numpy())
    return masks


def truth_of(dataset: Any, sample: int) -> NDArray[np.bool_]:
    """The true mask at the image's own size."""
    host = collate([dataset[sample]])
    return (to_original(host.target[0].float() / 255, host.geometry[0].tolist(), "bilinear") > 0.5).numpy()
