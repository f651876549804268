"""The package from Python: what the commands do, without a command line.

    import amltrain
    results = amltrain.train({"model": {"name": "caris_tiny"}, "train": {"max_steps": 200}}, base="quickstart")
    results = amltrain.evaluate("runs/quickstart", splits=["val"])
    print(amltrain.compare({"one": ["evaluation/a"], "other": ["evaluation/b"]}))
    page = amltrain.report("runs/quickstart")
    files = amltrain.export("runs/quickstart/best", "exported")
    [found] = amltrain.Predictor.from_pretrained("runs/quickstart/best")("photo.jpg", "the dog on the left")

Errors that a user can fix are `amltrain.UserError`. Calls in one Python process do not disturb each other: each starts
Accelerate again, so that precision and device may differ.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from amltrain.config.parse import config_of
from amltrain.config.schema import DataConfig, ProtocolOverrides, RunConfig, nested
from amltrain.errors import UserError, unknown_name
from amltrain.registry import import_plugin
from amltrain.run_folder import find_model_folder

Settings = RunConfig | Mapping[str, Any] | str | Path
"""A run: its dataclass, nested values as in a YAML file, or the path or shipped name of a YAML file."""


def train(
    config: Settings = "quickstart",
    *,
    base: str | None = None,
    callbacks: Sequence[Any] = (),
    model: Any = None,
    method: Any = None,
    plugins: Sequence[str] = (),
) -> list[Any]:
    """Train a run, or resume it from its output folder; returns the last evaluation's `Results`, one per split.

    config: the run. base: a shipped config or file that nested values start from. callbacks: of
    `amltrain.training.run.Callback`, besides those that the config names. model: a built `RISModel`, trained instead of
    building `model.name`; the model folder still names that. method: builds the method from (model, loss, options,
    vocabulary), instead of the registered one. plugins: files or modules to import first, as `--import`. Raises
    UserError for anything that you can fix, SystemExit(75) where the run was asked to stop and saved.
    """
    for plugin in listed("plugins", plugins):
        if not isinstance(plugin, (str, Path)):
            raise UserError(f"plugins has {plugin!r} of type {type(plugin).__name__}; give files or names of modules")
        import_plugin(str(plugin))
    run = read_config(config, base=base)
    from amltrain.models.base import RISModel  # these import torch
    from amltrain.training.run import Callback
    from amltrain.training.trainer import train as train_run

    for callback in listed("callbacks", callbacks):
        if not isinstance(callback, Callback):
            hint = f"write {callback.__name__}(...)" if isinstance(callback, type) else "name others in train.callbacks"
            raise UserError(f"callbacks has {callback!r}, which is not an object of a Callback class; {hint}")
    if model is not None and not isinstance(model, RISModel):
        raise UserError(f"model is of type {type(model).__name__}, not a RISModel; set model.name for a registered one")
    if method is not None and not callable(method):
        raise UserError(
            f"method is of type {type(method).__name__}, not a function; set the key method for a registered one"
        )
    forget_processes()
    return train_run(run, callbacks=callbacks, model=model, method=method)


def listed(name: str, values: Any) -> list[Any]:
    """The values of an argument that takes several. Raises UserError for a single one."""
    if isinstance(values, (str, Path)) or not isinstance(values, Iterable):
        raise UserError(f"{name} takes a list, not one {type(values).__name__}; put it in brackets")
    return list(values)


def prepare(
    path: str | Path,
    name: str | None = None,
    *,
    output: str | Path = "prepared",
    images: str | Path | None = None,
    masks: str | Path | None = None,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    describe: bool | None = False,
    sentences: int = 3,
    negatives: int = 0,
    hold_out: bool = False,
    options: Any = None,
    label_field: str | None = None,
    max_skipped: float = 0.001,
    workers: int = 1,
    said: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prepare your own annotations, in whatever form, and return the manifest: counts, notes, what was skipped.

    name: of the data set; None = from the path. images, masks, form, columns, label_field: as the flags of
    `amltrain data prepare`. describe: whether objects without a sentence get some; None = only where no object has one.
    hold_out: split a tool's export again if all of its pictures are in one split.
    options: `ReadOptions` of `amltrain.data.sources.table`, e.g. seed and shares of the splits. said: gets a line about
    the form that was found. Raises UserError.
    """
    from amltrain.data.prepare import prepare_files
    from amltrain.data.sources.describe import DescribeOptions
    from amltrain.data.sources.describe_rows import describe_rows
    from amltrain.data.sources.importing import read_source
    from amltrain.data.sources.own import name_of
    from amltrain.data.sources.table import AS_WRITTEN

    place, read = Path(path), options or AS_WRITTEN
    if not place.exists():
        raise UserError(f"there is no {place}; give the folder or file with your annotations")
    name = name or name_of(place)
    choice = DescribeOptions(sentences, negatives, read.seed)
    source = read_source(
        place,
        name,
        Path(output) / "source" / name,
        form=form,
        images=None if images is None else Path(images),
        masks=None if masks is None else Path(masks),
        columns=columns,
        label_field=label_field,
        options=read,
        describe=None if describe is False else lambda imported: describe_rows(imported, choice, links=read.links),
        describe_all=describe is True,
        hold_out=hold_out,
    )
    said(source.said)
    return prepare_files(
        source.annotations,
        output,
        source.images,
        max_skipped=max_skipped,
        workers=workers,
        image_option="the data set's images" if form == "folder" else "--images",
    )


def read_config(config: Settings, *, base: str | None = None) -> RunConfig:
    """Return a run from any of its forms, with all values checked. Raises UserError."""
    if isinstance(config, RunConfig):
        return config
    return config_of(config if isinstance(config, (str, Path)) else nested(config), base)


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    predictions: str | Path | None = None,
    data: DataConfig | Mapping[str, Any] | None = None,
    protocol: ProtocolOverrides | Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Any]:
    """Score a model, or masks in files, on splits; returns a `Results` per split and perturbation.

    data: where and which; values that are not given are those that the model was trained with. options: the other
    fields of `amltrain.inference.evaluate.EvaluateOptions`, e.g. splits=["val", "testA"], batch_size=32. Writes the
    files of `amltrain evaluate`. Raises UserError.
    """
    if checkpoint is not None:
        find_model_folder(checkpoint)
    from amltrain.inference import evaluate as evaluation  # imports torch

    for name, value in (("data", data), ("protocol", protocol)):
        if value is not None and not isinstance(value, (Mapping, DataConfig, ProtocolOverrides)):
            raise UserError(f"{name} is of type {type(value).__name__}; give its keys as a dictionary")
    if "splits" in options:
        listed("splits", options["splits"])
    if not isinstance(data, DataConfig):
        trained = {} if checkpoint is None else evaluation.trained_data(str(checkpoint))
        given = {key: trained[key] for key in ("datasets", "prepared", "shapes") if key in trained} | dict(data or {})
        data = config_of(nested({"data": given}), None).data
    if not isinstance(protocol, ProtocolOverrides):
        known = [own.name for own in fields(ProtocolOverrides)]
        unknown = sorted(set(protocol or {}) - set(known))
        if unknown:
            raise unknown_name("key of protocol", str(unknown[0]), known)
        protocol = ProtocolOverrides(**(protocol or {}))
    forget_processes()
    chosen = evaluation.EvaluateOptions(
        checkpoint=None if checkpoint is None else str(checkpoint),
        predictions=None if predictions is None else str(predictions),
        data=data,
        protocol=protocol,
        **options,
    )
    return evaluation.evaluate(chosen)


def compare(
    models: Mapping[str, Sequence[str | Path] | str | Path],
    *,
    metrics: Sequence[str] = (),
    draws: int = 2000,
    seed: int = 0,
    output: str | Path | None = None,
) -> Any:
    """Compare models over seeds; the first is the reference. Returns a `Comparison`, which prints as a Markdown table.

    models: name -> folders of evaluations, results.json files or runs, one for each seed. output: folder for
    comparison.md, .tex and .json; None = nothing is written. Raises UserError for results of different protocols.
    """
    from amltrain.evaluation import compare as comparing
    from amltrain.evaluation.metrics import list_metrics
    from amltrain.evaluation.results import write_text

    if not isinstance(models, Mapping) or not models:
        raise UserError('models is a dictionary of names and folders, e.g. {"one": ["evaluation/a"]}')
    if draws < 1:
        raise UserError(f"draws is {draws} and must be at least 1")
    unknown = sorted(set(listed("metrics", metrics)) - set(list_metrics()))
    if unknown:
        raise UserError(f"there is no metric {unknown[0]!r}; there are {', '.join(list_metrics())}")
    groups = {
        name: [str(place) for place in ([places] if isinstance(places, (str, Path)) else places)]
        for name, places in models.items()
    }
    empty = [name for name, places in groups.items() if not places]
    if empty:
        raise UserError(f"model {empty[0]!r} has no folder of an evaluation; give one for each seed")
    comparison = comparing.compare(groups, draws=draws, seed=seed, metrics=metrics)
    if output is not None:
        folder = Path(output)
        write_text(folder / "comparison.md", comparing.comparison_markdown(comparison) + "\n")
        write_text(folder / "comparison.tex", comparing.comparison_latex(comparison))
        write_text(folder / "comparison.json", json.dumps(comparing.comparison_dict(comparison), indent=2) + "\n")
    return comparison


def report(run: str | Path, **options: Any) -> Path:
    """Write the HTML page of a run, or of a model with `output`, and return its path.

    options: fields of `amltrain.report.page.ReportOptions`, e.g. splits=["val"], pictures=30. Raises UserError.
    """
    from amltrain.report.page import ReportOptions
    from amltrain.report.page import report as write_report  # imports torch

    forget_processes()
    return write_report(ReportOptions(run=str(run), **options))


def export(
    checkpoint: str | Path, output: str | Path, *, formats: Sequence[str] | None = None, runs: int = 5
) -> list[Any]:
    """Write a model as torch.export program and ONNX into a new folder; returns a row per format, compared with it.

    runs: images that are timed for each format. Raises UserError for a folder that is not empty.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another output")
    find_model_folder(checkpoint)
    from amltrain.hub.model_folder import load_pretrained  # these import torch
    from amltrain.inference import FORMATS
    from amltrain.inference.export import export_folder

    unknown = [name for name in listed("formats", formats or FORMATS) if name not in FORMATS]
    if unknown:
        raise unknown_name("format", str(unknown[0]), FORMATS)
    if runs < 1:
        raise UserError(f"runs is {runs} and must be at least 1")
    return export_folder(load_pretrained(checkpoint), folder, list(formats or FORMATS), runs)


def forget_processes() -> None:
    """Let the next Accelerator choose precision and device again; inside a launched run there is nothing to forget."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
