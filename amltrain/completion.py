"""Shell completion by argcomplete. Turn it on in bash or zsh with: eval "$(register-python-argcomplete amltrain)"."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amltrain.config.files import shipped_configs
from amltrain.registry import METHODS, MODELS


def _checkpoints(**_: Any) -> list[str]:
    """Runs below runs/, and their checkpoints."""
    runs = [path.parent for path in Path("runs").glob("*/config.yaml")]
    return [str(path) for run in runs for path in (run, *sorted(run.glob("step-*")), run / "best", run / "last")]


VALUES: dict[str, Callable[..., list[str]]] = {
    "--config": lambda **_: [name for name in shipped_configs() if not name.startswith("accelerate/")],
    "--model.name": lambda **_: MODELS.names(),
    "--method": lambda **_: METHODS.names(),
    "--checkpoint": _checkpoints,
    "--resume": _checkpoints,
}
"""What the shell offers after these flags."""


def complete(commands: Mapping[str, tuple[str, str]]) -> None:
    """Answer the shell: command names, then the flags of a command, and shipped names after --config. Ends the program.

    commands: name -> (module, text). argcomplete passes the typed line in COMP_LINE.
    """
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    done = words[1:] if os.environ.get("COMP_LINE", "").endswith(" ") else words[1:-1]  # words that are complete
    command = next((" ".join(done[:n]) for n in (2, 1) if " ".join(done[:n]) in commands and len(done) >= n), None)
    group = [name.split()[1] for name in commands if " " in name and done[:1] == name.split()[:1]]
    if command is not None:
        os.environ["_ARGCOMPLETE"] = str(1 + len(command.split()))  # the word at which the program's arguments start
        parser: Any = importlib.import_module(commands[command][0]).build_parser()
        if type(parser) is not argparse.ArgumentParser:
            parser = plain_parser(parser)
        for action in parser._actions:
            for option in set(action.option_strings) & VALUES.keys():
                action.completer = VALUES[option]
    else:
        if group:
            os.environ["_ARGCOMPLETE"] = "2"
        parser = argparse.ArgumentParser(prog="amltrain")
        parser.add_argument("command", choices=group or sorted({name.split()[0] for name in commands}))
        parser.add_argument("--version", action="store_true")
    argcomplete.autocomplete(parser)
    sys.exit(0)


def plain_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of a jsonargparse parser, and their choices, for argcomplete, which cannot ask such a parser itself."""
    plain = argparse.ArgumentParser(prog=parser.prog)
    for action in parser._actions:
        if not action.option_strings or "--help" in action.option_strings:
            continue
        shown = action.metavar if isinstance(action.metavar, str) else ""  # of a Literal: {a,b}
        choices = shown[1:-1].split(",") if shown.startswith("{") else action.choices
        plain.add_argument(*action.option_strings, dest=action.dest, choices=choices)
    return plain
