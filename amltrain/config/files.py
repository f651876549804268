"""Find, check and layer the `--config` files of a command line.

A file may start from others: `base: [models/caris_swin_base, data/refcoco]`. A name is a path (relative to the working
folder, or in `base` to the file), or a config that ships with amltrain, without its folder and `.yaml`. Every layer
becomes one `--config` argument, lowest first, so the config library merges bases exactly as it merges several files.

A file may hold variants of itself, runs that change a few of its keys: with `variants: {aml: {method: aml}}` in
recipes/lavt/refcoco, `recipes/lavt/refcoco_aml` is that run, in the output folder of that name.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from amltrain.config.fields import check_flags, expand_arguments, field_types, plain_scalar
from amltrain.errors import UserError

Groups = Mapping[str, type]
"""Keys whose value is a group of keys, and the dataclass of each."""
TEXT = "tag:yaml.org,2002:str"
BASE, VARIANTS, OUTPUT = "base", "variants", "output"
MAX_VALUES = 10_000
"""Values of a config file, aliases written out."""
PACKAGE = Path(__file__).resolve().parents[1]


class Found(NamedTuple):
    """A config file, and the variant of it that a name means; None = the file itself."""

    path: Path
    variant: str | None = None

    @property
    def title(self) -> str:
        """The first line of the comment above the file's or the variant's keys."""
        return self.comment[0]

    @property
    def comment(self) -> list[str]:
        """The lines of that comment, without their marks."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        first = 0
        if self.variant is not None:
            first = lines.index(f"  {self.variant}:")
            while lines[first - 1].startswith("  #"):
                first -= 1
        after = (number for number in range(first, len(lines)) if not lines[number].lstrip().startswith("#"))
        return [line.lstrip("# ") for line in lines[first : next(after, len(lines))]] or [""]


class Layers(NamedTuple):
    """A command line whose config files are read."""

    arguments: list[str]
    """The arguments, with the text of one layer after every --config."""
    places: dict[str, str]
    """The file and line that sets each key: {"optim.lr": "run.yaml, line 3"}; the last one where several do."""

    values: dict[str, Any]
    """The top-level keys of all layers; a later layer's value replaces an earlier one's."""

    def place(self, message: str) -> str:
        """Return "FILE, line N: " for the first key in an error message that a config file sets, else ""."""
        flags = {argument[2:].split("=")[0] for argument in self.arguments if argument.startswith("--")}
        for word in re.findall(r"[\w.+-]+", message.split("; did you mean")[0]):  # a suggested key is not the cause
            key = word.rstrip(".")
            if key in self.places and key not in flags:
                return f"{self.places[key]}: "
        return ""


def groups_of(kind: type) -> Groups:
    """The groups of a dataclass: its fields that are dataclasses; none for another type."""
    if not is_dataclass(kind):
        return {}
    return {f.name: f.type for f in fields(kind) if isinstance(f.type, type) and is_dataclass(f.type)}


def config_folder() -> Path:
    """Return the folder of shipped configs: inside an installed package, next to it in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def shipped_configs() -> dict[str, Found]:
    """Every shipped config by name, variants after their file: `quickstart`, `recipes/paper/refcoco_aml`, ..."""
    folder = config_folder()
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        found[name] = Found(path)
        found |= {f"{name}_{variant}": Found(path, variant) for variant in variants_of(path)}
    return found


def variants_of(path: Path) -> list[str]:
    """The names of a file's variants; none for a file that is no YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.compose(text, Loader=yaml.SafeLoader) if f"\n{VARIANTS}:" in f"\n{text}" else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []  # whoever reads the file says what is wrong with it
    entries = content.value if isinstance(content, yaml.MappingNode) else []
    groups = [value for key, value in entries if key.value == VARIANTS and isinstance(value, yaml.MappingNode)]
    return [str(own.value) for group in groups for own, _ in group.value]


def find_config(name: str, asked_by: str, folder: Path = Path()) -> Found:
    """Find a config by its path or its shipped name, or a variant by its file's and its own: FILE_VARIANT.

    Args:
        name: a path, relative to `folder`, or a shipped name, with or without `.yaml`. An existing path wins over
            shipped names; a file and a variant of one name are told apart by `.yaml`.
        asked_by: the flag, or file, line and key, for the message.

    Raises:
        UserError: nothing has this name, and the message lists close matches; or a file and a variant have it.
    """
    path = folder / Path(name).expanduser()
    if not path.name:
        raise UserError(f"{asked_by}: {name!r} names no file; `amltrain list configs` lists the shipped names")
    wanted = path.name.removesuffix(".yaml")
    siblings = (Found(file, wanted[len(file.stem) + 1 :]) for file in sorted(path.parent.glob("*.yaml")))
    variant = next(
        (f for f in siblings if wanted == f"{f.path.stem}_{f.variant}" and f.variant in variants_of(f.path)), None
    )
    for candidate in (path, path.with_name(f"{path.name}.yaml")):
        if candidate.exists() and not candidate.is_dir():
            if variant is not None and candidate != path:
                raise UserError(
                    f"{asked_by}: {name} is the file {candidate} and the variant {variant.variant} of {variant.path}; "
                    f"write {name}.yaml for the file, or rename it"
                )
            return Found(candidate)
    if variant is not None:
        return variant
    shipped = shipped_configs()
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if wanted in shipped:
        return shipped[wanted]
    same_end = [known for known in shipped if known.endswith(f"/{wanted}")]
    near = [f"{file.stem}_{own}" for file in sorted(path.parent.glob("*.yaml")) for own in variants_of(file)]
    beside = difflib.get_close_matches(path.name.removesuffix(".yaml"), near, n=3, cutoff=0.7)
    close = same_end or [str(Path(name).with_name(own)) for own in beside]
    close = close or difflib.get_close_matches(wanted, shipped, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "`amltrain list configs` lists the shipped names"
    raise UserError(f"{asked_by}: no file or shipped config is named {name}; {hint}")


def read_config_files(arguments: Sequence[str], groups: Groups, kinds: Mapping[str, Any] | None = None) -> Layers:
    """Replace every `--config NAME` by one `--config TEXT` for each of its layers. kinds: of the keys in no group.

    Raises:
        UserError: a file is missing, not a YAML mapping, sets a key twice, or is its own base.
    """
    replaced: list[str] = []
    places: dict[str, str] = {}
    values: dict[str, Any] = {}
    arguments = expand_arguments(arguments)
    check_flags(arguments, partial(_kind_of, groups=groups, kinds=kinds or {}))
    rest = iter(arguments)
    for argument in rest:
        name = next(rest, None) if argument == "--config" else None
        if argument.startswith("--config="):
            name = argument.removeprefix("--config=")
        if name is None or name == "-" or Path(name).is_fifo():  # a pipe can be read only once
            replaced += [argument] if name is None or argument != "--config" else [argument, name]
            continue
        for layer in _read(find_config(name, "--config"), groups, "--config", (), places):
            replaced += ["--config", layer]
            try:
                values |= yaml.safe_load(layer)
            except yaml.YAMLError as error:  # a tag that is not plain YAML, or a key that is not one value
                raise UserError(f"--config {name} is not plain YAML: {' '.join(str(error).split())}") from error
    return Layers(replaced, places, values)


def _kind_of(key: str, groups: Groups, kinds: Mapping[str, Any]) -> Any:
    """The type of a dotted key; None where it is not known."""
    first, *rest = key.split(".")
    kind = groups.get(first) if rest else kinds.get(first)
    for part in rest:
        kind = field_types(kind).get(part)
    return kind


def _read(found: Found, groups: Groups, asked_by: str, above: tuple[Path, ...], places: dict[str, str]) -> list[str]:
    """The texts of a file's layers, lowest first. above: the files whose base this is, outermost first."""
    path = found.path
    if path.resolve() in above:
        names = " -> ".join(file.name for file in (*above[above.index(path.resolve()) :], path))
        raise UserError(f"{asked_by}: these files are each other's base: {names}; remove one `{BASE}`")
    content = _compose(path, asked_by)
    layers: list[str] = []
    for key, value in content.value:
        if key.value == BASE:
            place = f"{path}, line {key.start_mark.line + 1}, {BASE}"
            for name in _names(value, place):
                base = find_config(name, place, path.parent)
                layers += _read(base, groups, place, (*above, path.resolve()), places)
    own = {str(key.value): value for key, value in content.value if key.value == VARIANTS}
    if own and not isinstance(own[VARIANTS], yaml.MappingNode):
        line = own[VARIANTS].start_mark.line + 1
        raise UserError(f"{path}, line {line}: {VARIANTS} should hold names with the keys that each changes")
    content.value = [(key, value) for key, value in content.value if key.value not in (BASE, VARIANTS)]
    chosen = [content]
    if found.variant is not None:
        own_output = [node.value for key, node in content.value if key.value == OUTPUT]
        chosen.append(_variant(own[VARIANTS], found, (own_output or [None])[0] or _output(layers)))
    for layer in chosen:
        _check_keys(layer, groups, path, "", places, {})
    return layers + [yaml.serialize(layer, Dumper=yaml.SafeDumper) for layer in chosen if layer.value]


def _variant(variants: yaml.Node, found: Found, output: str | None) -> yaml.MappingNode:
    """The keys that a variant changes. output: of its file; the variant's is that with its name, unless it sets one."""
    one, *more = [(key, value) for key, value in variants.value if key.value == found.variant]
    if more:
        first, second = (key.start_mark.line + 1 for key, _ in (one, more[0]))
        raise UserError(
            f"{found.path}, line {second}: variant {found.variant} is already there in line {first}; keep one of them"
        )
    value = one[1]
    if not isinstance(value, yaml.MappingNode):
        line = value.start_mark.line + 1
        raise UserError(f"{found.path}, line {line}: variant {found.variant} has no keys; give those that it changes")
    for key, _ in value.value:
        if key.value in (BASE, VARIANTS):
            line = key.start_mark.line + 1
            raise UserError(
                f"{found.path}, line {line}: variant {found.variant} cannot hold {key.value}; write a file of its own"
            )
    if output is not None and not any(key.value == OUTPUT for key, _ in value.value):
        folder = yaml.ScalarNode(TEXT, f"{output}_{found.variant}", value.start_mark)
        value.value = [(yaml.ScalarNode(TEXT, OUTPUT, value.start_mark), folder), *value.value]
    return value


def _output(layers: Sequence[str]) -> str | None:
    """The output that bases set, None if they set none."""
    found = [node.value for text in layers for key, node in yaml.compose(text).value if key.value == OUTPUT]
    return str(found[-1]) if found else None


def _names(value: yaml.Node, place: str) -> Iterable[str]:
    entries = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not entries or not all(isinstance(entry, yaml.ScalarNode) and entry.tag == TEXT for entry in entries):
        raise UserError(f"{place} should be a list of files, e.g. [models/caris_tiny, data/refcoco]")
    return [entry.value for entry in entries]


def _compose(path: Path, asked_by: str) -> yaml.MappingNode:
    """Parse a file to YAML nodes, which know their lines."""
    if not path.is_file():  # a device has no end, and a named pipe may never begin
        raise UserError(f"{asked_by}: {path} is not a regular file; give a YAML file")
    try:
        content = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        _check_size(content)
    except OSError as error:
        raise UserError(f"{asked_by}: could not read {path} ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{asked_by}: {path} is not text in UTF-8; give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except (RecursionError, _TooLargeError) as error:
        raise UserError(
            f"{asked_by}: {path} repeats or nests its values too often; a config has at most {MAX_VALUES:,} values"
        ) from error
    if content is None:
        raise UserError(f"{asked_by}: {path} is empty; give a file with keys and values, or leave it out")
    if not isinstance(content, yaml.MappingNode):
        raise UserError(f"{asked_by}: {path} has no keys; its lines should look like `seed: 0`")
    return content


class _TooLargeError(Exception):
    pass


def _check_size(content: yaml.Node | None) -> None:
    """Raise _TooLargeError for more than MAX_VALUES values, aliases written out; RecursionError for one in itself."""
    counted: dict[int, int] = {}

    def count(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise RecursionError
        if id(node) not in counted:
            below: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                below = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                below = node.value
            counted[id(node)] = 1 + sum(count(child, (*above, id(node))) for child in below)
        if counted[id(node)] > MAX_VALUES:
            raise _TooLargeError
        return counted[id(node)]

    if content is not None:
        count(content, ())


def _check_keys(
    mapping: yaml.MappingNode, groups: Groups, path: Path, prefix: str, places: dict[str, str], kinds: Mapping[str, Any]
) -> None:
    """Reject repeated keys, groups given as text and values that YAML reads otherwise; record where each key is set.

    prefix: `model.` kinds: the types of the mapping's keys, as far as they are known.
    """
    seen: dict[str, int] = {}
    for key, value in mapping.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path}, line {line}: {name} is already set in line {seen[name]}; keep one of them")
        seen[name] = line
        places[name] = f"{path}, line {line}"
        group = groups.get(str(key.value))
        for scalar in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(scalar, yaml.ScalarNode):
                plain_scalar(scalar, kinds.get(str(key.value)), f"{path}, line {line}: {name}")
        if isinstance(value, yaml.MappingNode):
            known = {*groups, *kinds}
            if not value.value and str(key.value) not in known and (kinds or not prefix):
                close = difflib.get_close_matches(str(key.value), known, n=1)
                hint = f"did you mean {prefix}{close[0]}?" if close else "see --help"
                raise UserError(f"{path}, line {line}: unknown key {name}; {hint}")
            below = groups_of(group) if group else {}
            _check_keys(value, below, path, f"{name}.", places, field_types(group))
        elif group:
            given = "a list" if isinstance(value, yaml.SequenceNode) else value.value or "empty"
            raise UserError(
                f"{path}, line {line}: {name} is a group of keys, not {given}; "
                f"to start from another file, write `{BASE}: [FILE]` at the top"
            )


def read_flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flags of a command line by key, without dashes; the last of a key wins, a flag without a value has ""."""
    flags: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        if argument.startswith("--") and len(argument) > 2:
            key, given, value = argument[2:].partition("=")
            following = arguments[number + 1] if number + 1 < len(arguments) else ""
            flags[key] = value if given else "" if following.startswith("--") else following
    return flags
