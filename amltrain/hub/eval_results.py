"""The Hub's `.eval_results/*.yaml`: scores that a benchmark data set collects on its leaderboard.

The format is that of https://huggingface.co/docs/hub/eval-results, written by huggingface_hub. It needs a data set on
the Hub that is registered as a benchmark; no RefCOCO data set was, as far as known here. Task ids are ours:
`DATASET_SPLIT_METRIC`, to be changed to those of the benchmark's eval.yaml.
"""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import yaml

from amltrain.errors import UserError
from amltrain.evaluation.results import Results, write_text
from amltrain.evaluation.tables import describe

FOLDER = ".eval_results"


def eval_results_yaml(results: Sequence[Results], benchmark: str, main_metrics: Sequence[str] = ()) -> str:
    """The YAML of all rows that are scores; perturbed, shuffled and partial rows are left out.

    benchmark: Hub id of the data set. main_metrics: names to write; empty = the two IoUs of each row.
    """
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as error:
        raise UserError(
            "the installed huggingface_hub cannot write .eval_results; upgrade it to 1.3 or later"
        ) from error
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    entries = []
    for result in results:
        if not result.is_score:
            continue
        names = [n for n in result.metrics if n in (main_metrics or ("oIoU", "mIoU", "cIoU", "gIoU"))]
        for name in names:
            task = f"{result.dataset}_{result.split}_{name}"
            value, notes = round(result.metrics[name], 2), describe(result)
            entries.append(EvalResultEntry(dataset_id=benchmark, task_id=task, value=value, date=date, notes=notes))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=1000)


def write_eval_results(folder: Path, benchmark: str, results: Sequence[Results]) -> Path:
    """Write `.eval_results/amltrain.yaml` in a folder and return its path."""
    path = folder / FOLDER / "amltrain.yaml"
    write_text(path, eval_results_yaml(results, benchmark))
    return path
