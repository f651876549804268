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
    "compare": ("amltrain.commands.compare", "compare models over seeds, with error bars"),
    "reproduce": ("amltrain.paper.reproduce", "make the AML paper's tables and figures"),
    "analyse": ("amltrain.paper.analyse", "robustness, occlusion, activation, histogram, dynamics, errors, ..."),
    "diagnose": ("amltrain.paper.diagnose", "what alignment scores know of the referent and the sentence"),
    "predict": ("amltrain.commands.predict", "segment the object that a sentence refers to"),
    "report": ("amltrain.commands.report", "one HTML page about a run: curves, scores, predictions"),
    "demo": ("amltrain.commands.demo", "try one or two models in the browser"),
    "export": ("amltrain.commands.export", "write a model as torch.export and ONNX files"),
    "prepare": ("amltrain.commands.prepare", "turn own data, or REFER files and images, into Parquet"),
    "describe": ("amltrain.commands.describe", "write referring expressions for annotated objects without any"),
    "presize": ("amltrain.commands.presize", "resize prepared images once, to load them faster"),
    "rank": ("amltrain.commands.rank", "rank images by a dual encoder, for the mosaic augmentation"),
    "download": ("amltrain.commands.download", "download RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and COCO's images"),
    "push-data": ("amltrain.commands.push_data", "publish prepared data on the Hugging Face Hub"),
    "push": ("amltrain.commands.push", "publish a model on the Hugging Face Hub"),
    "convert": ("amltrain.commands.convert", "turn an official checkpoint into a model folder"),
    "benchmark": ("benchmarks.command", "measure the cost of a training method"),
    "methods": ("amltrain.commands.methods", "list the training methods and their options"),
    "augmentations": ("amltrain.commands.augmentations", "list the augmentations and their options"),
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
        print("\n".join(f"  {name:13} {text}" for name, (_, text) in COMMANDS.items()))
        return
    if sys.argv[1] == "--version":
        print(f"amltrain {__version__} (torch {version('torch')}, accelerate {version('accelerate')})")
        return
    with one_line_errors():
        name = sys.argv.pop(1)
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
    try:
        importlib.import_module(COMMANDS[name][0]).main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has enough, e.g. `amltrain models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
