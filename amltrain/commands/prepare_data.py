"""Prepare own and published data: what `amltrain data prepare` does after its arguments are read."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amltrain.api import prepare
from amltrain.config.schema import COMBINED
from amltrain.data.catalog import dataset_spec, describe, find_spec
from amltrain.data.leakage import combined_path, excluded_images, read_image_ids, write_combined_manifest
from amltrain.data.prepare import available_cores, prepare_files
from amltrain.data.sources.frame import FrameRule
from amltrain.data.sources.own import SHARES
from amltrain.data.sources.refer import read_hub_schema, read_refer, refer_paths
from amltrain.data.sources.table import ReadOptions
from amltrain.errors import UserError
from amltrain.registry import READERS

GROUPS = {"combined": True, "combined-unfiltered": False}
"""Names for RefCOCO, RefCOCO+ and RefCOCOg (umd) together, and whether the leak filter is on."""
OWN = ("path", "table", "folder", "hf")


def run(args: argparse.Namespace) -> None:
    """Prepare the data sets of the arguments and print the counts."""
    if not 0 <= args.max_skipped <= 1:
        raise UserError(f"--max_skipped is {args.max_skipped}; it is a share of the expressions, from 0 to 1")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it should be at least 1")
    args.workers = args.workers or available_cores()
    given = [f"--{source}" for source in OWN if getattr(args, source) is not None]
    if len(given) + bool(args.dataset) != 1:
        raise UserError("give one of a path, --table, --folder, --hf (own data) and --dataset (published data sets)")
    if given:
        _prepare_own(args)
    else:
        _prepare_published(args)


def _prepare_own(args: argparse.Namespace) -> None:
    if args.name is None:
        raise UserError("give --name, under which every command will know the data set")
    shares = _shares(args.split_shares) if args.split_shares else SHARES
    options = ReadOptions(
        args.mask_threshold, args.seed, shares, args.encoding, FrameRule(args.exif), args.follow_links
    )
    columns = dict(_pairs(args.columns, "--columns", "image=photo"))
    if args.hf is not None:
        from amltrain.data.sources.hf_table import read_hf  # imports datasets

        scratch = args.output / "source" / args.name
        manifest = prepare_files(
            read_hf(args.hf, scratch, args.name, columns=columns, options=options),
            args.output,
            scratch,
            max_skipped=args.max_skipped,
            workers=args.workers,
            image_option="the data set's images",
        )
    else:
        manifest = prepare(
            args.path or args.table or args.folder,
            args.name,
            output=args.output,
            images=args.images,
            masks=args.masks,
            form=args.form or ("table" if args.table else "folder" if args.folder else None),
            columns=columns,
            describe=args.describe,
            sentences=args.sentences,
            negatives=args.negatives,
            options=options,
            label_field=args.label_field,
            max_skipped=args.max_skipped,
            workers=args.workers,
            said=print if args.path is not None else lambda line: None,
        )
    print(describe(manifest))
    _show_next(args.output, args.name)
    print(_next_command(manifest, args.output))


def _next_command(manifest: dict[str, Any], output: Path) -> str:
    """A command that runs on the prepared data as they are: with the splits that they have."""
    splits = [split for split, count in manifest["splits"].items() if count["images"]]
    where = "" if output == Path("prepared") else f" --data.prepared {output}"
    data = f"--data.datasets '[{manifest['dataset']}]'{where}"
    if "train" not in splits:
        score = f"amltrain evaluate --checkpoint RUN/best {data} --splits {splits[0]}"
        return f"it has no split `train`; score a model on it: {score}"
    where = "" if output == Path("prepared") else f" --prepared {output}"
    return f"then train a pretrained model on it and see its report: amltrain finetune {manifest['dataset']}{where}"


def _show_next(output: Path, name: str) -> None:
    print(f"look at {output / name / 'rows.jpg'}: it shows some rows as they were read")


def _pairs(entries: Sequence[str], flag: str, example: str) -> list[tuple[str, str]]:
    pairs = [entry.partition("=") for entry in entries]
    bad = next((entry for entry, pair in zip(entries, pairs, strict=True) if not pair[0] or not pair[2]), None)
    if bad is not None:
        raise UserError(f"{flag} {bad!r} should look like {example}")
    return [(key, value) for key, _, value in pairs]


def _shares(entries: Sequence[str]) -> dict[str, float]:
    try:
        return {split: float(share) for split, share in _pairs(entries, "--split_shares", "train=0.9")}
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--split_shares: {error}") from error


def _prepare_published(args: argparse.Namespace) -> None:
    names = list(dict.fromkeys(n for name in args.dataset for n in (COMBINED if name in GROUPS else [name])))
    leak_filter = all(GROUPS.get(name, True) for name in args.dataset)
    sources = _sources(names, args)
    _check_options(names, args, leaves_out=len(names) > 1 and leak_filter)
    _check_sources(names, sources, args.refer_root)
    for name, source in zip(names, sources, strict=True):
        if dataset_spec(name).shares_images:
            print(f"note: {name} trains and evaluates on the same images; the umd split (refcocog) does not")
        print(describe(_prepare(name, source, args)))
        _show_next(args.output, name)
    if len(names) > 1 and all("train" in dataset_spec(name).splits for name in names):
        excluded = excluded_images(
            str(args.output), names, also_held_out=args.also_held_out, held_out_ids=args.held_out_ids
        )
        path = combined_path(str(args.output), names, leak_filter)
        print(write_combined_manifest(path, str(args.output), names, excluded if leak_filter else set()))


def _sources(names: Sequence[str], args: argparse.Namespace) -> list[str | None]:
    """Return each data set's Hub source; None = from refer_root."""
    if args.hub is None:
        if args.refer_root is None:
            raise UserError("give --refer_root, the folder with the original files, or --hub")
        return [None] * len(names)
    if args.refer_root is not None:
        raise UserError("--hub stands for --refer_root; leave one of them out (the images come from --image_root)")
    if args.image_root is None:
        raise UserError("--hub needs --image_root, the folder with COCO's train2014 images")
    if len(args.hub) != len(names):
        raise UserError(f"--hub names {len(args.hub)} sources for {len(names)} data sets ({', '.join(names)})")
    return list(args.hub)


def _check_options(names: Sequence[str], args: argparse.Namespace, *, leaves_out: bool) -> None:
    """Raise UserError for what would fail after all the images were read, or would do nothing."""
    held_out = "--held_out_ids" if args.held_out_ids else "--also_held_out" if args.also_held_out else None
    if held_out and not leaves_out:
        raise UserError(
            f"{held_out} leaves images out of a combined training, and {' '.join(args.dataset)} is none that does; "
            f"drop it, or for one data set give it to the training (data.{held_out[2:]})"
        )
    if args.held_out_ids:
        read_image_ids(args.held_out_ids)
    for name in args.also_held_out:
        find_spec(name, str(args.output))
        if name not in names and not any((args.output / name).glob("*.parquet")):
            raise UserError(f"--also_held_out {name}: {args.output / name} is not prepared; prepare it first")


def _check_sources(names: Sequence[str], sources: Sequence[str | None], refer_root: Path) -> None:
    """Raise UserError unless every data set's annotations are there, before the first one's images are read."""
    for name, source in zip(names, sources, strict=True):
        spec = dataset_spec(name)
        if source is None and spec.layout == "refer":
            refer_paths(refer_root, name)
        elif source is not None and spec.layout != "refer":
            raise UserError(f"{name} is not read through --hub; give --refer_root, the folder with its files")
        elif source is not None:
            from amltrain.data.sources.refer import check_source  # imports torchvision

            check_source(source)


def _prepare(name: str, source: str | None, args: argparse.Namespace) -> dict[str, Any]:
    layout = dataset_spec(name).layout
    if source is not None:
        files, images = read_hub_schema(source, name), args.image_root
    elif layout == "refer":
        files, images = read_refer(args.refer_root, name), args.image_root or args.refer_root
    else:
        files, images = READERS[layout].value(args.refer_root, name), args.image_root or args.refer_root
    files = files._replace(links=args.follow_links)
    return prepare_files(
        files,
        args.output,
        images,
        max_skipped=args.max_skipped,
        workers=args.workers,
        image_option="--image_root",
    )
