"""The budgets of steps. `python -m tests.null_gpu.budgets` measures all of them and writes budgets.csv again."""

import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.null_gpu.device import NullGPU, missing

TABLE = Path(__file__).with_name("budgets.csv")
METHODS = ("supervised", "aml")
FULL_SIZE = ("caris_swin_base", "detris_base", "lavt_swin_base", "rela_r50")
"""Full-size models whose memory has a budget; they are built in a second or two."""
UPDATE = "if this is meant, run `python -m tests.null_gpu.budgets` and commit budgets.csv"
TOLERANCE = 1.1
"""How much of its budget a step may cost."""
UNITS = {"kernels": 20, "casts": 10, "float32": 0.01, "peak": 20}
"""What has a budget, and the smallest excess that counts: kernels, casts, share of FLOPs (0..1), MiB."""


def measure(null_gpu: NullGPU, folder: Path, kind: str, *names: str) -> dict[str, Any]:
    """What steps.py wrote."""
    output = folder / f"{kind}.json"
    null_gpu.run("-m", "tests.null_gpu.steps", output, kind, *names)
    return json.loads(output.read_text())


def read_budgets() -> dict[tuple[str, str], dict[str, float]]:
    """(model, method) -> what has a budget; memory of a tiny model has none, being that of cuBLAS."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {(row["model"], row["method"]): {key: float(row[key]) for key in UNITS if row[key]} for row in rows}


def excess(measured: dict[str, Any], budget: dict[str, float]) -> list[str]:
    """What costs more than its budget, in words."""
    return [
        f"{key} {measured[key]:g}, budget {allowed:g} ({measured[key] / max(allowed, 1e-9) - 1:+.0%})"
        for key, allowed in budget.items()
        if measured[key] > max(TOLERANCE * allowed, allowed + UNITS[key])
    ]


def write_budgets(tiny: dict[str, Any], full: dict[str, Any]) -> None:
    """Write the table of what was measured."""
    with TABLE.open("w", newline="") as file:
        file.write(f"# per step, bf16, batch 2; torch {tiny['torch']}; `python -m tests.null_gpu.budgets` writes it\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["model", "method", *UNITS])
        for kind in (tiny, full):
            for model, methods in kind["measured"].items():
                for method, result in methods.items():
                    values = [result[key] if kind is full or key != "peak" else "" for key in UNITS]
                    table.writerow([model, method, *values])


def main() -> None:
    """Measure and write; a step that fails has no budget."""
    if reason := missing():
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as name:
        null_gpu = NullGPU(Path(name))
        tiny = measure(null_gpu, Path(name), "tiny", *METHODS)
        full = measure(null_gpu, Path(name), "full", *FULL_SIZE)
    for kind in (tiny, full):
        for model, methods in kind["measured"].items():
            for method, result in methods.items():
                if result["error"]:
                    sys.exit(f"error: {model} {method}: {result['error']}")
    write_budgets(tiny, full)
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
