"""Sections of a run that other rooms define: options of training methods and of augmentations, one section per name.

`config` is the lowest layer and imports neither; whoever reads a run hands over where their options are found.
"""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from amltrain.errors import UserError


class NoGroups:
    """Placeholder for a section whose values are not groups."""


def _no_options(name: str) -> type:
    raise KeyError(name)


class Sections(NamedTuple):
    """One kind of section.

    kind      "method" or "augmentation", for messages
    names     all section names of the kind
    options   the options' dataclass of one name; imported on first use
    """

    kind: str = ""
    names: Collection[str] = ()
    options: Callable[[str], type] = _no_options


def refuse_unused(flags: Iterable[str], used: Collection[str], sections: Sections) -> None:
    """Raise UserError for a command-line option of a section that the run does not use.

    flags: keys on the command line, without dashes, e.g. "aml.tau". Config files may hold such sections, because a file
    can be layered under another method.
    """
    for key in flags:
        name, _, option = key.partition(".")
        if option and name in sections.names and name not in used:
            uses = f"this run uses {', '.join(used)}" if used else "this run uses none"
            raise UserError(
                f"--{key} is an option of {sections.kind} {name}, and {uses}; leave it out or choose {name}"
            )


def find_option(key: str, sections: Iterable[Sections]) -> list[str]:
    """Full keys, e.g. "aml.tau", of options called `key` in any section, for messages about unknown keys."""
    found = []
    for kind in sections:
        for name in kind.names:
            if key in getattr(kind.options(name), "__dataclass_fields__", {}):
                found.append(f"{name}.{key}")
    return found
