"""List the registered models: a Markdown table of name, parameters, paper, licence of the release, what AML scores.

amltrain models
"""

import argparse
from collections.abc import Sequence

import torch

from amltrain.models import create_model, list_models, model_info


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="amltrain models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    print("| model | parameters (trained) | paper | licence of the release | AML scores |")
    print("| --- | ---: | --- | --- | --- |")
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        info = model_info(name)
        size = f"{total / 1e6:.1f} M" + (f" ({trained / 1e6:.1f} M)" if trained != total else "")
        print(f"| {name} | {size} | {info.paper} | {info.licence} | {info.aml_scores} |")
