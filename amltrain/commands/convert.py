"""Convert an official checkpoint into a model folder that evaluate, predict and train can load.

    amltrain convert --model caris_swin_base --file caris_refcoco.pth --output models/caris_refcoco
    amltrain convert --model cris_r101 --file cris_g.pth --output models/cris_g --max_tokens 22

Prints what was renamed, what was dropped and why; rejects a file that does not match the model, naming the keys.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amltrain.config.fields import check_number
from amltrain.config.schema import PreprocessOverrides
from amltrain.errors import UserError, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="registered model; `amltrain list models` lists them")
    parser.add_argument("--file", required=True, help="official .pth, .pt, .bin or .safetensors file")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--kwargs", type=_json_object, default={}, help="arguments of the model's builder, as JSON")
    parser.add_argument(
        "--entry", help="entry of the file that holds the weights, e.g. model_ema (default: looked for)"
    )
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of the tokenizer; `none` leaves it out (default: the model's own)"
    )
    parser.add_argument(
        "--max_tokens", type=int, help="tokens per sentence that the file was trained with (default: the model's own)"
    )
    parser.add_argument(
        "--size", type=int, help="side of the input that the file was trained with, pixels (default: the model's own)"
    )
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, e.g. '{\"window_size\": 12}'")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        check_number("--max_tokens", args.max_tokens, 1, math.inf)
        check_number("--size", args.size, 1, math.inf)
        from amltrain.config.fields import override
        from amltrain.data.loaders import load_tokenizer  # this and the next two import torch
        from amltrain.hub.convert import convert_official, summary
        from amltrain.models.registry import model_info

        if not Path(args.file).is_file():
            raise UserError(f"--file: {args.file} does not exist")
        own = PreprocessOverrides(size=args.size, max_tokens=args.max_tokens)
        preprocess = override(model_info(args.model).preprocess, own)
        name = args.tokenizer or str(preprocess.tokenizer)
        fix = "give --tokenizer FOLDER, or --tokenizer none to leave it out"
        tokenizer = None if name == "none" else load_tokenizer(name, preprocess, fix)
        conversion = convert_official(
            args.model,
            args.file,
            args.output,
            kwargs=args.kwargs,
            entry=args.entry,
            preprocess=own,
            tokenizer=tokenizer,
        )
        print(summary(conversion))
        print(f"input: {preprocess.size} px {preprocess.resize}, {preprocess.max_tokens} tokens a sentence")
        print(f"written to {args.output}")
