"""Shell completion by argcomplete. Turn it on in bash or zsh with: eval "$(register-python-argcomplete amltrain)"."""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from amltrain.config.files import shipped_configs


def complete(commands: Mapping[str, tuple[str, str]]) -> None:
    """Answer the shell: command names, then the flags of a command, and shipped names after --config. Ends the program.

    commands: name -> (module, text). argcomplete passes the typed line in COMP_LINE.
    """
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    started = len(words) > 2 or os.environ.get("COMP_LINE", "").endswith(" ")
    if started and len(words) > 1 and words[1] in commands:
        os.environ["_ARGCOMPLETE"] = "2"  # the program's arguments start at the second word
        parser = importlib.import_module(commands[words[1]][0]).build_parser()
        if type(parser) is not argparse.ArgumentParser:
            parser = plain_parser(parser)
    else:
        parser = argparse.ArgumentParser(prog="amltrain")
        parser.add_argument("command", choices=sorted(commands))
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
        flag: Any = plain.add_argument(*action.option_strings, dest=action.dest, choices=choices)
        if "--config" in action.option_strings:
            flag.completer = lambda **_: [name for name in shipped_configs() if not name.startswith("accelerate/")]
    return plain
