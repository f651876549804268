"""Write a table as Markdown, LaTeX and JSON, and the status page of all tables that were made."""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from amltrain.environment import code_commit
from amltrain.errors import plain
from amltrain.evaluation.results import write_text
from amltrain.evaluation.tables import latex, markdown
from amltrain.paper.plan import PERCENT, Kind, Settings, Table
from amltrain.paper.values import row_values

NOT_COMPARABLE = "tiny, not comparable"
STATUS = "status.md"


def collect(table: Table, settings: Settings, command: str) -> dict[str, Any]:
    """The table as JSON values. command: the one that made it, for the files."""
    rows = []
    for row in table.rows:
        seeds = [row_values(table, row, seed, settings) for seed in settings.seeds]
        for measure, published in row.cells.items():
            values = [found[measure] for found in seeds if measure in found]
            rows.append(
                {
                    "row": row.label,
                    "measure": measure,
                    "kind": row.kind,
                    "recipe": row.run.recipe,
                    "published": published,
                    "ours": [v.value for v in values],
                    "protocol": values[0].protocol if values else None,
                    "comparable": settings.scale == "full",
                }
            )
    return {
        "table": table.name,
        "paper": table.paper,
        "what": table.what,
        "scale": settings.scale,
        "steps": settings.steps if settings.scale == "tiny" else None,
        "seeds": list(settings.seeds),
        "command": command,
        "date": date.today().isoformat(),
        "commit": code_commit(),
        "rows": rows,
        "notes": list(table.notes),
    }


def write_table(table: Table, settings: Settings, command: str) -> str:
    """Write NAME.md, NAME.tex and NAME.json into the scale's folder, and the status page; return the Markdown."""
    content = collect(table, settings, command)
    folder = settings.folder / "tables"
    text = markdown_page(content)
    write_text(folder / f"{table.name}.md", text)
    write_text(folder / f"{table.name}.tex", latex_table(content))
    write_text(folder / f"{table.name}.json", json.dumps(content, indent=2) + "\n")
    write_text(settings.root / STATUS, status_page(settings.root))
    return text


def markdown_page(content: dict[str, Any]) -> str:
    """The table with a heading, its protocols and its notes."""
    header, rows, protocols = _grid(content)
    lines = [f"# {content['paper']}: {content['what']}", "", _scale_line(content), ""]
    lines += [*markdown([header, *rows]), ""]
    lines += [f"[{number}] {protocol}." for protocol, number in protocols.items()]
    lines += ["", *content["notes"], "", f"    {content['command']}", ""]
    return "\n".join(lines)


def latex_table(content: dict[str, Any]) -> str:
    """The table as a booktabs tabular; protocols and notes are comments below it."""
    header, rows, protocols = _grid(content)
    comments = [_scale_line(content), *(f"[{n}] {text}." for text, n in protocols.items()), *content["notes"]]
    return "\n".join([latex(header, rows), *(f"% {plain(line)}" for line in comments)]) + "\n"


def status_page(root: Path) -> str:
    """Which tables were made at which scale, when, with which command."""
    rows = []
    for path in sorted(root.glob("*/tables/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found = sum(bool(row["ours"]) for row in content["rows"])
        scale = f"tiny, {content['steps']} steps" if content["scale"] == "tiny" else "full"
        link = f"[{content['paper']}]({path.relative_to(root).with_suffix('.md').as_posix()})"
        done = f"{found} of {len(content['rows'])}"
        commit = (content["commit"] or "-")[:10]
        rows.append((link, content["what"], scale, done, content["date"], commit, f"`{content['command']}`"))
    lines = [
        "# Status of the paper's tables",
        "",
        "Tiny tables compare with nothing; they show that the commands work.",
    ]
    header = ("table", "what", "scale", "values", "date", "commit", "command")
    return "\n".join([*lines, "", *markdown([header, *rows], text_columns=len(header)), ""])


def _grid(content: dict[str, Any]) -> tuple[Sequence[str], list[Sequence[str]], dict[str, int]]:
    """Header, rows, and the number of each protocol."""
    protocols: dict[str, int] = {}
    rows: list[Sequence[str]] = []
    for row in content["rows"]:
        note = "not run"
        if row["protocol"]:
            number = protocols.setdefault(row["protocol"], len(protocols) + 1)
            note = f"[{number}]" if row["comparable"] else f"{NOT_COMPARABLE} [{number}]"
        kind = row["kind"]
        rows.append((row["row"], row["measure"], _shown([row["published"]], kind), _shown(row["ours"], kind), note))
    return ("row", "measure", "published", "ours", "protocol"), rows, protocols


def _shown(values: Sequence[float | None], kind: Kind) -> str:
    """A value, or mean ± standard deviation (number of seeds); "-" for nothing."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    digits = 2 if kind in PERCENT or max(map(abs, numbers)) > 10 else 4
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{fmean(numbers):.{digits}f} ± {stdev(numbers):.{digits}f} ({len(numbers)})"


def _scale_line(content: dict[str, Any]) -> str:
    seeds = f"seeds {', '.join(map(str, content['seeds']))}"
    if content["scale"] == "tiny":
        return (
            f"Tiny scale: small models, {content['steps']} steps on synthetic scenes that stand in for the data sets, "
            f"{seeds}. No value compares with a published one."
        )
    return f"Full scale: the recipes as they are, {seeds}."
