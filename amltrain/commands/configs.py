"""List the shipped configs, show one, or print its path.

amltrain configs                           # all names, with the first line of each file
amltrain configs recipes/paper             # the names that start so
amltrain configs quickstart                # the file
amltrain train --config quickstart --print_config          # the same with all bases and defaults filled in
amltrain configs --schema > amltrain.schema.json           # for editors: keys are completed and checked
accelerate launch --config_file "$(amltrain configs --path accelerate/ddp)" -m amltrain train --config quickstart
"""

import argparse
import json
from collections.abc import Sequence

from amltrain.config.files import find_config, shipped_configs
from amltrain.errors import UserError, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain configs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a shipped config, or the start of several names")
    parser.add_argument("--path", action="store_true", help="print only the path of the file")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of config files")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    shipped = shipped_configs()
    with one_line_errors():
        if args.schema:
            print(_schema())
            return
        if args.path and not args.name:
            raise UserError("--path needs the name of a config; `amltrain configs` lists them")
        listed = {name: path for name, path in shipped.items() if name.startswith(f"{args.name or ''}")}
        if args.path or args.name in shipped or not listed:
            path = find_config(args.name, "amltrain configs")
            print(path if args.path else path.read_text(encoding="utf-8").strip())
            return
    first = {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in listed.items()}
    print("\n".join(f"{name:48} {line}" for name, line in first.items()))


def _schema() -> str:
    from amltrain.config.json_schema import config_schema
    from amltrain.data.augment import augmentation_sections
    from amltrain.methods.registry import method_sections
    from amltrain.models.registry import list_models

    return json.dumps(config_schema(method_sections(), augmentation_sections(), list_models()), indent=2)
