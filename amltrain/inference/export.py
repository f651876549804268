"""Models as files that run without amltrain: torch.export programs and ONNX.

A model as a torch.export program, and that program as ONNX.

The folder of an exported model.

FOLDER/
  model.pt2                  torch.export program: torch.export.load("model.pt2").module()(image, input_ids, text_mask)
  model.onnx                 the same as ONNX, where it converts
  export.json                inputs, preprocessing, threshold; size, largest difference and time of each file
  run_onnx.py                segments an image with onnxruntime, without torch and amltrain
  tokenizer files            as SentenceTokenizer.save writes them
"""

import io
import json
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from amltrain import __version__
from amltrain.config.schema import Preprocess
from amltrain.data.transforms import MEAN_STD
from amltrain.errors import UserError, first_line
from amltrain.files import new_file
from amltrain.hub.model_folder import Pretrained
from amltrain.inference import FORMATS
from amltrain.models.base import RISModel
from amltrain.records import Batch


def run_onnx_path() -> Path:
    """The script that goes into every exported folder."""
    return Path(__file__).with_name("run_onnx.py")


INPUTS = ("image", "input_ids", "text_mask", "view")
"""In this order; `view` is there for models that read a second picture."""
LARGEST_BATCH = 1024

Inputs = tuple[Tensor, ...]
"""Of one call, in the order of INPUTS."""


class Exportable(nn.Module):
    """A model that takes and returns plain tensors.

    image [B, 3, S, S] float32 normalised, input_ids [B, L] int64, text_mask [B, L] bool, view [B, 3, v, v] as in
    `records.Batch` for a model that reads one -> logits [B, K, h, w], and no_target [B, 2] logits where the model has a
    head for it.
    """

    def __init__(self, model: RISModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image: Tensor, input_ids: Tensor, text_mask: Tensor, view: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        count = image.shape[0]
        none = torch.zeros(count, dtype=torch.int64, device=image.device)
        batch = Batch(
            image=image,
            input_ids=input_ids,
            text_mask=text_mask,
            target=torch.zeros(count, 1, 1, dtype=torch.uint8, device=image.device),
            no_target=none.bool(),
            sample_id=none,
            random_key=none,
            geometry=torch.zeros(count, 6, dtype=torch.float64, device=image.device),
            view=view,
        )
        output = self.model(batch)
        return (output.logits, output.aux["no_target"]) if "no_target" in output.aux else (output.logits,)


class Program(NamedTuple):
    """program: torch.export's; dynamic: any batch size is accepted; reason: why not, otherwise empty."""

    program: torch.export.ExportedProgram
    dynamic: bool
    reason: str


def example_inputs(preprocess: Preprocess, count: int, seed: int = 0, vocabulary: int = 40) -> Inputs:
    """Random inputs of a model: noise, and sentences of 3 tokens and more. vocabulary: ids are below it."""
    size, length = preprocess.size, preprocess.max_tokens
    assert size and length
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, size, size, generator=generator)
    input_ids = torch.randint(4, vocabulary, (count, length), generator=generator)
    read = torch.arange(length) < torch.randint(3, length + 1, (count, 1), generator=generator)
    given = (image, input_ids * read, read)
    if not reads_view(preprocess):
        return given
    side = preprocess.view_size
    return (*given, torch.randn(count, 3, side, side, generator=generator))


def reads_view(preprocess: Preprocess) -> bool:
    """Whether an exported model takes a second picture; a language model's makes it of the first."""
    return preprocess.view_size > 0 and not preprocess.conversation


def export_program(model: RISModel, inputs: Inputs) -> Program:
    """Export a model in evaluation mode on the CPU, with any batch size if it can be.

    inputs: an example batch of at least two samples. Raises UserError with torch's reason if the model cannot be
    exported at all.
    """
    wrapped = Exportable(model.eval())
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    shapes = tuple({0: batch} for _ in inputs)
    reason = ""
    with _quiet(), torch.no_grad():
        for example, dynamic in ((inputs, shapes), (_first(inputs), None)):
            try:
                program = torch.export.export(wrapped, example, dynamic_shapes=dynamic, strict=False)
                return Program(program, dynamic is not None, reason)
            except Exception as error:  # torch.export raises many kinds
                reason = first_line(error).split("!")[0]
    raise UserError(f"torch.export cannot export {type(model).__name__} ({reason})")


class _Patient(io.RawIOBase):
    """A file that keeps its first error for later: torch's writer ends the whole process when a write raises."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__()
        self.raw = raw
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """What torch asks for, and does when it is done."""
        return self.raw.seek(offset, whence)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.error is None and len(rest):  # a disk that gets full takes a part
                rest = rest[self.raw.write(rest) :]
        except OSError as error:
            self.error = error
        return size


def save_program(program: Program, path: Path) -> None:
    """Write a program as torch.export does. Raises OSError."""
    with path.open("wb", buffering=0) as raw:
        file = _Patient(raw)
        torch.export.save(program.program, file)  # type: ignore[arg-type]  # any io.IOBase will do
        if file.error is not None:
            raise file.error


def export_onnx(program: Program, path: Path) -> None:
    """Convert a program to an ONNX file with its weights inside. Raises UserError with the reason if that fails."""
    for package in ("onnx", "onnxscript"):
        _require(package)
    inputs = list(INPUTS[: len(program.program.graph_signature.user_inputs)])
    names = ["logits", "no_target"][: len(program.program.graph_signature.user_outputs)]
    try:
        with _quiet():
            converted = torch.onnx.export(
                program.program, (), dynamo=True, input_names=inputs, output_names=names, verbose=False
            )
            assert converted is not None
            converted.save(path)
    except OSError:  # of the disk, which is no fault of the model
        raise
    except Exception as error:  # onnxscript raises many kinds
        raise UserError(f"ONNX has no equivalent for this model ({_cause(error)})") from error


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """threads: None leaves the number to onnxruntime."""
        runtime = _require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many kinds
            raise UserError(f"onnxruntime cannot run this model ({_cause(error)})") from error
        self.names = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[NDArray[np.float32]]:
        """Run on inputs in the order of `INPUTS`; a model that does not read one of them has no such input."""
        given = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=False) if name in self.names}
        return self.session.run(None, given)


def largest_difference(expected: Sequence[Tensor], found: Sequence[Any]) -> float:
    """The largest absolute difference between outputs, as a share of the largest absolute expected value."""
    pairs = list(zip(expected, (torch.as_tensor(f) for f in found), strict=True))
    return max(float((e - f).abs().max() / e.abs().max().clamp(min=1e-12)) for e, f in pairs)


def _first(inputs: Inputs) -> Inputs:
    return tuple(tensor[:1] for tensor in inputs)


def _require(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(f"ONNX needs {package}; install it with: pip install onnx onnxruntime onnxscript") from error


def _cause(error: BaseException) -> str:
    """The innermost reason: torch's exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}" if isinstance(error, Exception) else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which advise their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


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
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not an empty folder; choose another output")
    with new_file(folder) as temporary:  # the folder has its name once every file is in it
        temporary.mkdir()
        rows = _export(pretrained, temporary, formats, runs)
        _write_files(pretrained, temporary, rows, has_onnx=rows[-1].format == "ONNX" and rows[-1].megabytes is not None)
    return rows


def _export(pretrained: Pretrained, folder: Path, formats: Sequence[str], runs: int) -> list[Exported]:
    """Write the models alone into a folder, and compare them."""
    assert pretrained.tokenizer is not None
    model, preprocess = pretrained.model.eval(), pretrained.preprocess
    vocabulary = pretrained.tokenizer.vocab_size
    inputs, one = (example_inputs(preprocess, count, seed=count, vocabulary=vocabulary) for count in (2, 1))
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
            save_program(program, path)
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
    return [row._replace(milliseconds=times.get(name)) for name, row in rows.items()]


def _row(name: str, path: Path, difference: float, dynamic: bool, note: str) -> Exported:
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path.name} differs from the model by {difference:.2g} of its largest output, more than {TOLERANCE:g}; "
            "this model cannot be exported with these versions of torch and onnxscript"
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
        "inputs": list(INPUTS if reads_view(preprocess) else INPUTS[:3]),
        "size": preprocess.size,
        "resize": preprocess.resize,
        "view": [preprocess.view, preprocess.view_size] if reads_view(preprocess) else None,
        "mean": [255 * value for value in mean],
        "std": [255 * value for value in std],
        "max_tokens": preprocess.max_tokens,
        "keeps_end_token": pretrained.tokenizer.keeps_end,
        "threshold": rule.threshold,
        "interpolation": rule.interpolation,
        "no_target_pixels": rule.no_target_pixels,
        "files": [row._asdict() for row in rows],
    }
    (folder / "export.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    pretrained.tokenizer.save(folder)
    if has_onnx:
        shutil.copyfile(run_onnx_path(), folder / "run_onnx.py")


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
