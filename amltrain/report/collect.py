"""Pictures of one prediction as layers: the photograph as a JPEG, everything else as a transparent PNG over it.

Score a split, choose samples to show, and predict them again for their pictures.

The rows of an earlier evaluation, so that a report need not score the split again.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from amltrain.config.schema import Protocol
from amltrain.data.loaders import collate
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError
from amltrain.evaluation.compare import Run, read_runs
from amltrain.evaluation.draw import PAPER, PREDICTION, TRUTH, Colour, shrink
from amltrain.evaluation.masks import find_referents, network_size
from amltrain.evaluation.results import SAMPLE_COLUMNS, Results
from amltrain.methods.base import Masking, MaskingMaps
from amltrain.models.base import RISModel
from amltrain.records import Batch
from amltrain.run_folder import check_model, find_model_folder

RIGHT: Colour = (0, 158, 96)
MISSED: Colour = (0, 114, 178)
WRONG: Colour = (213, 48, 48)


class Layers(NamedTuple):
    """Data URIs of one sample, all of one size except `scores` and `masked`; None where the method gives none."""

    image: str
    truth: str
    prediction: str
    error: str
    scores: str | None
    masked: str | None


def draw_layers(
    image: Image.Image,
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    scores: NDArray[np.float32] | None = None,
    masked: NDArray[np.bool_] | None = None,
    side: int = 320,
) -> Layers:
    """Draw the layers of one sample.

    image: RGB; truth, prediction: [h, w] bool at its size; scores: [a, b] float 0..1, masked: [c, d] bool, both over
    the whole image; side: longest side in pixels, larger images are scaled down.
    """
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    truth, prediction = _resized(truth, size), _resized(prediction, size)
    error = np.zeros((size[1], size[0], 4), np.uint8)
    for mask, colour in ((truth & prediction, RIGHT), (truth & ~prediction, MISSED), (prediction & ~truth, WRONG)):
        error[mask] = (*colour, 190)
    return Layers(
        _uri(small, "JPEG", quality=88),
        _png(_outlined(truth, TRUTH, fill=0)),
        _png(_outlined(prediction, PREDICTION, fill=90)),
        _png(error),
        None if scores is None else _png(_heat(scores, size)),
        None if masked is None else _png(_blocked(masked, size)),
    )


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) > 127


def _outlined(mask: NDArray[np.bool_], colour: Colour, fill: int) -> NDArray[np.uint8]:
    """RGBA: an outline with a white rim on a fill of this opacity, 0..255; 0 keeps the colours that sentences name."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (*colour, fill)
    width = max(1, round(max(mask.shape) / 130))
    within = shrink(mask, width)
    layer[within & ~shrink(within, max(1, width // 2))] = (*PAPER, 255)
    layer[mask & ~within] = (*colour, 255)
    return layer


def _heat(scores: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGBA of scores on one scale, 0 to 1, for all samples."""
    colours = matplotlib.colormaps["viridis"](np.clip(scores, 0, 1), alpha=0.8, bytes=True)
    return np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST))


def _blocked(masked: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGBA: masked blocks black, the rest clear."""
    layer = np.zeros((*masked.shape, 4), np.uint8)
    layer[masked] = (0, 0, 0, 255)
    return np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.NEAREST))


def _png(rgba: NDArray[np.uint8]) -> str:
    return _uri(Image.fromarray(rgba).quantize(64), "PNG", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


CALIBRATION_SAMPLES = 64


class Rows(NamedTuple):
    """Every sample of a split, arrays [N]: ids int64, iou float64 0..1, words int64 (length of the sentence)."""

    sample_id: NDArray[np.int64]
    ref_id: NDArray[np.int64]
    iou: NDArray[np.float64]
    words: NDArray[np.int64]


class Picked(NamedTuple):
    """A sample to show. iou: 0..1; group as in `Card`."""

    sample_id: int
    group: str
    iou: float


class Earlier(NamedTuple):
    """What another model, from before a training, predicts for a sample. prediction: a data URI; iou: 0..1."""

    prediction: str
    iou: float
    note: str


class Card(NamedTuple):
    """One prediction as the page shows it. group: best, worst, gained, lost, random or chosen; iou: 0..1; note: about
    no-target; before: of the model that it is compared with.
    """

    dataset: str
    split: str
    sample_id: int
    image_id: int
    ref_id: int
    sentence: str
    words: int
    iou: float
    group: str
    note: str
    width: int
    height: int
    layers: Layers
    before: Earlier | None = None


def with_earlier(cards: Iterable[Card], earlier: Iterable[Card]) -> list[Card]:
    """Cards with what other cards of the same samples, in the same order, predict."""
    return [
        card._replace(before=Earlier(other.layers.prediction, other.iou, other.note))
        for card, other in zip(cards, earlier, strict=True)
    ]


def sample_rows(results: Results, dataset: Any) -> Rows:
    """Turn results into rows; a no-target sentence counts 1 if it was recognised and 0 if not, as in gIoU."""
    column = dict(zip(SAMPLE_COLUMNS, results.samples.T, strict=True))
    infos = [dataset.info(i) for i in column["sample_id"].tolist()]
    return Rows(
        column["sample_id"],
        np.array([i.ref_id for i in infos], np.int64),
        results.sample_iou(),
        np.array([len(i.sentence.split()) for i in infos], np.int64),
    )


def choose(rows: Rows, count: int, seed: int, chosen: Sequence[int] = (), before: Rows | None = None) -> dict[int, str]:
    """Choose samples to show: sample id -> group. Best, worst and random ones get a third of `count` each.

    before: rows of the same samples by another model; the thirds are then what was gained, what was lost, and random.

    No referent is shown twice, except for `chosen` ids, which are always shown. The random third is a function of the
    seed. A sample of IoU 0 is never among the best.
    """
    picked = dict.fromkeys(chosen, "chosen")
    referent = dict(zip(rows.sample_id.tolist(), rows.ref_id.tolist(), strict=True))
    seen = {referent[i] for i in chosen}
    value = rows.iou if before is None else rows.iou - before.iou
    ranked = rows.sample_id[np.argsort(value, kind="stable")].tolist()
    mixed = np.random.default_rng(seed).permutation(rows.sample_id).tolist()
    hits = set(rows.sample_id[value > 0].tolist())
    best = [sample_id for sample_id in ranked[::-1] if sample_id in hits]
    names, worst = ("best", "worst"), ranked
    if before is not None:
        losses = set(rows.sample_id[value < 0].tolist())
        names, worst = ("gained", "lost"), [sample_id for sample_id in ranked if sample_id in losses]
    for group, order, end in ((names[0], best, 1), (names[1], worst, 2), ("random", mixed, 3)):
        wanted = count * end // 3 - count * (end - 1) // 3
        for sample_id in order:
            if not wanted:
                break
            if referent[sample_id] not in seen:
                picked[sample_id] = group
                seen.add(referent[sample_id])
                wanted -= 1
    return picked


@torch.no_grad()
def predict_cards(
    accelerator: Accelerator,
    model: RISModel,
    loader: DataLoader[Any],
    rule: Protocol,
    rows: Rows,
    picked: dict[int, str],
    aligner: MaskingMaps | None,
    *,
    batch_size: int,
    side: int,
) -> Iterator[Card]:
    """Predict the picked samples and draw them. loader: of the split, its samples with `original_target`."""
    dataset: Any = loader.dataset
    if aligner is not None:
        step = max(1, len(dataset) // CALIBRATION_SAMPLES)
        ids = list(range(0, len(dataset), step))[:CALIBRATION_SAMPLES]
        aligner.calibrate([_batch(accelerator, dataset, part) for part in _parts(ids, batch_size)])
    position = {sample_id: i for i, sample_id in enumerate(rows.sample_id.tolist())}
    for part in _parts(list(picked), batch_size):
        batch = _batch(accelerator, dataset, part)
        with accelerator.autocast():
            output = model(batch)
            maps = None if aligner is None else aligner(batch)
        found = find_referents(output, network_size(batch), batch.geometry.tolist(), rule)
        for i, sample_id in enumerate(part):
            picture = Picked(sample_id, picked[sample_id], float(rows.iou[position[sample_id]]))
            yield _card(dataset, picture, found[i].mask.cpu().numpy(), found[i].nothing, batch, i, maps, side)


def _card(
    dataset: Any,
    picked: Picked,
    mask: NDArray[np.bool_],
    predicts_nothing: bool,
    batch: Batch,
    index: int,
    maps: Masking | None,
    side: int,
) -> Card:
    info, image = dataset.info(picked.sample_id), dataset.picture(picked.sample_id)
    truth = batch.original_target[index].cpu().numpy() > 0
    scores = masked = None
    if maps is not None and maps.scores is not None:
        network = network_size(batch)
        geometry = batch.geometry[index].tolist()
        scores = onto_image(maps.scores[index].float().cpu().numpy(), network, geometry)
        masked = onto_image(maps.blocks[index].cpu().numpy(), network, geometry)
    note = "the model predicts no target" if predicts_nothing else ""
    if bool(batch.no_target[index]):
        note = "; ".join(filter(None, ["the sentence refers to nothing", note]))
    layers = draw_layers(image, truth, mask, scores, masked, side)
    return Card(
        dataset=info.dataset,
        split=info.split,
        sample_id=picked.sample_id,
        image_id=info.image_id,
        ref_id=info.ref_id,
        sentence=info.sentence,
        words=len(info.sentence.split()),
        iou=picked.iou,
        group=picked.group,
        note=note,
        width=image.width,
        height=image.height,
        layers=layers,
    )


def onto_image(
    cells: NDArray[Any], network: tuple[int, int], geometry: Sequence[float], resolution: int = 160
) -> NDArray[Any]:
    """Values of cells over the network input -> the same values over the image itself, without interpolation.

    cells: [a, b]; geometry: a row of `Batch.geometry`. Undoes a letterbox. Returns at most `resolution` x `resolution`.
    """
    height, width, scale_y, scale_x, offset_y, offset_x = geometry
    picked = []
    for length, scale, offset, side, count in (
        (height, scale_y, offset_y, network[0], cells.shape[0]),
        (width, scale_x, offset_x, network[1], cells.shape[1]),
    ):
        number = min(resolution, int(length))
        position = (np.arange(number) + 0.5) / number * length * scale + offset
        # blocks have a fixed side in pixels and the last may stick out; maps divide the input evenly
        picked.append(np.clip((position / side * count).astype(int), 0, count - 1))
    return cells[np.ix_(*picked)]


def _batch(accelerator: Accelerator, dataset: Any, ids: Sequence[int]) -> Batch:
    return prepare_batch(collate([dataset[i] for i in ids]), dataset.transform.normalization, accelerator.device)


def _parts(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def read_evaluation(place: str | Path, model: str, rule: Protocol, dataset: Any) -> Results:
    """Read results of `model` on this split, with a row per sample, from the folder of an evaluation.

    place: as `amltrain evaluate --output` wrote it. rule: the protocol that the results must have. dataset: the split
    that the report shows. Raises UserError if there is no such result, if it has no samples, or if they are others.
    """
    about = dataset.info(0)
    split = f"{about.dataset} {about.split}"
    of_split = read_runs(place).get((about.dataset, about.split), [])
    found = [run for run in of_split if _same_model(run, model) and _same_rule(run.results, rule)]
    if len(found) != 1:
        raise UserError(
            f"{place} has {len(found) or 'no'} scores of {model} on {split} under its own protocol; write one with: "
            f"amltrain evaluate --checkpoint {model} --splits {about.split}"
        )
    [run] = found
    if run.samples is None:
        raise UserError(f"{place} has no samples of {split}; run amltrain evaluate again")
    _check_ids(place, run.samples, dataset)
    return replace(run.results, samples=_rows(run.samples))


def _same_model(run: Run, model: str) -> bool:
    checkpoint = run.results.provenance.get("checkpoint")
    if not checkpoint:
        return False
    weights = run.results.provenance.get("weights_sha256")
    try:
        folder = find_model_folder(model).resolve()
        # `best` may have moved since it was scored
        return find_model_folder(checkpoint).resolve() == folder and weights in (None, check_model(folder).weights)
    except UserError:  # the model has moved since
        return False


def _same_rule(results: Results, rule: Protocol) -> bool:
    names = ("frame", "threshold", "interpolation", "sentences", "no_target_pixels")
    return all(results.protocol.get(name) == getattr(rule, name) for name in names)


def _check_ids(place: str | Path, samples: pa.Table, dataset: Any) -> None:
    infos = [dataset.info(i) for i in range(len(dataset))]
    for name in ("image_id", "ref_id", "sent_id", "sentence"):
        theirs: Sequence[Any] = samples.column(name).to_pylist()
        if theirs != [getattr(info, name) for info in infos]:
            raise UserError(
                f"{place} was scored on other samples than {infos[0].dataset} {infos[0].split} has now ({name}); run "
                "amltrain evaluate again"
            )


def _rows(samples: pa.Table) -> NDArray[np.int64]:
    columns = [samples.column(name).to_numpy(zero_copy_only=False) for name in SAMPLE_COLUMNS]
    return np.stack(columns, axis=1).astype(np.int64)
