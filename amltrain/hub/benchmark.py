"""The Hub's files about benchmarks: `eval.yaml` of a data set repository, `.eval_results/` of a model repository.

    eval.yaml                      name, description, evaluation_framework, tasks: list of {id, config, split}
    .eval_results/TASK.yaml        list of {dataset: {id, task_id}, value, notes}

Forms: huggingface.co/docs/hub/eval-results, which calls the feature work in progress; an example of eval.yaml; the list
of frameworks in huggingface.js, packages/tasks/src/eval.ts. amltrain is not in that list. The Hub checks eval.yaml when
it is pushed, and shows a data set as a benchmark once its staff have listed it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from amltrain.errors import UserError
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import describe

EVAL_FILE = "eval.yaml"
RESULTS_FOLDER = ".eval_results"
_HEADLINES = ("mIoU", "gIoU", "Acc@0.5")
"""The metric that stands for a split, the first that it has: a leaderboard has one value for each task."""


def task_id(dataset: str, split: str) -> str:
    """The name of a split as a task, the same in both files: lower-case letters, digits and _."""
    return re.sub(r"[^a-z0-9]+", "_", f"{dataset.replace('+', '_plus')}_{split}".lower()).strip("_")


def eval_yaml(repo: str, framework: str, manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of eval.yaml. framework: a name of the Hub's list. manifests: of the prepared data sets, by name.

    Every split but `train` is a task. Raises UserError if there is none.
    """
    tasks = [
        {"id": task_id(name, split), "config": name, "split": split}
        for name, manifest in manifests.items()
        for split, counts in manifest["splits"].items()
        if split != "train" and counts["images"]
    ]
    if not tasks:
        raise UserError(f"{', '.join(manifests)} has no split but train, so it is no benchmark; leave --benchmark out")
    content = {
        "name": repo.rpartition("/")[2],
        "description": "Referring image segmentation: the mask of the object that a sentence refers to.",
        "evaluation_framework": framework,
        "tasks": tasks,
    }
    return yaml.safe_dump(content, sort_keys=False)


def result_files(results: Sequence[Results], benchmark: str, source: str) -> dict[str, str]:
    """Texts of the files of `.eval_results/`, by path: one for each split, in percent.

    results: scores, as `Results.is_score` has it. benchmark: the data set repository. source: the model repository,
    which has the results.json. Raises UserError for two rows of one split, and if there is nothing to write.
    """
    files: dict[str, str] = {}
    for result in results:
        name = next((n for n in _HEADLINES if not math.isnan(result.metrics.get(n, math.nan))), None)
        if name is None:
            continue
        task = task_id(result.dataset, result.split)
        path = f"{RESULTS_FOLDER}/{task}.yaml"
        if path in files:
            raise UserError(
                f"{result.dataset} {result.split} was scored in two ways; give --results a file with one row for it"
            )
        entry = {
            "dataset": {"id": benchmark, "task_id": task},
            "value": round(result.metrics[name], 2),
            "source": {"url": f"https://huggingface.co/{source}", "name": "results.json of amltrain"},
            "notes": f"{name} in percent, {describe(result)}",
        }
        files[path] = yaml.safe_dump([entry], sort_keys=False, width=1000)
    if not files:
        raise UserError(f"there is no score for {benchmark}; give --results the results.json of amltrain evaluate")
    return files
