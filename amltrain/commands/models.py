"""List the registered models as a Markdown table: parameters, paper, licence of the official code, what AML scores.

amltrain models
amltrain models caris        # only the names that contain this
"""

import argparse
from collections.abc import Iterator, Sequence

from amltrain.errors import one_line_errors, unknown_name


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", help="list only the models whose name contains this")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    from amltrain.models import list_models  # imports torch

    with one_line_errors():
        names = [name for name in list_models() if args.name in name]
        if not names:
            raise unknown_name("model", args.name, list_models())
    for row in table(names):
        print(row, flush=True)


def table(names: Sequence[str]) -> Iterator[str]:
    """The rows of the Markdown table, with a header; counting the parameters of a large model takes a moment."""
    import torch

    from amltrain.models import create_model, model_info

    yield "| Model | Parameters (trained) | Paper | Licence of the official code | AML scores |"
    yield "| --- | ---: | --- | --- | --- |"
    for name in names:
        with torch.device("meta"):
            model = create_model(name)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        info = model_info(name)
        size = f"{total / 1e6:.1f} M" + (f" ({trained / 1e6:.1f} M)" if trained != total else "")
        yield f"| {name} | {size} | {info.paper} | {info.licence} | {info.aml_scores} |"
