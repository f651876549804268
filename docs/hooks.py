"""MkDocs hook: replace `<!-- table: NAME -->` by a table made from the code, so that no page repeats it."""

import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amltrain.config.fields import help_texts


def models() -> str:
    from amltrain.commands.list import model_table
    from amltrain.models import list_models

    return "\n".join(model_table(list_models()))


def configs() -> str:
    from amltrain.config.files import shipped_configs

    rows = ["| Name | What |", "| --- | --- |"]
    rows += [f"| `{name}` | {found.title} |" for name, found in shipped_configs().items()]
    return "\n".join(rows)


def config() -> str:
    """One table for the keys outside groups, then one per group."""
    from amltrain.config.parse import DERIVED
    from amltrain.config.schema import RunConfig

    default = RunConfig()
    default.output = None  # filled in from the other keys
    tables = [_table(_rows(default, "", skip=DERIVED))]
    for field in fields(RunConfig):
        group = getattr(default, field.name)
        if is_dataclass(group):
            text = inspect.getdoc(type(group)) or ""
            tables.append(f"## {field.name}\n\n{text.splitlines()[0]}\n\n{_table(_all_rows(group, field.name))}")
    return "\n\n".join(tables)


def methods() -> str:
    """Every training method: its summary and paper, then its options."""
    from amltrain.registry import METHODS

    parts = []
    for name in METHODS.names():
        info = METHODS[name].details
        paper = f" ({info.paper})" if info.paper else ""
        options = (
            _table(_rows(METHODS.options(name)(), f"{name}."))
            if fields(METHODS.options(name))
            else "It has no options."
        )
        parts.append(f"## `{name}`\n\n{info.summary[0].upper()}{info.summary[1:]}{paper}.\n\n{options}")
    return "\n\n".join(parts)


def augmentations() -> str:
    """Every augmentation: what it does, then its options."""
    from amltrain.registry import AUGMENTATIONS

    parts = []
    for name in AUGMENTATIONS.names():
        options = AUGMENTATIONS.options(name)()
        text = (inspect.getdoc(options) or "").splitlines()[0]
        parts.append(f"## `{name}`\n\n{text}\n\n{_table(_rows(options, f'{name}.'))}")
    return "\n\n".join(parts)


def zoo() -> str:
    """A slot for every recipe: what is published, and what docs/zoo.json has of ours."""
    from amltrain.config.files import shipped_configs

    ours = json.loads((Path(__file__).parent / "zoo.json").read_text(encoding="utf-8"))
    names = ("scores", "protocol", "memory", "hours", "card", "commit", "file")
    rows = ["| Recipe | Published | Ours | Protocol | GiB | Hours | Card | Commit | File |", "|---" * 9 + "|"]
    for name, config in shipped_configs().items():
        if not name.startswith("recipes/"):
            continue
        published = [line.removeprefix("Published").lstrip(":, ") for line in config.comment if "Published" in line]
        entry = ours.get(name, {})
        cells = [str(entry.get(key, "not run" if key == "scores" else "")) for key in names]
        rows.append(f"| `{name.removeprefix('recipes/')}` | {' '.join(published)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _table(rows: list[str]) -> str:
    return "\n".join(["| Key | Default | Meaning |", "| --- | --- | --- |", *rows])


def _all_rows(group: Any, name: str) -> list[str]:
    """The rows of a group and of the groups in it."""
    rows = _rows(group, f"{name}.")
    for field in fields(group):
        if is_dataclass(getattr(group, field.name)):
            rows += _all_rows(getattr(group, field.name), f"{name}.{field.name}")
    return rows


def _rows(values: Any, prefix: str, skip: Sequence[str] = ()) -> list[str]:
    """Key, default as YAML, help text, of every field that is not a group."""
    texts, rows = help_texts(type(values)), []
    for field in fields(values):
        value = getattr(values, field.name)
        if not is_dataclass(value) and field.name not in skip:
            text = texts.get(field.name, "").replace("|", "\\|")
            rows.append(f"| `{prefix}{field.name}` | `{_yaml(value)}` | {text} |")
    return rows


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page; one without sections has no table of contents, and its tables get that space."""
    tables = {f.__name__: f for f in (models, configs, config, methods, augmentations, zoo)}
    text = re.sub(r"<!-- table: (\w+) -->", lambda match: tables[match[1]](), markdown)
    if not re.search(r"^(##|:::) ", text, re.MULTILINE):
        page.meta.setdefault("hide", []).append("toc")
    return text


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page: links of a notebook to pages, which MkDocs leaves as files, e.g. `../aml.md`."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="\.\./([\w-]+)\.md(#[\w-]+)?"', lambda m: f'href="../../{m[1]}/{m[2] or ""}"', html)
