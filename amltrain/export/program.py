"""A model as a torch.export program, and that program as ONNX."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.errors import UserError, first_line
from amltrain.models.base import RISModel
from amltrain.records import Batch

INPUTS = ("image", "input_ids", "text_mask")
LARGEST_BATCH = 1024

Inputs = tuple[Tensor, Tensor, Tensor]


class Exportable(nn.Module):
    """A model that takes and returns plain tensors.

    image [B, 3, S, S] float32 normalised, input_ids [B, L] int64, text_mask [B, L] bool -> logits [B, K, h, w], and
    no_target [B, 2] logits where the model has a head for it.
    """

    def __init__(self, model: RISModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, input_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
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
    return image, input_ids * read, read


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


def export_onnx(program: Program, path: Path) -> None:
    """Convert a program to an ONNX file with its weights inside. Raises UserError with the reason if that fails."""
    for package in ("onnx", "onnxscript"):
        _require(package)
    names = ["logits", "no_target"][: len(program.program.graph_signature.user_outputs)]
    try:
        with _quiet():
            converted = torch.onnx.export(
                program.program, (), dynamo=True, input_names=list(INPUTS), output_names=names, verbose=False
            )
            assert converted is not None
            converted.save(path)
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
        given = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True) if name in self.names}
        return self.session.run(None, given)


def largest_difference(expected: Sequence[Tensor], found: Sequence[Any]) -> float:
    """The largest absolute difference between outputs, as a share of the largest absolute expected value."""
    pairs = list(zip(expected, (torch.as_tensor(f) for f in found), strict=True))
    return max(float((e - f).abs().max() / e.abs().max().clamp(min=1e-12)) for e, f in pairs)


def _first(inputs: Inputs) -> Inputs:
    image, ids, mask = (tensor[:1] for tensor in inputs)
    return image, ids, mask


def _require(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(f"ONNX needs {package}; install it with: pip install 'amltrain[export]'") from error


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
