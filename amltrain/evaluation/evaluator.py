"""Run a model over a split and score it: exact at any number of processes, without AML, without waiting on the device.

    loader -> batches shared out over the processes, the last ones filled up so that every process runs equally many
           -> forward -> mask at network or original size -> I, U, flags per sample, kept on the device
           -> gathered once -> duplicates of the filling dropped by sample id -> every sample of the split exactly once
           -> metrics

Averages of per-process figures would be wrong as soon as a split divides unevenly; rows of samples cannot be.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amltrain import __version__
from amltrain.config.schema import Protocol
from amltrain.data.transforms import normalise_batch
from amltrain.errors import UserError
from amltrain.evaluation.masks import network_probability, original_probability, to_original
from amltrain.evaluation.metrics import ReferringSegmentation
from amltrain.evaluation.results import SAMPLE_COLUMNS, Prediction, Results
from amltrain.records import Batch, ModelOutput


def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module | Callable[[Batch], ModelOutput],
    loader: DataLoader,
    protocol: Protocol,
    *,
    pictures: int = 0,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Score `model` on one split; every process returns the same Results.

    model       called with a Batch on the accelerator's device, returns a ModelOutput; prepared by Accelerate or not.
                Its modules are put into eval mode and back into the mode each had. Runs under `accelerator.autocast()`:
                in fp32 unless the run uses mixed precision (said in Results.provenance["precision"]).
    loader      of one split as `build_eval_loaders` makes it, not prepared: sharing out is done here. Its batches carry
                `original_target` where the protocol's frame is "original".
    protocol    complete (the model's own, with a run's values over it).
    pictures    samples to keep for pictures, spread evenly over the split.
    provenance  what else results.json should say (checkpoint, seed, ...).

    The classic metrics are computed, or the generalized ones where the split has no-target sentences or the model has a
    no-target head. Raises UserError for an incomplete protocol or an empty split, RuntimeError if samples were lost.
    """
    shard = prepare_data_loader(
        loader,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=False,  # the host keeps ids and geometry, which nothing has to wait for
        dispatch_batches=False,
    )
    normalization = loader.dataset.describe().get("normalization")  # type: ignore[attr-defined]
    expected = len(loader.dataset) if hasattr(loader.dataset, "__len__") else None  # type: ignore[arg-type]
    wanted = _evenly_spread(pictures, expected)
    rows: list[Tensor] = []
    kept: list[Prediction] = []
    head, size = False, (0, 0)
    quiet = not (progress and accelerator.is_main_process)
    bar = tqdm(shard, desc="evaluate", unit="batch", leave=False, disable=quiet)
    with _evaluating(model), torch.no_grad():
        for host in bar:
            batch = send_to_device(host, accelerator.device, non_blocking=True)
            batch = normalise_batch(batch, normalization)
            with accelerator.autocast():
                output = model(batch)
            geometry = host.geometry.tolist()
            rows.append(_score(output, batch, geometry, protocol))
            kept += _keep(output, host, rows[-1], protocol, wanted)
            head, size = "no_target" in output.aux, _size(host)
    samples = _gather(accelerator, rows, expected)
    notes = {"amltrain": __version__, "precision": _precision(accelerator), **(provenance or {})}
    return _results(samples, loader.dataset, protocol, head, size, notes, _unique(gather_object(kept)))


def _score(output: ModelOutput, batch: Batch, geometry: Sequence[Sequence[float]], protocol: Protocol) -> Tensor:
    """One row of `SAMPLE_COLUMNS` per sample, [B, 6] int64 on the device."""
    size, cut = _size(batch), protocol.threshold
    if protocol.frame == "network":
        mask = network_probability(output.logits, size, protocol.interpolation) > cut
        pixels = _pixels(mask, batch.target > 127)
    else:
        if len(batch.original_target) != len(geometry):
            raise UserError('protocol.frame="original" needs a loader that gives the masks at their original size')
        maps = original_probability(output.logits, size, geometry, protocol.interpolation)
        pairs = zip(maps, batch.original_target, strict=True)
        pixels = torch.stack([_pixels(p[None] > cut, truth[None] > 0)[0] for p, truth in pairs])
    said = _says_no_target(output, pixels[:, 2], protocol)
    finite = output.logits.isfinite().flatten(1).all(1)
    columns = (batch.sample_id, pixels[:, 0], pixels[:, 1], batch.no_target, said, finite)
    return torch.stack([c.to(torch.int64) for c in columns], dim=1)


def _size(batch: Batch) -> tuple[int, int]:
    return batch.image.shape[-2], batch.image.shape[-1]


def _pixels(mask: Tensor, truth: Tensor) -> Tensor:
    """[B, 3] int64: intersection, union and area of the predicted mask, from two [B, H, W] bool."""
    return torch.stack([(mask & truth).sum((1, 2)), (mask | truth).sum((1, 2)), mask.sum((1, 2))], dim=1)


def _says_no_target(output: ModelOutput, area: Tensor, protocol: Protocol) -> Tensor:
    """[B] bool: by the model's head where it has one, else by the protocol's pixel count."""
    if "no_target" in output.aux:
        return output.aux["no_target"].argmax(1) == 1
    return area < (protocol.no_target_pixels or 0)


def _keep(output: ModelOutput, host: Batch, scored: Tensor, protocol: Protocol, wanted: set[int]) -> list[Prediction]:
    """The wanted samples of this batch, at their original size (only these wait for the device)."""
    predictions, size = [], _size(host)
    for row, sample_id in enumerate(host.sample_id.tolist()):
        if sample_id not in wanted:
            continue
        geometry = host.geometry[row].tolist()
        logits = output.logits[row : row + 1]
        mask = original_probability(logits, size, [geometry], protocol.interpolation)[0] > protocol.threshold
        truth = to_original(host.target[row].float() / 255, geometry, "bilinear") > 0.5
        said = bool(scored[row, SAMPLE_COLUMNS.index("predicted_no_target")])
        predictions.append(Prediction(sample_id, mask.cpu().numpy(), truth.numpy(), said))
    return predictions


def _gather(accelerator: Accelerator, rows: list[Tensor], expected: int | None) -> NDArray[np.int64]:
    """All samples' rows on every process, each sample once, in the order of their ids."""
    if not rows:
        raise UserError("the split to evaluate has no samples")
    local = accelerator.pad_across_processes(torch.cat(rows), dim=0, pad_index=-1)
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
    head: bool,
    size: tuple[int, int],
    provenance: dict[str, Any],
    predictions: list[Prediction],
) -> Results:
    columns = dict(zip(SAMPLE_COLUMNS, samples.T, strict=True))
    generalized = head or bool(columns["no_target"].any())
    scores = ReferringSegmentation(keep_in_memory=True).compute(
        intersections=columns["intersection"],
        unions=columns["union"],
        no_target=columns["no_target"].astype(bool),
        predicted_no_target=columns["predicted_no_target"].astype(bool),
        generalized=generalized,
        ties=protocol.ties,
    )
    held = dataset.counts()
    counts = {
        "samples": scores.pop("samples"),
        "referents": held["refs"],
        "images": held["images"],
        "no_target": scores.pop("no_target"),
        "empty_unions": scores.pop("empty_unions"),
        "not_finite": int((columns["finite"] == 0).sum()),
    }
    by_pixels = f"fewer than {protocol.no_target_pixels} pixels" if protocol.no_target_pixels else "nothing: never said"
    facts = {
        "size": list(size),
        "metrics": "generalized" if generalized else "classic",
        "ties": "ge" if generalized else protocol.ties,  # ReLA's evaluator knows no other
        "no_target_by": "the model's head" if head else by_pixels,
    }
    info = dataset.info(int(samples[0, 0]))
    return Results(
        info.dataset,
        info.split,
        scores,
        counts,
        asdict(protocol) | dataset.describe() | facts,
        provenance,
        samples,
        predictions,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode, then every module back in its own mode (a frozen part may have been in eval mode before)."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [m.training for m in modules]
    try:
        if modules:
            model.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _precision(accelerator: Accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} autocast"


def _evenly_spread(count: int, total: int | None) -> set[int]:
    if total is None:
        return set(range(count))
    return {i * total // count for i in range(count)} if count else set()


def _unique(predictions: Sequence[Prediction]) -> list[Prediction]:
    return sorted({p.sample_id: p for p in predictions}.values(), key=lambda p: p.sample_id)
