"""`amltrain COMMAND ...`: one module of amltrain.commands for each command, imported when it is called."""

import importlib
import os
import sys
from importlib.metadata import version

from amltrain import __version__
from amltrain.errors import one_line_errors, unknown_name

COMMANDS = {
    "train": ("amltrain.commands.train", "train a model, or resume a run"),
    "evaluate": ("amltrain.commands.evaluate", "score a model on prepared splits"),
    "predict": ("amltrain.commands.predict", "segment the object that a sentence refers to"),
    "prepare": ("amltrain.commands.prepare", "turn REFER files and images into Parquet"),
    "push": ("amltrain.commands.push", "publish a model on the Hugging Face Hub"),
    "convert": ("amltrain.commands.convert", "turn an official checkpoint into a model folder"),
    "benchmark": ("amltrain.commands.benchmark", "measure the cost of a training method"),
    "models": ("amltrain.commands.models", "list the registered models"),
    "configs": ("amltrain.commands.configs", "list, show and locate the shipped configs"),
}
USAGE = "usage: amltrain COMMAND [options]\n\n`amltrain COMMAND --help` explains a command.\n"


def main() -> None:
    """Entry point of the `amltrain` program."""
    if "_ARGCOMPLETE" in os.environ:
        from amltrain.completion import complete

        complete(COMMANDS)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        print("\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()))
        return
    if sys.argv[1] == "--version":
        print(f"amltrain {__version__} (torch {version('torch')}, accelerate {version('accelerate')})")
        return
    with one_line_errors():
        name = sys.argv.pop(1)
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
