"""Texts of strangers in tables, on terminals and in LaTeX: shown, never obeyed."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from amltrain import cli
from amltrain.errors import PlainStream, plain
from amltrain.evaluation.results import Results, named_protocol
from amltrain.evaluation.tables import csv_table, csv_text, latex_table, table

FORMULAS = [
    "=1+1",
    '=HYPERLINK("http://x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "=cmd|'/C'!A1",
    "|x",
    "%x",
    "\x00=1",
]
LATEX = [
    r"\input{/etc/passwd}",
    "\\write18{id}",
    "a\n\\end{tabular}",
    "a\n\n\\input x",
    "%x\n\\bye",
    "$x$",
    "a & b",
    "a_b^c~d#e",
    "[3pt] x",
    "*",
    "{",
    "}",
    "\x0c\\input x",
    "a\u2028\\input x",
]
ESCAPES = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]52;c;YQ==\x07",
    "\x9b2J",
    "a\rb",
    "a\x08b",
    "\x07",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\x1b[A\x1b[2K",
    "\x7f",
    "\x85x",
    "\ud800",
]


def result(**names: str) -> Results:
    protocol = {**vars(named_protocol("cris")), "size": [32, 32], "metrics": "classic"}
    given = Results("scenes", "val", {"oIoU": 1.0}, {"samples": 2}, protocol, {"checkpoint": "run"})
    if "checkpoint" in names:
        return replace(given, provenance={"checkpoint": names["checkpoint"]})
    return replace(given, **names)


def texts(hostile: str) -> list[list[Results]]:
    named = [result(dataset=hostile), result(split=hostile), result(checkpoint=hostile)]
    named.append(replace(named[0], protocol={**named[0].protocol, "interpolation": hostile, "sentences": hostile}))
    return [[one, result(checkpoint="other")] for one in named]


@pytest.mark.parametrize("hostile", [*FORMULAS, *LATEX, *ESCAPES])
def test_a_spreadsheet_computes_nothing(hostile: str) -> None:
    for rows in texts(hostile):
        read = list(csv.reader(io.StringIO(csv_table(rows))))
        assert len(read) == 3 and len({len(row) for row in read}) == 1
        for cell in (cell for row in read for cell in row):
            assert not cell.lstrip()[:1] or cell.lstrip()[0] not in "=+-@|%", cell
            assert "\n" not in cell and "\x1b" not in cell


def test_numbers_of_a_table_stay_numbers() -> None:
    rows = [[-1.5, "-1.5", "+2", "1e-3", "-inf", "nan", 7, "-", "a=b"]]
    assert csv_text(rows) == "-1.5,-1.5,+2,1e-3,-inf,nan,7,'-,a=b\n"


@pytest.mark.parametrize("hostile", [*FORMULAS, *LATEX, *ESCAPES])
def test_latex_obeys_nothing(hostile: str) -> None:
    for rows in texts(hostile):
        text = latex_table(rows)
        ours = (
            r"begin\{tabular|end\{tabular|toprule|midrule|bottomrule|textbf\{|textbackslash |textascii\w+ |pm|[&%$#_{}]"
        )
        body = [line for line in text.splitlines() if line and not line.startswith("%")]
        assert not re.findall(rf"(?<!\\)\\(?!\\|{ours})\w+", "\n".join(body)), text
        assert len(body) == 8 and all(line.isprintable() for line in body)


@pytest.mark.parametrize("hostile", [*FORMULAS, *LATEX, *ESCAPES])
def test_a_table_in_markdown_keeps_its_rows(hostile: str) -> None:
    for rows in texts(hostile):
        lines = [line for line in table(rows).splitlines() if line.startswith("|")]
        assert len(lines) == 4
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert all(line.isprintable() for line in table(rows).splitlines())


@pytest.mark.parametrize("hostile", ESCAPES)
def test_a_terminal_obeys_nothing(hostile: str) -> None:
    assert plain(f"a{hostile}b").isprintable()
    said = io.StringIO()
    PlainStream(said).write(f"file {hostile} of 3\n")
    assert not re.search(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", said.getvalue()
    )
    PlainStream(said).write("\n\x1b[A\r")
    assert said.getvalue().endswith("\n\x1b[A\r")  # a progress bar


@pytest.mark.parametrize("hostile", [text for text in ESCAPES if text.isascii()])
def test_a_hostile_name_on_every_command_line(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = str(tmp_path / f"x{hostile}")
    for arguments in (
        ["predict", "--checkpoint", name, "--image", "x.png", "--sentence", "x"],
        ["evaluate", "--checkpoint", name],
        ["report", name],
        ["push", name, "a/b"],
        ["compare", f"a={name}", f"b={name}"],
        ["data", "presize", "--prepared", name, "--dataset", "x"],
        ["train", "--config", name],
        [f"x{hostile}"],
    ):
        monkeypatch.setattr("sys.argv", ["amltrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == 2
        assert all(line.isprintable() for line in (out + err).replace("\t", " ").split("\n")), err
