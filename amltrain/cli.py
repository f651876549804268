"""`amltrain COMMAND …`: the same functions as the scripts in launch/."""

import importlib
import sys

from amltrain.errors import one_line_errors, unknown_name

COMMANDS = {
    "train": ("amltrain.commands.train", "train a model, or go on with a run"),
    "evaluate": ("amltrain.commands.evaluate", "score a model on prepared splits"),
    "compare": ("amltrain.commands.compare", "compare models over seeds, with error bars"),
    "analyse": ("amltrain.commands.analyse", "robustness, occlusion, activation, histogram, dynamics, errors, ..."),
    "predict": ("amltrain.commands.predict", "segment what a sentence means in an image"),
    "report": ("amltrain.commands.report", "one HTML page about a run: curves, scores, predictions"),
    "demo": ("amltrain.commands.demo", "try one or two models in the browser"),
    "export": ("amltrain.commands.export", "write a model as torch.export and ONNX files"),
    "prepare": ("amltrain.commands.prepare", "own data or original files + images -> Parquet"),
    "presize": ("amltrain.commands.presize", "resize prepared images once, to load them faster"),
    "rank": ("amltrain.commands.rank", "rank images by a dual encoder, for the mosaic augmentation"),
    "download": ("amltrain.commands.download", "download RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and COCO's images"),
    "push-data": ("amltrain.commands.push_data", "publish prepared data on the HuggingFace Hub"),
    "push": ("amltrain.commands.push", "publish a model on the HuggingFace Hub"),
    "convert": ("amltrain.commands.convert", "an official checkpoint -> a model folder"),
    "benchmark": ("amltrain.commands.benchmark", "what AML costs, beside the baseline"),
    "augmentations": ("amltrain.commands.augmentations", "list the augmentations and their options"),
    "models": ("amltrain.commands.models", "list the registered models"),
}


def main() -> None:
    """Entry point of the `amltrain` program."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: amltrain COMMAND [options]; `amltrain COMMAND --help` explains one\n")
        print("\n".join(f"  {name:13} {text}" for name, (_, text) in COMMANDS.items()))
        return
    with one_line_errors():
        name = sys.argv.pop(1)
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
