"""Rank the training images for every sentence and every image by a dual encoder, for the mosaic augmentation.

    amltrain data rank --dataset refcoco --model openai/clip-vit-base-patch32 --output rankings
    amltrain train ... --data.augment '[mosaic]' --mosaic.retrieval 0.5 --mosaic.rankings rankings

The model is a CLIP-style model of transformers (CLIP, SigLIP, ...), a folder or a Hub id. Writes two Parquet files,
DATASET-SPLIT-sentences.parquet (key = sent_id) and DATASET-SPLIT-images.parquet (key = image_id), each with columns
key, image_ids and scores: cosine similarities, best first. An image is not ranked for itself.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amltrain.data.catalog import find_manifest, fingerprint
from amltrain.data.mosaic import ranking_path
from amltrain.errors import UserError, cure, first_line, one_line_errors
from amltrain.files import seal
from amltrain.run_folder import public_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("keep", "batch"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} is {getattr(options, name)} and must be at least 1")
        rank(options)


def rank(options: argparse.Namespace) -> None:
    """Embed images and sentences, and write both rankings. Raises UserError."""
    import torch

    from amltrain.data.rows import open_rows
    from amltrain.environment import choose_device

    device = choose_device(options.device)
    model, processor = load_dual_encoder(options.model, device)
    rows = open_rows(options.prepared, options.dataset, options.split)
    image_ids = np.array(rows.columns.column("image_id"), np.int64)
    keys, texts, owners = _sentences(rows, image_ids, options.sentence_field)
    with torch.inference_mode():
        pictures = torch.cat(list(_image_embeddings(model, processor, rows, options, device)))
        sentences = torch.cat(list(_text_embeddings(model, processor, texts, options.batch, device)))
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        contents = fingerprint(find_manifest(options.prepared, options.dataset), options.split)
        facts = {"model": public_name(options.model), "data": contents, "sentence_field": options.sentence_field}
        for kind, queries, names, own in (
            ("sentences", sentences, keys, owners),
            ("images", pictures, image_ids, image_ids),
        ):
            path = ranking_path(output, options.dataset, options.split, kind)
            ranked = rank_images(queries, pictures, image_ids, own, options.keep)
            write_ranking(path, names, *ranked, facts)
            print(f"{path}: {len(names):,} {kind}, {ranked[0].shape[1]} images each")


def load_dual_encoder(source: str, device: Any) -> tuple[Any, Any]:
    """Load a CLIP-style model and its processor. Raises UserError for one that is not there or has no two encoders."""
    from transformers import AutoModel, AutoProcessor

    try:
        model = AutoModel.from_pretrained(source, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"--model {source} cannot be loaded ({first_line(error)}); give a folder or a Hub id"
        ) from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise UserError(
            f"--model {source} is a {type(model).__name__}, not a dual encoder; use CLIP or SigLIP, for example"
        )
    return model.eval().to(device), processor


def rank_images(
    queries: Any, pictures: Any, image_ids: NDArray[np.int64], own: NDArray[np.int64], keep: int, chunk: int = 1024
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rank images by cosine similarity.

    queries: [Q, D] and pictures: [N, D], unit vectors. image_ids: [N]. own: [Q], the image id left out for each query.
    Returns image ids [Q, K] and similarities [Q, K] float32, best first, K = min(keep, N - 1).
    """
    import torch

    count = min(keep, len(image_ids) - 1)
    if count < 1:
        raise UserError("ranking needs at least two images in the split")
    excluded = torch.from_numpy(own).to(pictures.device)
    ids = torch.from_numpy(image_ids).to(pictures.device)
    chosen, scores = [], []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ pictures.T
        similarity[excluded[start : start + chunk, None] == ids[None]] = -torch.inf
        top = similarity.topk(count)
        chosen.append(ids[top.indices].cpu().numpy())
        scores.append(top.values.float().cpu().numpy())
    return np.concatenate(chosen), np.concatenate(scores)


def write_ranking(
    path: Path,
    keys: NDArray[np.int64],
    images: NDArray[np.int64],
    scores: NDArray[np.float32],
    facts: Mapping[str, Any],
) -> None:
    """Write a ranking file atomically: keys [Q], images [Q, K], scores [Q, K]. facts: what they were made from."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = np.arange(0, images.size + 1, images.shape[1], dtype=np.int64)
    columns = {
        "key": pa.array(keys),
        "image_ids": pa.LargeListArray.from_arrays(offsets, images.reshape(-1)),
        "scores": pa.LargeListArray.from_arrays(offsets, scores.reshape(-1)),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(seal(pa.table(columns), facts), partial, write_page_checksum=True)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror or error}); {cure(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sentences(
    rows: Any, image_ids: NDArray[np.int64], sentence_field: str
) -> tuple[NDArray[np.int64], list[str], NDArray[np.int64]]:
    """sent_id, text and image id of every sentence of a split."""
    keys, texts, owners = [], [], []
    referents = rows.columns.column("referents")
    for row, image_id in enumerate(image_ids.tolist()):
        for referent in referents[row].as_py():
            for sentence in referent["sentences"]:
                keys.append(sentence["sent_id"])
                texts.append(sentence[sentence_field])
                owners.append(image_id)
    return np.array(keys, np.int64), texts, np.array(owners, np.int64)


def _image_embeddings(model: Any, processor: Any, rows: Any, options: argparse.Namespace, device: Any) -> Iterator[Any]:
    from tqdm import tqdm

    from amltrain.data.images import decode_image

    columns = rows.columns
    for start in tqdm(range(0, len(rows), options.batch), desc="images", unit="batch", leave=False, disable=None):
        pictures = []
        for row in range(start, min(start + options.batch, len(rows))):
            name = f"image {columns.column('file_name')[row]} (row {row}) of {options.dataset}/{options.split}"
            size = columns.column("height")[row].as_py(), columns.column("width")[row].as_py()
            pictures.append(decode_image(rows.image_bytes(row), name, size))
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        yield _unit(model.get_image_features(**inputs))


def _text_embeddings(model: Any, processor: Any, texts: list[str], batch: int, device: Any) -> Iterator[Any]:
    from tqdm import tqdm

    for start in tqdm(range(0, len(texts), batch), desc="sentences", unit="batch", leave=False, disable=None):
        chunk = texts[start : start + batch]
        inputs = processor(text=chunk, return_tensors="pt", padding="max_length", truncation=True).to(device)
        yield _unit(model.get_text_features(**inputs))


def _unit(features: Any) -> Any:
    """Unit vectors [B, D] float32. transformers 5 wraps features in an output object."""
    vectors = getattr(features, "pooler_output", features)
    return vectors.float() / vectors.float().norm(dim=-1, keepdim=True)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain data rank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="a prepared data set")
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLIP-style model of transformers")
    parser.add_argument("--prepared", default="prepared", help="folder with the prepared data (default: prepared)")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--sentence-field", choices=["sent", "raw"], default="sent", help="text to rank for")
    parser.add_argument("--output", default="rankings", help="folder of the ranking files (default: rankings)")
    parser.add_argument("--keep", type=int, default=1000, help="images kept per sentence (default: 1000)")
    parser.add_argument("--batch", type=int, default=64, help="images or sentences per forward pass (default: 64)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return parser


if __name__ == "__main__":
    main()
