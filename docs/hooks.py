"""MkDocs hook: replace `<!-- table: NAME -->` by a table made from the code, so that no page repeats it."""

import ast
import inspect
import itertools
import re
import sys
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def models() -> str:
    from amltrain.commands.models import table
    from amltrain.models import list_models

    return "\n".join(table(list_models()))


def configs() -> str:
    from amltrain.config.files import shipped_configs

    rows = ["| Name | What |", "| --- | --- |"]
    for name, path in shipped_configs().items():
        rows.append(f"| `{name}` | {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')} |")
    return "\n".join(rows)


def config() -> str:
    from amltrain.config.schema import RunConfig

    return "\n".join(["| Key | Default | Meaning |", "| --- | --- | --- |", *_rows(RunConfig, "")])


def _rows(kind: type, prefix: str) -> list[str]:
    texts = _docstrings(kind)
    default: Any = kind()
    rows = []
    for field in fields(kind):
        value = getattr(default, field.name)
        if is_dataclass(value):
            rows += _rows(type(value), f"{prefix}{field.name}.")
        else:
            text = " ".join(texts.get(field.name, "").split()).replace("|", "\\|")
            rows.append(f"| `{prefix}{field.name}` | `{value}` | {text} |")
    return rows


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    tables = {"models": models, "configs": configs, "config": config}
    return re.sub(r"<!-- table: (\w+) -->", lambda match: tables[match[1]](), markdown)
