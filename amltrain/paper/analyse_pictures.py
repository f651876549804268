"""Predictions of chosen samples, several models side by side: from the command line to a figure of a paper."""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from amltrain.config.schema import Protocol, ProtocolOverrides
from amltrain.data.loaders import collate
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError
from amltrain.evaluation.masks import count_pixels, find_referents, network_size, output_masks, to_original
from amltrain.evaluation.metrics import scored_columns
from amltrain.evaluation.results import SAMPLE_COLUMNS, run_protocol, write_text
from amltrain.evaluation.tables import markdown
from amltrain.paper.analysed import Analysed, data_of, load_models, loaders_of, moved, single_process
from amltrain.paper.figures import PaperExample, draw_examples


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
        found = {m.name: predict(accelerator, m, sets[m.name][name].dataset, chosen, rules[m.name]) for m in models}
        infos = [dataset.info(i) for i in chosen]
        examples = [
            PaperExample(dataset.picture(i), info.sentence, truth_of(dataset, i), {m: found[m][k].mask for m in found})
            for k, (i, info) in enumerate(zip(chosen, infos, strict=True))
        ]
        draw_examples(examples, args.output / f"pictures-{infos[0].dataset}-{infos[0].split}.{args.format}")
        for k, (i, info) in enumerate(zip(chosen, infos, strict=True)):
            rows.append((info.dataset, str(i), info.sentence, *(f"{100 * found[m][k].iou:.1f}" for m in found)))
    text = "\n".join([*markdown(rows, text_columns=3), "", "IoU of each sample as `amltrain evaluate` scores it."])
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


class Prediction(NamedTuple):
    """mask: [h0, w0] bool at the image's own size; iou: 0..1 by the protocol and its no-target rule."""

    mask: NDArray[np.bool_]
    iou: float


def predict(
    accelerator: Accelerator, model: Analysed, dataset: Any, chosen: Sequence[int], protocol: Protocol
) -> list[Prediction]:
    """What a model finds in the chosen samples, and its score on each."""
    predictions = []
    for sample in chosen:
        host = collate([dataset[sample]])
        batch = prepare_batch(host, dataset.describe()["normalization"], accelerator.device)
        with torch.no_grad():
            output = moved(accelerator, model)(batch)
        geometry = host.geometry.tolist()
        [found] = find_referents(output, network_size(host), geometry, protocol)
        masks = output_masks(output, host, geometry, protocol)
        row = dict(zip(SAMPLE_COLUMNS, count_pixels(masks, batch, protocol).cpu().numpy().T, strict=True))
        scored = scored_columns(
            row["intersection"],
            row["union"],
            row["no_target"],
            row["predicted_no_target"],
            row["area"],
            ties=protocol.ties,
        )
        generalized = masks.no_target is not None or bool(row["no_target"].any())
        iou = (scored.ruled.iou if generalized else scored.iou)[0]
        predictions.append(Prediction(found.mask.cpu().numpy(), float(iou)))
    return predictions


def truth_of(dataset: Any, sample: int) -> NDArray[np.bool_]:
    """The true mask at the image's own size."""
    host = collate([dataset[sample]])
    return (to_original(host.target[0].float() / 255, host.geometry[0].tolist(), "bilinear") > 0.5).numpy()
