"""Score a trained model, or predictions in files, on splits of the prepared data.

    amltrain evaluate --checkpoint runs/caris --splits all
    amltrain evaluate --checkpoint runs/caris --suite out_of_domain
    amltrain evaluate --predictions masks/ --preset lavt --data.datasets [refcoco] --splits val testA
    accelerate launch -m amltrain evaluate --checkpoint runs/caris --splits val testA

Prints a table and adds its rows to OUTPUT/results.json, which keeps its other rows. Next to it: the tables as Markdown,
LaTeX and CSV, one row per sample as Parquet (samples/), and pictures. Scores are the same at any number of processes. A
model is scored on the data sets that it was trained on unless --data.datasets names others.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import ArgumentParser, set_parsing_settings

from amltrain.config.files import Groups, read_config_files
from amltrain.config.parse import one_line
from amltrain.config.schema import DataConfig, ProtocolOverrides
from amltrain.data.catalog import SUITES
from amltrain.errors import UserError, one_line_errors
from amltrain.run_folder import find_model_folder

OF_TRAINING = (
    "leak_filter",
    "also_held_out",
    "held_out_ids",
    "weights",
    "train_split",
    "train_unit",
    "sentences_per_image",
    "augment",
)
"""Keys of `data` that an evaluation does not read."""


def build_parser() -> ArgumentParser:
    """Build the command line's parser."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="amltrain evaluate", description=__doc__, exit_on_error=False, allow_abbrev=False)
    add = parser.add_argument
    add("--config", action="config", help="YAML file of these options; later ones override")
    add("--checkpoint", type=str | None, help="run (its best model), model folder, checkpoint or Hub repository")
    add(
        "--predictions",
        type=str | None,
        help="instead of a checkpoint: folder of masks REF_SENT.png, or JSON lines with ref_id, sent_id, size, counts",
    )
    add(
        "--splits",
        type=str,
        nargs="+",
        default=["val"],
        help="splits, e.g. val testA; `refcoco+:val` names the data set; `all`: every evaluation split",
    )
    add(
        "--suite",
        choices=[*SUITES, None],
        default=None,
        help="score every split of the benchmarks that are prepared, in one table; in place of data sets and splits",
    )
    add("--output", type=str | None, help="folder for results; null = evaluation/ and the checkpoint")
    parser.add_class_arguments(DataConfig, "data", skip=set(OF_TRAINING))
    parser.set_defaults({"data.datasets": []})
    add(
        "--preset",
        type=str | None,
        help="score as the official code of this family of models does, e.g. lavt; `amltrain list models` lists them",
    )
    parser.add_class_arguments(ProtocolOverrides, "protocol")
    add("--batch_size", type=int, default=16, help="samples per forward pass on one process")
    add("--max_samples", type=int | None, help="score only the first samples of a split; never published as a score")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="no is fp32")
    add("--pictures", type=int, default=8, help="predictions drawn per split; 0 = no pictures")
    add("--save_predictions", choices=["rle", "masks", None], default=None, help="also write every predicted mask")
    add("--seed", type=int, default=0, help="seed of perturbations and shuffled sentences")
    add("--shuffle_sentences", type=bool, default=False, help="give every image the sentence of another sample")
    add("--perturbations", type=str, nargs="+", default=[], help="harder images; `all`: the seven of the AML paper")
    add(
        "--severity",
        type=float,
        nargs="+",
        default=[],
        help="strengths of the perturbations, each scored; 1 = the default; for `occluded` the share of the image that "
        "is covered, 0 to 1",
    )
    add("--encode_once", type=bool, default=True, help="run the image encoder once for all sentences of an image")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        parser = build_parser()
        groups: Groups = {"data": DataConfig, "protocol": ProtocolOverrides}
        arguments = read_config_files(sys.argv[1:] if arguments is None else arguments, groups).arguments
        try:
            checkpoint = parser.parse_args(arguments).checkpoint
            if checkpoint:
                find_model_folder(checkpoint)  # before the imports
            from accelerate import PartialState  # these import torch, once the arguments are known to be good

            from amltrain.evaluation.results import write_text
            from amltrain.evaluation.tables import suite_table, table
            from amltrain.inference import evaluate as evaluation

            if checkpoint:
                parser.set_defaults(evaluation.as_trained(checkpoint))
            parsed = parser.parse_args(arguments)
            if not checkpoint and not parsed.predictions:
                raise UserError("give --checkpoint RUN (or a folder of masks as --predictions)")
            absent = ""
            if parsed.suite:
                _check_suite(arguments)
                parsed.data.datasets, absent = evaluation.choose_suite(parsed.suite, parsed.data.prepared)
                parsed.splits = ["all"]
            values = parser.instantiate(parsed)
            options = evaluation.EvaluateOptions(**{f.name: values[f.name] for f in fields(evaluation.EvaluateOptions)})
        except UserError:
            raise
        except Exception as error:  # jsonargparse raises its own types; all are about the command line
            raise UserError(one_line(str(error), parser)) from error
        results = evaluation.evaluate(options)
        if PartialState().is_main_process:
            print(table(results))
            if values["suite"]:
                together = "\n\n".join(part for part in (suite_table(results), absent) if part)
                write_text(options.folder / f"{values['suite']}.md", together + "\n")
                print(f"\n{together}\n")
            print(f"results -> {options.folder}")


def _check_suite(arguments: Sequence[str]) -> None:
    """Raise UserError where a suite and its parts are chosen at once."""
    for flag in ("--splits", "--data.datasets"):
        if any(argument == flag or argument.startswith(f"{flag}=") for argument in arguments):
            raise UserError(f"--suite chooses data sets and splits itself; leave {flag} out")
