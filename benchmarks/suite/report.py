"""The suite's results as a Markdown section for BENCHMARKS.md."""

from collections.abc import Callable
from typing import Any

from benchmarks.suite.plan import BATCHES, ENGINES, EVALUATION, KINDS, LOADER, OTHERS, SAVING, STEPS, VARIANTS

Cases = dict[str, dict[str, Any]]
GIB = 2**30


def markdown(results: dict[str, Any]) -> str:
    """Return a heading with the machine's name, one table for each kind, and what failed."""
    lines = [_heading(results["machine"]), ""]
    for kind in KINDS:
        found = {name: case for name, case in results["cases"].items() if case["kind"] == kind}
        measured = {name: case["values"] for name, case in found.items() if "values" in case}
        if measured:
            lines += [f"### {kind.capitalize()}", "", *TABLES[kind](measured), ""]
        failed = [f"{name} ({case['error']})" for name, case in found.items() if "error" in case]
        if failed:
            lines += [f"Failed: {'; '.join(failed)}", ""]
    return "\n".join(lines)


def _heading(machine: dict[str, Any]) -> str:
    memory = f", {machine['memory'] / GIB:.0f} GiB" if "memory" in machine else ""
    cuda = f", CUDA {machine['cuda']}" if "cuda" in machine else ""
    return (
        f"## {machine['name']}\n\n{machine['name']}{memory}{cuda}; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['threads']} threads; torch {machine['torch']}, Python {machine['python']}. "
        f"`python launch/benchmark.py suite`"
    )


def _steps(cases: Cases) -> list[str]:
    return [
        "| model, precision | px | batch | step | ms | samples/s | x baseline | peak GiB | first step, s |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
        *(
            f"| {name} | {values['size']} | {values['batch']} | {row['step']} | {1000 * row['seconds']:.0f} "
            f"| {row['rate']:.4g} | {row['ratio']:.3f} | {_gib(row['memory'])} | {first} |"
            for name, values in cases.items()
            for row, first in _with_first(values)
        ),
    ]


def _with_first(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    firsts = [f"{values['first_step']:.1f}", *[""] * (len(values["rows"]) - 1)]
    return list(zip(values["rows"], firsts, strict=True))


def _variants(cases: Cases) -> list[str]:
    return [
        "| model | px | batch | forward and backward | ms | x the first | loss differs by |",
        "|---|--:|--:|---|--:|--:|--:|",
        *(
            f"| {name} | {v['size']} | {v['batch']} | {row['variant']} | {1000 * row['seconds']:.0f} "
            f"| {row['ratio']:.3f} | {row['difference']:.1e} |"
            for name, v in cases.items()
            for row in v["rows"]
        ),
    ]


def _engines(cases: Cases) -> list[str]:
    return [
        "| model, engine | Accelerate's name | batch | ms | samples/s | peak GiB |",
        "|---|---|--:|--:|--:|--:|",
        *(
            f"| {name} | {v['engine']} | {v['batch']} | {1000 * v['seconds']:.0f} | {v['rate']:.4g} "
            f"| {_gib(v['memory'])} |"
            for name, v in cases.items()
        ),
    ]


def _batches(cases: Cases) -> list[str]:
    return [
        "| model | batch | samples/s | peak GiB | ended by |",
        "|---|--:|--:|--:|---|",
        *(
            f"| {name} | {row['batch']} | {row['rate']:.4g} | {_gib(row['memory'])} "
            f"| {v['ended_by'] if row is v['rows'][-1] else ''} |"
            for name, v in cases.items()
            for row in v["rows"]
        ),
    ]


def _evaluation(cases: Cases) -> list[str]:
    lines = []
    for name, v in cases.items():
        if "note" in v:
            lines.append(f"| {name} | - | - | {v['note']} |")
        else:
            each, once = v["rates"]["sentence"], v["rates"]["image"]
            lines.append(f"| {name} | {each:.4g} | {once:.4g} | {once / each:.2f} with {v['sentences']} an image |")
    return ["| model | sentences/s, each encoded | image encoded once | ratio |", "|---|--:|--:|---|", *lines]


def _loader(cases: Cases) -> list[str]:
    return [
        "| decoder | loader processes | samples/s | px | file, kB |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {row['decoder']} | {row['workers']} | {row['rate']:.4g} | {v['size']} | {v['file_bytes'] / 1000:.0f} |"
            for v in cases.values()
            for row in v["rows"]
        ),
    ]


def _saving(cases: Cases) -> list[str]:
    return [
        "| model | GiB | write, s (training waits, foreground) | copy, s (training waits, background) | ratio "
        "| step, s | step during the write, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {name} | {_gib(v['bytes'])} | {v['write']:.2f} | {v['blocked']:.2f} | {v['ratio']:.3f} "
            f"| {v['step']:.3g} | {_seconds(v['step_while_writing'])} |"
            for name, v in cases.items()
        ),
    ]


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


TABLES: dict[str, Callable[[Cases], list[str]]] = {
    STEPS: _steps,
    VARIANTS: _variants,
    ENGINES: _engines,
    BATCHES: _batches,
    EVALUATION: _evaluation,
    LOADER: _loader,
    SAVING: _saving,
    OTHERS: _steps,
}
