"""Shell completion by argcomplete. Turn it on in bash or zsh with: eval "$(register-python-argcomplete amltrain)"."""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping

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
        for action in parser._actions:
            if "--config" in action.option_strings:
                action.completer = lambda **_: [
                    name for name in shipped_configs() if not name.startswith("accelerate/")
                ]
    else:
        parser = argparse.ArgumentParser(prog="amltrain")
        parser.add_argument("command", choices=sorted(commands))
        parser.add_argument("--version", action="store_true")
    argcomplete.autocomplete(parser)
    sys.exit(0)
