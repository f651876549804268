"""List the registered augmentations with their options and defaults.

amltrain augmentations
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields

from amltrain.data.augment import augmentation_entry, list_augmentations


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    return argparse.ArgumentParser(
        prog="amltrain augmentations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    build_parser().parse_args(arguments)
    for name in list_augmentations():
        options = augmentation_entry(name).options
        print(f"{name}: {(options.__doc__ or '').strip().splitlines()[0]}")
        for option in fields(options):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            print(f"  --{name}.{option.name} {default if default is not None else 'null'}")


if __name__ == "__main__":
    main()
