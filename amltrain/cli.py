"""`amltrain COMMAND ...`: one module for each command, imported when it is called."""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from amltrain import __version__
from amltrain.errors import PlainStream, one_line_errors, unknown_name
from amltrain.registry import take_imports

COMMANDS = {
    "finetune": ("amltrain.commands.finetune", "photographs in, a trained model and its report out"),
    "train": ("amltrain.commands.train", "train a model, or resume a run"),
    "evaluate": ("amltrain.commands.evaluate", "score a model on prepared splits"),
    "predict": ("amltrain.commands.predict", "segment the object that a sentence refers to"),
    "demo": ("amltrain.commands.demo", "try one or two models in the browser"),
    "report": ("amltrain.commands.report", "one HTML page about a run: curves, scores, predictions"),
    "compare": ("amltrain.commands.compare", "compare models over seeds, with error bars"),
    "export": ("amltrain.commands.export", "write a model as torch.export and ONNX files"),
    "convert": ("amltrain.commands.convert", "turn an official checkpoint into a model folder"),
    "push": ("amltrain.commands.push", "publish a model on the Hugging Face Hub"),
    "list": ("amltrain.commands.list", "models, methods, augmentations, losses, metrics, data sets, configs"),
    "doctor": ("amltrain.commands.doctor", "versions, devices and limits of this machine, for a bug report"),
    "data download": ("amltrain.commands.download", "download RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, COCO's images"),
    "data prepare": ("amltrain.commands.prepare", "turn own data, or REFER files and images, into Parquet"),
    "data describe": ("amltrain.commands.describe", "write referring expressions for annotated objects without any"),
    "data look": ("amltrain.commands.look", "a picture of training samples, before and after augmentations"),
    "data presize": ("amltrain.commands.presize", "resize prepared images once, to load them faster"),
    "data rank": ("amltrain.commands.rank", "rank images by a dual encoder, for the mosaic augmentation"),
    "data push": ("amltrain.commands.push_data", "publish prepared data on the Hugging Face Hub"),
    "analyse": ("amltrain.paper.analyse", "robustness, occlusion, activation, dynamics, errors, ..."),
    "analyse diagnose": ("amltrain.paper.diagnose", "what alignment scores know of the referent and the sentence"),
    "paper reproduce": ("amltrain.paper.reproduce", "make the AML paper's tables and figures"),
}
"""Module and summary of each command. A command of two words belongs to the group that its first word names."""
RENAMED = {
    "download": "data download",
    "prepare": "data prepare",
    "presize": "data presize",
    "rank": "data rank",
    "push-data": "data push",
    "models": "list models",
    "methods": "list methods",
    "augmentations": "list augmentations",
    "configs": "list configs",
    "diagnose": "analyse diagnose",
    "reproduce": "paper reproduce",
}
"""Names of version 0.1; they work until 0.3."""
GROUPS = sorted({name.split()[0] for name in COMMANDS if " " in name} - COMMANDS.keys())
USAGE = """usage: amltrain COMMAND [options]

`amltrain COMMAND --help` explains a command. Every command takes --import MODULE_OR_FILE, which registers models,
methods, augmentations, losses, metrics, data sets and callbacks of your own; it may be repeated.
"""


QUIET = ("TORCH_CPP_LOG_LEVEL", "FATAL")
"""Environment variable without which torch prints up to 60 lines of C++ frames for a process that is gone, which a
sentence of ours names. Set it to INFO to see them."""


def main() -> None:
    """Entry point of the `amltrain` program."""
    if "_ARGCOMPLETE" in os.environ:
        from amltrain.completion import complete

        complete(COMMANDS)
    sys.stdout, sys.stderr = PlainStream(sys.stdout), PlainStream(sys.stderr)  # type: ignore[assignment]
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(COMMANDS))
        return
    if arguments[0] == "--version":
        print(f"amltrain {__version__} (torch {version('torch')}, accelerate {version('accelerate')})")
        return
    with one_line_errors():
        command, rest = split_command(arguments)
    if command in GROUPS:
        print(_overview({name: entry for name, entry in COMMANDS.items() if name.startswith(f"{command} ")}))
        return
    run(command, rest)


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one command, after importing the plugins that its arguments name."""
    os.environ.setdefault(*QUIET)  # before torch is imported
    with one_line_errors():
        rest = take_imports(arguments)
    sys.argv = [f"amltrain {command}", *rest]
    try:
        with one_line_errors():
            importlib.import_module(COMMANDS[command][0]).main(rest)
            _flush()
    except BrokenPipeError:  # the reader of our output has enough, e.g. `amltrain list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _flush() -> None:
    """Hand on what was printed; what a full disk does not take is not tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that these arguments start with, and the others; a group alone is a command that lists it.

    Names of version 0.1 are understood, with a line on stderr. Raises UserError for an unknown command.
    """
    given = list(arguments)
    if given[0] in RENAMED:
        new = RENAMED[given[0]]
        print(f"`amltrain {given[0]}` is now `amltrain {new}`; the old name works until 0.3", file=sys.stderr)
        given[:1] = new.split()
    two = " ".join(given[:2])
    if two in COMMANDS:
        return two, given[2:]
    if given[0] in GROUPS:
        if len(given) > 1 and given[1] not in ("-h", "--help"):
            names = [name.split()[1] for name in COMMANDS if name.startswith(f"{given[0]} ")]
            raise unknown_name(f"command of amltrain {given[0]}", given[1], names)
        return given[0], []
    if given[0] not in COMMANDS:
        raise unknown_name("command", given[0], [*COMMANDS, *RENAMED])
    return given[0], given[1:]


def _overview(commands: dict[str, tuple[str, str]]) -> str:
    return USAGE + "\n" + "\n".join(f"  {name:17} {text}" for name, (_, text) in commands.items())


if __name__ == "__main__":
    main()
