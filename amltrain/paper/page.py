"""The parts of docs/paper.md that follow from the definition: the list of tables, and the paper's conflicts.

python -m amltrain.paper.page docs/paper.md     # rewrite them
"""

import sys
from pathlib import Path

from amltrain.evaluation.tables import markdown
from amltrain.paper.plan import Table
from amltrain.paper.published import CONFLICTS
from amltrain.paper.tables import TABLES


def table_list() -> str:
    """The tables for `--list`: names, what they show, the number of trainings."""
    rows = [(" ".join(t.names), t.paper, t.what, str(len(t.runs()))) for t in TABLES]
    return "\n".join(markdown([("name", "paper", "what", "trainings"), *rows], text_columns=3))


def recipe_table() -> str:
    """The tables for docs/paper.md: one row each with its command, its recipes, and its status at full scale."""
    rows = [(t.paper, t.what, f"`amltrain paper reproduce {t.name}`", _recipes(t), "not run") for t in TABLES]
    header = ("Paper", "What", "Command", "Recipes", "At full scale")
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def conflict_list() -> str:
    """The paper's conflicts as a list."""
    return "\n".join(f"- {text}" for text in CONFLICTS)


def updated(page: str) -> str:
    """The page with the text between its markers `<!-- NAME -->` and `<!-- end of NAME -->` made again."""
    for name, text in (("tables", recipe_table()), ("conflicts", conflict_list())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}{text}\n{end}{rest.split(end)[1]}"
    return page


def _recipes(table: Table) -> str:
    """Recipes of one folder share its name: `paper/refcoco`, `refcoco_aml`."""
    shown, folder = [], ""
    for recipe in table.recipes():
        own, _, name = recipe.rpartition("/")
        shown.append(f"`{name if own == folder else recipe}`")
        folder = own
    return ", ".join(shown)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
