"""The folder of an exported model.

FOLDER/
  model.pt2                  torch.export program: torch.export.load("model.pt2").module()(image, input_ids, text_mask)
  model.onnx                 the same as ONNX, where it converts
  export.json                inputs, preprocessing, threshold; size, largest difference and time of each file
  run_onnx.py                segments an image with onnxruntime, without torch and amltrain
  tokenizer files            as SentenceTokenizer.save writes them
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amltrain import __version__
from amltrain.data.transforms import MEAN_STD
from amltrain.errors import UserError
from amltrain.export import FORMATS, run_onnx_path
from amltrain.export.program import (
    INPUTS,
    Exportable,
    OnnxModel,
    example_inputs,
    export_onnx,
    export_program,
    largest_difference,
)
from amltrain.hub.model_folder import Pretrained

TOLERANCE = 1e-3
"""Largest difference from the PyTorch model, as a share of its largest output, that is accepted."""


class Exported(NamedTuple):
    """One file. format: "PyTorch" is the model that it is compared with.

    megabytes: size of the file, of the weights for PyTorch; difference: largest, as a share of the largest output;
    milliseconds: median per image, one image at a time, on the CPU; note: why the batch size is fixed, or why there is
    no file (the numbers are then None).
    """

    format: str
    megabytes: float | None
    difference: float | None
    milliseconds: float | None
    dynamic_batch: bool
    note: str = ""


def export_folder(
    pretrained: Pretrained, folder: Path, formats: Sequence[str] = FORMATS, runs: int = 5
) -> list[Exported]:
    """Export a model, compare every file with the model, and return one row per format.

    formats: of `FORMATS`; a model without an ONNX form still gets its program, and the row has the reason. runs: images
    timed for each format. Raises UserError if the folder cannot be written, torch cannot export the model, or a file's
    outputs differ from the model's by more than `TOLERANCE`.
    """
    if pretrained.tokenizer is None:
        raise UserError(f"{pretrained.folder} has no tokenizer files; save or convert it again with a tokenizer")
    model, preprocess = pretrained.model.eval(), pretrained.preprocess
    vocabulary = pretrained.tokenizer.vocab_size
    inputs, one = (example_inputs(preprocess, count, seed=count, vocabulary=vocabulary) for count in (2, 1))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    program = export_program(model, inputs)
    checks = (inputs, one) if program.dynamic else (one,)
    with torch.no_grad():
        reference = Exportable(model)
        expected = [reference(*given) for given in checks]
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
        timed: dict[str, Callable[[], Any]] = {"PyTorch": lambda: reference(*one)}
        rows = {"PyTorch": Exported("PyTorch", weights, 0.0, None, True)}
        if "torch" in formats:
            path = folder / "model.pt2"
            torch.export.save(program.program, path)
            loaded = torch.export.load(path).module()
            difference = max(largest_difference(e, loaded(*given)) for e, given in zip(expected, checks, strict=True))
            rows["torch.export"] = _row("torch.export", path, difference, program.dynamic, program.reason)
            timed["torch.export"] = lambda: loaded(*one)
        if "onnx" in formats:
            path = folder / "model.onnx"
            try:
                export_onnx(program, path)
                onnx = OnnxModel(path, torch.get_num_threads())
                difference = max(largest_difference(e, onnx(given)) for e, given in zip(expected, checks, strict=True))
                rows["ONNX"] = _row("ONNX", path, difference, program.dynamic, program.reason)
                timed["ONNX"] = lambda: onnx(one)
            except UserError as error:
                path.unlink(missing_ok=True)
                rows["ONNX"] = Exported("ONNX", None, None, None, False, str(error))
        times = _times(timed, runs)
    result = [row._replace(milliseconds=times.get(name)) for name, row in rows.items()]
    _write_files(pretrained, folder, result, has_onnx="ONNX" in timed)
    return result


def _row(name: str, path: Path, difference: float, dynamic: bool, note: str) -> Exported:
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path} differs from the model by {difference:.2g} of its largest output, more than {TOLERANCE:g}; this "
            "model cannot be exported with these versions of torch and onnxscript"
        )
    return Exported(name, path.stat().st_size / 1e6, difference, None, dynamic, note)


def _times(timed: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median milliseconds of each; they take turns, so that other load of the machine falls on all alike."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(runs + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if turn:  # the first one warms up
                found[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def _write_files(pretrained: Pretrained, folder: Path, rows: Sequence[Exported], *, has_onnx: bool) -> None:
    preprocess, rule = pretrained.preprocess, pretrained.protocol
    mean, std = MEAN_STD[str(preprocess.normalization)]
    assert pretrained.tokenizer is not None
    settings = {
        "amltrain": __version__,
        "model": pretrained.name,
        "inputs": list(INPUTS),
        "size": preprocess.size,
        "resize": preprocess.resize,
        "mean": [255 * value for value in mean],
        "std": [255 * value for value in std],
        "max_tokens": preprocess.max_tokens,
        "keeps_end_token": pretrained.tokenizer.keeps_end,
        "threshold": rule.threshold,
        "interpolation": rule.interpolation,
        "files": [row._asdict() for row in rows],
    }
    try:
        (folder / "export.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        pretrained.tokenizer.save(folder)
        if has_onnx:
            shutil.copyfile(run_onnx_path(), folder / "run_onnx.py")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def table(rows: Sequence[Exported]) -> str:
    """The rows as Markdown."""
    lines = ["| format | MB | largest difference | ms per image | batch |", "|---|--:|--:|--:|---|"]
    for row in rows:
        if row.megabytes is None:
            lines.append(f"| {row.format} | – | – | – | {row.note} |")
            continue
        batch = "any" if row.dynamic_batch else "1"
        time_ = "–" if row.milliseconds is None else f"{row.milliseconds:.1f}"
        lines.append(f"| {row.format} | {row.megabytes:.1f} | {row.difference:.1e} | {time_} | {batch} |")
    return "\n".join(lines)
