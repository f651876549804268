"""Score a trained model on splits of the prepared data: oIoU, mIoU, Pr@t, or gIoU, cIoU, N-acc, T-acc on gRefCOCO.

    amltrain evaluate --checkpoint runs/caris/best/model --data.datasets [refcoco] --splits val testA

Prints a table and writes results.json (with the protocol inside) and a sheet of predictions. The scores are the same at
any number of processes. Without --data.datasets it scores on the data sets that the model was trained on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from torch.utils.data import DataLoader

from amltrain.config.files import Groups, read_config_files
from amltrain.config.parse import one_line
from amltrain.config.ranges import ANY, check_number
from amltrain.config.schema import DataConfig, EvaluationConfig, Protocol, ProtocolOverrides
from amltrain.data.loaders import build_eval_loaders
from amltrain.errors import UserError, one_line_errors
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.perturbations import PAPER, Perturbation, build_perturbation
from amltrain.evaluation.pictures import prediction_sheet, save_picture
from amltrain.evaluation.protocols import PROTOCOLS, named_protocol, run_protocol
from amltrain.evaluation.results import Results, table, write_results
from amltrain.hub.model_folder import Pretrained, find_model_folder, load_pretrained, read_training
from amltrain.training.build import check_scenes, ensure_prepared
from amltrain.training.distributed import PREPARATION, on_main_process


def build_parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="amltrain evaluate", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of these options; later ones override")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="model folder, checkpoint folder or Hub repository"
    )
    parser.add_argument(
        "--splits",
        type=str,
        nargs="+",
        default=["val"],
        help="splits, e.g. val testA; `refcoco+:val` names the data set",
    )
    parser.add_argument(
        "--output", type=str | None, help="folder for results.json and pictures; null = evaluation/ and the checkpoint"
    )
    parser.add_class_arguments(DataConfig, "data")
    parser.set_defaults({"data.datasets": []})
    parser.add_argument("--preset", type=str | None, help=f"score as this release does: {', '.join(PROTOCOLS)}")
    parser.add_class_arguments(ProtocolOverrides, "protocol")
    parser.add_argument("--batch_size", type=int, default=16, help="samples per forward pass on one process")
    parser.add_argument("--max_samples", type=int | None, help="score only the first so many samples of a split")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="no is fp32")
    parser.add_argument("--pictures", type=int, default=8, help="predictions drawn per split")
    parser.add_argument("--seed", type=int, default=0, help="of perturbations and shuffled sentences")
    parser.add_argument(
        "--shuffle_sentences", type=bool, default=False, help="give every image another sample's sentence"
    )
    parser.add_argument(
        "--perturbations", type=str, nargs="+", default=[], help="make images harder; `all`: the seven of the AML paper"
    )
    parser.add_argument(
        "--severity", type=float | None, help="strength of the perturbations; 0 = none, 1 = the defaults"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        parser = build_parser()
        groups: Groups = {"data": DataConfig, "protocol": ProtocolOverrides}
        arguments = read_config_files(sys.argv[1:] if arguments is None else arguments, groups).arguments
        try:
            checkpoint = parser.parse_args(arguments).checkpoint
            parser.set_defaults(_as_trained(checkpoint))
            args = parser.instantiate(parser.parse_args(arguments))
        except UserError:
            raise
        except Exception as error:  # jsonargparse raises its own kinds; all of them are about what was typed
            raise UserError(one_line(str(error), parser)) from error
        _check_flags(args)
        results = evaluate(args)
        if PartialState().is_main_process:
            print(table(results))


def evaluate(args: Namespace) -> list[Results]:
    """Score every split under every perturbation; every process returns the same results, the main one writes them."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    output = Path(args.output or _default_output(args.checkpoint))
    pretrained = load_pretrained(args.checkpoint)
    model = accelerator.prepare_model(pretrained.model, evaluation_mode=True)
    on_main_process(accelerator, lambda: ensure_prepared(args.data, accelerator.print), wait=PREPARATION)
    check_scenes(args.data)
    own = named_protocol(args.preset) if args.preset else pretrained.protocol
    protocol = run_protocol(own, args.data, args.protocol)
    results: list[Results] = []
    for perturbation in _perturbations(args):
        loaders = _loaders(args, pretrained, protocol, perturbation)
        on_main_process(accelerator, lambda: _make_folder(output))  # before minutes of scoring, not after
        for name, loader in loaders.items():
            result = evaluate_model(
                accelerator, model, loader, protocol, pictures=args.pictures, provenance=_provenance(args, perturbation)
            )
            results.append(result)
            if accelerator.is_main_process:  # after every split, so that a long evaluation that dies leaves what it had
                write_results(output / "results.json", results)
                picture = "-".join([name.replace(":", "-"), *([perturbation.name] if perturbation else [])])
                save_picture(prediction_sheet(result, loader.dataset), output / f"{picture}.png")
    return results


def _perturbations(args: Namespace) -> list[Perturbation | None]:
    """None is the image as it is; `all` the seven of the paper."""
    names = [n for name in args.perturbations or ["none"] for n in (PAPER if name == "all" else [name])]
    return [None if n == "none" else build_perturbation(n, args.severity, args.seed) for n in names]


def _loaders(
    args: Namespace, pretrained: Pretrained, protocol: Protocol, perturbation: Perturbation | None
) -> dict[str, DataLoader]:
    if pretrained.tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer files; save or convert it again with a tokenizer")
    evaluation = EvaluationConfig(
        splits=args.splits,
        batch_size=args.batch_size,
        max_samples=args.max_samples,
        shuffle_sentences=args.shuffle_sentences,
    )
    return build_eval_loaders(
        args.data,
        pretrained.preprocess,
        evaluation,
        protocol,
        pretrained.tokenizer,
        seed=args.seed,
        perturb=perturbation,
    )


def _provenance(args: Namespace, perturbation: Perturbation | None) -> dict[str, Any]:
    training = read_training(find_model_folder(args.checkpoint))
    data = training["recipe"]["data"] if training else {}
    return {
        "checkpoint": args.checkpoint,
        "trained_on": data.get("datasets"),
        "train_split": data.get("train_split"),
        "leak_filter": data.get("leak_filter"),
        "commit": training["commit"] if training else None,
        "max_samples": args.max_samples,
        "perturbation": perturbation.describe() if perturbation else None,
        "seed": args.seed,
    }


def _as_trained(checkpoint: str) -> dict[str, Any]:
    """Defaults of the data to score on: what the model was trained on, as its folder says."""
    training = read_training(find_model_folder(checkpoint))
    if training is None:
        return {}
    data = training["recipe"]["data"]
    shapes = {f"data.shapes.{key}": value for key, value in data["shapes"].items()}
    return {"data.datasets": data["datasets"], **shapes}


def _check_flags(args: Namespace) -> None:
    if args.severity is not None and not args.perturbations:
        raise UserError("--severity is of perturbations; give --perturbations as well")
    for flag, low in (("batch_size", 1), ("max_samples", 1), ("pictures", 0), ("severity", 0)):
        check_number(f"--{flag}", args[flag], low, ANY)
    check_number("--protocol.threshold", args.protocol.threshold, 0, 1)


def _default_output(checkpoint: str) -> str:
    """evaluation/RUN-best for RUN/best/model, evaluation/user-name for a Hub repository."""
    parts = [part for part in Path(checkpoint).parts if part not in ("/", "..", "model")]
    return str(Path("evaluation") / "-".join(parts[-2:]))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
