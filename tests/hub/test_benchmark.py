"""The Hub's files about benchmarks: their form, and that a push brings them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from amltrain.errors import UserError
from amltrain.evaluation.results import Results
from amltrain.hub.benchmark import eval_yaml, result_files, task_id
from amltrain.hub.push import push_model
from amltrain.hub.push_data import push_data
from tests.hub.test_push import server as server  # the fixtures
from tests.hub.test_push import trained as trained
from tests.hub.test_push_data import prepared as prepared
from tests.hub_server import HubServer

REPO, BENCHMARK = "alice/model", "alice/pictures"
PROTOCOL: dict[str, Any] = {
    "frame": "original", "size": [64, 64], "threshold": 0.5, "interpolation": "bilinear", "sentences": "all",
    "ties": "ge", "metrics": "classic",
}  # fmt: skip


def result(dataset: str, split: str, **metrics: float) -> Results:
    return Results(dataset, split, metrics, {"samples": 4}, PROTOCOL)


def test_the_same_split_is_the_same_task_in_both_files() -> None:
    manifest = {"splits": {"train": {"images": 3}, "testA": {"images": 2}, "testB": {"images": 0}}}
    content = yaml.safe_load(eval_yaml(BENCHMARK, "inspect-ai", {"refcoco+": manifest}))
    assert content["name"] == "pictures" and content["evaluation_framework"] == "inspect-ai"
    assert content["tasks"] == [{"id": "refcoco_plus_testa", "config": "refcoco+", "split": "testA"}]
    [path] = result_files([result("refcoco+", "testA", oIoU=50.0, mIoU=61.239)], BENCHMARK, REPO)
    assert path == f".eval_results/{content['tasks'][0]['id']}.yaml"
    assert task_id("refcoco", "testA") != task_id("refcoco+", "testA")


def test_a_file_has_the_headline_of_a_split_and_its_protocol() -> None:
    rows = [result("gseval", "test", oIoU=50.0, mIoU=61.239), result("ref-adv-s", "test", **{"Acc@0.5": 23.8})]
    files = result_files(rows, BENCHMARK, REPO)
    assert list(files) == [".eval_results/gseval_test.yaml", ".eval_results/ref_adv_s_test.yaml"]
    [first], [second] = (yaml.safe_load(text) for text in files.values())
    assert first["dataset"] == {"id": BENCHMARK, "task_id": "gseval_test"} and first["value"] == 61.24
    assert first["notes"].startswith("mIoU in percent, at the original size") and second["value"] == 23.8
    assert first["source"]["url"].endswith(f"/{REPO}")


def test_what_cannot_be_a_benchmark_is_an_error() -> None:
    with pytest.raises(UserError, match="mine has no split but train"):
        eval_yaml(BENCHMARK, "inspect-ai", {"mine": {"splits": {"train": {"images": 3}}}})
    with pytest.raises(UserError, match="there is no score for alice/pictures"):
        result_files([result("a", "val", mIoU=float("nan"))], BENCHMARK, REPO)
    row = result("a", "val", mIoU=1.0)
    other = replace(row, protocol=PROTOCOL | {"threshold": 0.35})
    with pytest.raises(UserError, match="a val was scored in two ways"):
        result_files([row, other], BENCHMARK, REPO)


def test_a_push_brings_the_files(trained: Path, prepared: Path, server: HubServer) -> None:
    push_data(prepared, BENCHMARK, private=True, benchmark="inspect-ai")
    tasks = yaml.safe_load(server.files(BENCHMARK)["eval.yaml"])["tasks"]
    assert [(task["config"], task["split"]) for task in tasks] == [("mine", "val"), ("mine", "test")]
    push_model(trained / "best", REPO, private=True, benchmark=BENCHMARK)
    [entry] = yaml.safe_load(server.files(REPO)[".eval_results/refshapes_val.yaml"])
    assert entry["dataset"]["id"] == BENCHMARK and 0 <= entry["value"] <= 100
    said = push_model(trained / "best", REPO, private=True, benchmark=BENCHMARK, dry_run=True)
    assert ".eval_results/refshapes_val.yaml" in said and "task_id: refshapes_val" in said
