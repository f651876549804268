"""Tables of scores: Markdown, LaTeX (booktabs) and CSV, in percent with two decimals as in the papers."""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from amltrain.errors import plain
from amltrain.evaluation.results import Results, moved_models, write_text

Row = Sequence[str]


def table(results: Sequence[Results]) -> str:
    """The scores as Markdown that also reads as plain text: one table per kind of metric, then protocols and warnings.

    One row per split; a split scored under several perturbations gets a row with their mean.
    """
    lines: list[str] = []
    for names, group in _groups(results).items():
        lines += [*markdown([("dataset", "split", "samples", *names), *_rows(group, names)]), ""]
    lines += dict.fromkeys(f"Scored {describe(r)}." for r in results)
    lines += [plain(f"{r.dataset} {split_label(r)}: {warning}") for r in results for warning in _warnings(r)]
    lines += moved_models(results)
    return "\n".join(lines)


_ONE_TABLE = {
    "mean IoU": ("mIoU", "gIoU"),
    "cumulative IoU": ("oIoU", "cIoU"),
    **{
        name: (name,)
        for name in (
            "Pr@0.7",
            "Pr@0.9",
            "N-acc",
            "T-acc",
            "zero-target accuracy",
            "Acc@0.5",
            "Acc@0.75",
            "Acc@0.9",
            "DetAcc@0.5",
        )
    },
}
"""Columns of the table of a suite, and the metrics that each may show."""


def suite_table(results: Sequence[Results]) -> str:
    """Scores of different kinds in one table as Markdown: the same form of a metric shares a column, `-` = has none."""
    cells = [
        [next((r.metrics[name] for name in names if name in r.metrics), None) for names in _ONE_TABLE.values()]
        for r in results
    ]
    used = [i for i in range(len(_ONE_TABLE)) if any(row[i] is not None for row in cells)]
    header = ("dataset", "split", "samples", *(list(_ONE_TABLE)[i] for i in used))
    rows = [
        (r.dataset, split_label(r), str(r.counts["samples"]), *(cell(row[i]) for i in used))
        for r, row in zip(results, cells, strict=True)
    ]
    return "\n".join(markdown([header, *rows]))


def latex_table(results: Sequence[Results]) -> str:
    r"""The scores as LaTeX for `\usepackage{booktabs}`, one tabular per kind of metric.

    Where several models were scored on one split in one way, the best value of each column is bold among them.
    """
    several = len({_model(r) for r in results}) > 1
    tabulars = []
    for names, group in _groups(results).items():
        header = (*(["Model"] if several else []), "Data set", "Split", *names)
        rows = [(*([_model(r)] if several else []), r.dataset, split_label(r), *_cells(r, names)) for r in group]
        bold = _best(group, names, first=len(header) - len(names))
        tabulars.append(latex(header, rows, bold, text_columns=len(header) - len(names)))
    protocols = dict.fromkeys(f"% Scored {describe(r)}." for r in results)
    return "\n\n".join([*tabulars, "\n".join(protocols)]) + "\n"


def csv_table(results: Sequence[Results]) -> str:
    """The scores as CSV: one row per result, empty cells for metrics of the other kind; full precision."""
    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    rows: list[Sequence[object]] = [("model", "dataset", "split", "alteration", "samples", *names, "protocol")]
    for r in results:
        values = [r.metrics.get(name, math.nan) for name in names]
        cells = ["" if math.isnan(v) else f"{v:.4f}" for v in values]
        rows.append((_model(r), r.dataset, r.split, r.alteration, r.counts["samples"], *cells, describe(r)))
    return csv_text(rows)


def write_tables(folder: Path, results: Sequence[Results]) -> None:
    """Write results.md, results.tex and results.csv."""
    write_text(folder / "results.md", table(results) + "\n")
    write_text(folder / "results.tex", latex_table(results))
    write_text(folder / "results.csv", csv_table(results))


def markdown(rows: Sequence[Row], text_columns: int = 2) -> list[str]:
    """Lines of a Markdown table whose first row is the header; the first columns are left-aligned."""
    rows = [[plain(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(2, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]  # a rule of ":" alone is no table
    pad = [str.ljust] * text_columns + [str.rjust] * (len(widths) - text_columns)
    lines = ["| " + " | ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True)) + " |" for row in rows]
    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


def latex(header: Row, rows: Sequence[Row], bold: Sequence[tuple[int, int]] = (), text_columns: int = 2) -> str:
    """A LaTeX tabular with booktabs rules; text is escaped. bold: (row, column) of the cells to print in bold."""
    marked = set(bold)
    columns = "l" * text_columns + "r" * (len(header) - text_columns)
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", " & ".join(map(_escape, header)) + r" \\", "\\midrule"]
    for i, row in enumerate(rows):
        cells = [_escape(cell) for cell in row]
        cells = [f"\\textbf{{{cell}}}" if (i, j) in marked else cell for j, cell in enumerate(cells)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def csv_cell(value: object) -> object:
    """Return a cell that a spreadsheet does not compute: text that starts a formula gets a quotation mark before it."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    start = text.lstrip()[:1]
    is_number = bool(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", text))
    return f"'{text}" if start and start in "=+-@|%" and not is_number else text


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, every text harmless."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _escape(text: str) -> str:
    text = plain(text)
    for character in "\\&%$#_{}":
        text = text.replace(character, r"\textbackslash " if character == "\\" else f"\\{character}")
    signs = {"±": r"$\pm$", "\N{MINUS SIGN}": "$-$", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
    for character, command in signs.items():
        text = text.replace(character, command)
    return f"{{}}{text}" if text.startswith(("[", "*")) else text  # after a row's end they would be its options


def cell(value: float | None) -> str:
    """A percentage with two decimals; `-` for NaN or nothing."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def describe(result: Results) -> str:
    """The protocol in one phrase: "at the original size, probability > 0.35 (bicubic), all sentences, ..."."""
    p = result.protocol
    frame = "the original size" if p["frame"] == "original" else f"{p['size'][0]} x {p['size'][1]}"
    ties = "IoU >= t" if p["ties"] == "ge" else "I / (U + 1e-6) > t"
    decision = f"probability > {p['threshold']} ({p['interpolation']})" if p.get("threshold") else "masks from files"
    text = f"at {frame}, {decision}, {p['sentences']} sentences, Pr@t: {ties}"
    if p.get("mask_parts") == "exclusive":
        text += ", pixels of two polygons of one object are background"
    if p.get("answers"):
        by = "given by the ground truth" if p["answers"] == "given" else "written by the model"
        text += f", answers {by}"
    if p.get("boxes"):
        text += f", DetAcc: every sample counts 1, in the original image, true boxes {p['boxes']}"
    if p["metrics"] == "generalized":
        text += f", no target by {p['no_target_by']}"
    return plain(text)


def _groups(results: Sequence[Results]) -> dict[tuple[str, ...], list[Results]]:
    groups: dict[tuple[str, ...], list[Results]] = {}
    for result in results:
        groups.setdefault(tuple(result.metrics), []).append(result)
    return groups


def _cells(result: Results, names: Sequence[str]) -> list[str]:
    return [cell(result.metrics[name]) for name in names]


def _rows(group: Sequence[Results], names: Sequence[str]) -> list[Row]:
    rows: list[Row] = [(r.dataset, split_label(r), str(r.counts["samples"]), *_cells(r, names)) for r in group]
    return rows + _means(group, names)


def split_label(result: Results) -> str:
    """Return the split's name with its alterations, e.g. `val (haze 1)`."""
    return f"{result.split} ({result.alteration})" if result.alteration else result.split


def _model(result: Results) -> str:
    source = result.provenance
    return str(source.get("checkpoint") or source.get("predictions") or source.get("model") or "-")


def _means(group: Sequence[Results], names: Sequence[str]) -> list[Row]:
    """A row for every split that was scored under several perturbations: the plain mean of their scores."""
    splits: dict[tuple[str, str, str], list[Results]] = {}
    for result in group:
        if result.provenance.get("perturbation"):
            splits.setdefault((_model(result), result.dataset, result.split), []).append(result)
    return [
        (name, f"{split} (mean of {len(rs)})", "", *(cell(sum(r.metrics[n] for r in rs) / len(rs)) for n in names))
        for (_, name, split), rs in splits.items()
        if len(rs) > 1
    ]


def _best(group: Sequence[Results], names: Sequence[str], first: int) -> list[tuple[int, int]]:
    """(row, column) of the best values among rows that differ in the model alone."""
    comparable: dict[tuple[str, str, str], list[int]] = {}
    for row, result in enumerate(group):
        comparable.setdefault((result.dataset, split_label(result), describe(result)), []).append(row)
    bold = []
    for rows in comparable.values():
        for column, name in enumerate(names):
            values = [round(group[row].metrics[name], 2) for row in rows]
            if len(rows) > 1:
                bold += [(row, first + column) for row, v in zip(rows, values, strict=True) if v == max(values)]
    return bold


def _warnings(result: Results) -> Iterator[str]:
    count, source = result.counts, result.provenance
    if count.get("empty_masks") == count["samples"]:
        yield "every predicted mask is empty; the model found nothing, or the threshold is too high."
    if count.get("empty_unions"):
        yield f"{count['empty_unions']} samples with an empty union count as IoU 0."
    if count.get("not_finite"):
        yield f"the logits of {count['not_finite']} samples are NaN or infinite!"
    trained_on = source.get("trained_on") or []
    if result.dataset in trained_on and result.split == source.get("train_split"):
        yield "the model was trained on this split."
    elif len(trained_on) > 1 and not source.get("leak_filter", True):
        yield f"trained on {', '.join(trained_on)} without the leak filter: images of this split may be among them."
