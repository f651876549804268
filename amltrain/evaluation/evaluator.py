"""Encode once: run the image encoder once for all sentences of an image.

Works for models that offer `encode_image` and `encode_with_image` (see `RISModel`). A split keeps the sentences of an
image next to each other, so most of them share a batch; the last image's features are kept for the next batch.

Score a model, or masks from files, on a split: exact at any number of processes, without waiting for the device.

    loader -> batches dealt to the processes, the last ones padded so that every process runs equally many
           -> masks at network or original size -> I, U, area and flags of every sample, kept on the device
           -> gathered once -> padding dropped by sample id -> every sample of the split exactly once
           -> metrics

Averages of per-process figures would be wrong as soon as a split divides unevenly; rows of samples cannot be.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amltrain import __version__
from amltrain.config.schema import Protocol
from amltrain.data.transforms import prepare_batch
from amltrain.environment import hush_deepspeed
from amltrain.errors import UserError
from amltrain.evaluation.masks import Masks, count_pixels, find_referents, network_size, output_masks, to_original
from amltrain.evaluation.metrics import (
    BOX_METRICS,
    GSVA_METRICS,
    METRICS,
    Kind,
    metric_terms,
    number_refs,
    scored_columns,
)
from amltrain.evaluation.prediction_files import FileMasks, PredictionWriter
from amltrain.evaluation.results import SAMPLE_COLUMNS, Prediction, Results
from amltrain.models.base import RISModel, eval_mode
from amltrain.records import Batch, ModelOutput


def shares_images(model: Any, dataset: Any) -> bool:
    """Whether the model can encode an image alone and the data set knows which samples show the same picture.

    A conversation is about a picture, which is then encoded once already.
    """
    talks = getattr(dataset, "talk", None) is not None
    return isinstance(model, RISModel) and model.encodes_image_alone and hasattr(dataset, "image_groups") and not talks


class ImageCache:
    """A model's forward in which every image of a batch is encoded once."""

    def __init__(self, model: RISModel, dataset: Any) -> None:
        """dataset.image_groups(): [samples] int64, equal for samples whose network input is the same picture."""
        self.model = model
        self.groups = dataset.image_groups()
        self.last: tuple[int, tuple[Tensor, ...]] | None = None
        self.encoded = 0
        """Images encoded so far."""

    def __call__(self, batch: Batch, host: Batch) -> ModelOutput:
        """The output of `model(batch)`. host: the same batch on the CPU, whose ids are read."""
        groups = self.groups[host.sample_id.numpy()].tolist()
        known = dict([self.last]) if self.last else {}
        first = {g: i for i, g in reversed(list(enumerate(groups))) if g not in known}
        new = sorted(first.values())
        if new:
            chosen = torch.tensor(new, device=batch.image.device)
            maps = self.model.encode_image(batch.image[chosen])
            known |= {groups[i]: tuple(m[k : k + 1] for m in maps) for k, i in enumerate(new)}
            self.encoded += len(new)
        self.last = groups[-1], known[groups[-1]]
        image = tuple(torch.cat(level) for level in zip(*(known[g] for g in groups), strict=True))
        return self.model.decode(self.model.encode_with_image(batch, image), batch)


MaskSource = Callable[[Batch, Batch], tuple[Masks, ModelOutput | None]]
"""(batch on the device, batch on the host) -> masks, and the output that they come from where there is one."""


def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module | Callable[[Batch], ModelOutput],
    loader: DataLoader[Any],
    protocol: Protocol,
    *,
    pictures: int = 0,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
    writer: PredictionWriter | None = None,
    encode_once: bool = True,
) -> Results:
    """Score `model` on one split; every process returns the same Results.

    model        called with a Batch on the accelerator's device, returns a ModelOutput; prepared by Accelerate or not.
                 Its modules are put into eval mode and back into the mode each had. Runs under
                 `accelerator.autocast()`: in fp32 unless mixed precision is on (see Results.provenance["precision"]).
    loader       of one split as `build_eval_loaders` makes it, not prepared. Its batches carry `original_target` where
                 the protocol's frame is "original".
    protocol     complete (the model's own, with a run's values over it).
    pictures     samples to keep for pictures, spread evenly over the split.
    provenance   what else results.json records (checkpoint, seed, ...).
    writer       where to save every predicted mask; None = nowhere.
    encode_once  run the image encoder once for all sentences of an image, where the model allows it.

    The classic metrics are computed, or the generalized ones where the split has no-target sentences or the model has a
    no-target head. Raises UserError for an empty split, RuntimeError if samples were lost.
    """
    hush_deepspeed()
    cache = None
    if encode_once and isinstance(model, nn.Module) and shares_images(accelerator.unwrap_model(model), loader.dataset):
        cache = ImageCache(accelerator.unwrap_model(model), loader.dataset)

    def predict(batch: Batch, host: Batch) -> tuple[Masks, ModelOutput]:
        with accelerator.autocast():
            output = model(batch) if cache is None else cache(batch, host)
        return output_masks(output, batch, host.geometry.tolist(), protocol), output

    notes = {"precision": _precision(accelerator), **(provenance or {})}
    with eval_mode(model):
        return _score_split(accelerator, predict, loader, protocol, pictures, notes, progress, writer)


def evaluate_predictions(
    accelerator: Accelerator,
    predictions: FileMasks,
    loader: DataLoader[Any],
    protocol: Protocol,
    *,
    pictures: int = 0,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Score masks from files on one split; every process returns the same Results.

    predictions: as `find_predictions` gives them for this split. The other arguments are those of `evaluate_model`.
    Raises UserError, naming and counting them, if any prediction is missing, doubled, of another size or not binary;
    nothing is scored then.
    """
    predictions.check_ids(loader.dataset)

    def predict(batch: Batch, host: Batch) -> tuple[Masks, None]:
        return predictions.masks(host, loader.dataset, protocol), None

    made_by: dict[str, Any] = {
        name: predictions.facts[name] for name in ("step", "weights_sha256") if name in predictions.facts
    }
    notes = {"predictions": str(predictions.source), **made_by, **(provenance or {})}
    results = _score_split(accelerator, predict, loader, protocol, pictures, notes, progress, None)
    faults = sorted(set(gather_object(predictions.faults)))
    predictions.raise_faults(faults)
    results.protocol.update(threshold=None, interpolation=None)  # the files hold masks, not probabilities
    return results


def _score_split(
    accelerator: Accelerator,
    predict: MaskSource,
    loader: DataLoader[Any],
    protocol: Protocol,
    pictures: int,
    notes: dict[str, Any],
    progress: bool,
    writer: PredictionWriter | None,
) -> Results:
    shard = prepare_data_loader(
        loader,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=False,  # ids and geometry stay on the host, where nothing has to wait for them
        dispatch_batches=False,
    )
    dataset: Any = loader.dataset
    expected = len(dataset) if hasattr(dataset, "__len__") else None
    normalization = dataset.describe().get("normalization")
    wanted = _evenly_spread(pictures, expected)
    rows: list[Tensor] = []
    kept: list[Prediction] = []
    head, boxed, size = False, False, (0, 0)
    quiet = None if progress and accelerator.is_main_process else True  # None: no bar unless on a terminal
    about = dataset.info(0) if expected else None
    split = f" {about.dataset} {about.split}" if about is not None else ""
    with torch.no_grad():
        for host in tqdm(shard, desc=f"evaluate{split}", unit="batch", leave=False, disable=quiet):
            batch = prepare_batch(host, normalization, accelerator.device)
            masks, output = predict(batch, host)
            rows.append(count_pixels(masks, batch, protocol))
            kept += _keep(masks, output, host, rows[-1], protocol, wanted)
            head, boxed, size = masks.no_target is not None, masks.boxes is not None, network_size(host)
            if writer is not None:
                writer.add(host.sample_id.tolist(), masks, dataset)
    samples = _gather(accelerator, rows, expected)
    contents = getattr(dataset, "fingerprint", "")  # of the split's contents; "" where it is not known
    provenance = {"amltrain": __version__, **({"data_fingerprint": contents} if contents else {}), **notes}
    return _results(samples, dataset, protocol, (head, boxed), size, provenance, _unique(gather_object(kept)))


def _keep(
    masks: Masks, output: ModelOutput | None, host: Batch, scored: Tensor, protocol: Protocol, wanted: set[int]
) -> list[Prediction]:
    """The wanted samples of this batch, at their original size (only these wait for the device)."""
    predictions = []
    for row, sample_id in enumerate(host.sample_id.tolist()):
        if sample_id not in wanted:
            continue
        geometry = host.geometry[row].tolist()
        mask = masks.masks[row]
        if protocol.frame == "network" and output is not None:
            one = ModelOutput(output.logits[row : row + 1], {})
            mask = find_referents(one, network_size(host), [geometry], protocol)[0].mask
        elif protocol.frame == "network":
            mask = to_original(mask.float(), geometry, "bilinear") > 0.5
        truth = to_original(host.target[row].float() / 255, geometry, "bilinear") > 0.5
        predicted_none = bool(scored[row, SAMPLE_COLUMNS.index("predicted_no_target")])
        mask = mask & (not predicted_none)
        predictions.append(Prediction(sample_id, mask.cpu().numpy(), truth.numpy(), predicted_none))
    return predictions


def _gather(accelerator: Accelerator, rows: list[Tensor], expected: int | None) -> NDArray[np.int64]:
    """Gather all samples' rows on every process, each sample once, in the order of their ids."""
    if not rows:
        raise UserError("the split to evaluate has no samples")
    local = accelerator.pad_across_processes(torch.cat(rows).to(accelerator.device), dim=0, pad_index=-1)
    gathered = accelerator.gather(local).cpu().numpy()
    gathered = gathered[gathered[:, 0] >= 0]
    _, first = np.unique(gathered[:, 0], return_index=True)
    if expected is not None and len(first) != expected:
        raise RuntimeError(f"evaluation saw {len(first)} of {expected} samples; scores would be wrong")
    return gathered[first]


def _results(
    samples: NDArray[np.int64],
    dataset: Any,
    protocol: Protocol,
    gives: tuple[bool, bool],
    size: tuple[int, int],
    provenance: dict[str, Any],
    predictions: list[Prediction],
) -> Results:
    """Metrics of gathered rows. gives: whether a no-target head, and whether the model's own boxes, were among them."""
    from amltrain.evaluation.hf_metric import ReferringSegmentation  # takes a second to import

    columns, (head, boxed) = dict(zip(SAMPLE_COLUMNS, samples.T, strict=True)), gives
    from_files = "predictions" in provenance
    if from_files and not (columns["no_target"].any() or columns["predicted_no_target"].any()):
        head = False  # files of a classic data set may say "no_target": false in every line
    generalized = head or bool(columns["no_target"].any())
    scores = ReferringSegmentation(keep_in_memory=True).compute(
        intersections=columns["intersection"],
        unions=columns["union"],
        areas=columns["area"],
        no_target=columns["no_target"].astype(bool),
        predicted_no_target=columns["predicted_no_target"].astype(bool),
        generalized=generalized,
        ties=protocol.ties,
    )
    paper = _paper_metrics(columns, dataset, "generalized" if generalized else "classic", BOX_METRICS * boxed)
    held = dataset.counts()
    counts = {
        "samples": scores.pop("samples"),
        "referents": held["refs"],
        "images": held["images"],
        "no_target": scores.pop("no_target"),
        "empty_unions": scores.pop("empty_unions"),
        "empty_masks": scores.pop("empty_masks"),
        "not_finite": int((columns["finite"] == 0).sum()),
    }
    source = "the files" if from_files else "the model's head"
    by_pixels = (
        f"fewer than {protocol.no_target_pixels} pixels" if protocol.no_target_pixels else "nothing: never predicted"
    )
    facts = {
        "size": list(size),
        "metrics": "generalized" if generalized else "classic",
        "ties": "ge" if generalized else protocol.ties,  # ReLA's evaluator has only this one
        "no_target_by": source if head else by_pixels,
    }
    if boxed:
        facts["boxes"] = getattr(dataset, "box_origin", str)() or "around the mask"
    info = dataset.info(int(samples[0, 0]))
    described = asdict(protocol) | dataset.describe() | facts
    if getattr(dataset, "talk", None) is None:
        del described["answers"]  # of a model that writes none
    metrics = paper if getattr(dataset, "box_only", False) else {**scores, **paper}
    return Results(
        info.dataset, info.split, metrics, counts, described, provenance, samples=samples, predictions=predictions
    )


def _paper_metrics(
    columns: dict[str, NDArray[np.int64]], dataset: Any, kind: Kind, also: Sequence[str] = ()
) -> dict[str, float]:
    """Metrics of the data set's papers that belong to the kind, in percent, by name, where its entry names any.

    also: of the model's.
    """
    wanted = (*getattr(dataset, "paper_metrics", ()), *(GSVA_METRICS if getattr(dataset, "talk", None) else ()), *also)
    names = [name for name in wanted if name in METRICS[kind]]
    if not names:
        return {}
    infos = [dataset.info(i) for i in columns["sample_id"].tolist()]
    samples = scored_columns(
        columns["intersection"],
        columns["union"],
        columns["no_target"],
        columns["predicted_no_target"],
        columns["area"],
        refs=number_refs([i.image_id for i in infos], [i.ref_id for i in infos]),
        boxes=(columns["box_intersection"], columns["box_union"]),
        detected=(columns["detected_intersection"], columns["detected_union"]),
    )
    return {name: metric_terms(name, samples, kind).percent() for name in names}


def _precision(accelerator: Accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} autocast"


def _evenly_spread(count: int, total: int | None) -> set[int]:
    if total is None:
        return set(range(count))
    return {i * total // count for i in range(count)} if count else set()


def _unique(predictions: Sequence[Prediction]) -> list[Prediction]:
    return sorted({p.sample_id: p for p in predictions}.values(), key=lambda p: p.sample_id)
