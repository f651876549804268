"""The suite's plan, its report, and that it survives what it measures."""

import json
import os
import signal
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.command import main
from benchmarks.suite.command import build_parser
from benchmarks.suite.plan import KINDS, Case, plan
from benchmarks.suite.report import markdown
from benchmarks.suite.run import Suite
from benchmarks.suite.worker import Worker, environment

MACHINE = {"name": "Card", "memory": 80 * 2**30, "cuda": "13.0", "cpu": "CPU", "cores": 16, "threads": 16}
ROW = {"step": "baseline", "seconds": 0.5, "ratio": 1.0, "rate": 32.0, "memory": 2**30}
VALUES = {
    "steps": {"size": 448, "batch": 16, "first_step": 9.0, "rows": [ROW, {**ROW, "memory": None}]},
    "others": {"size": 448, "batch": 16, "first_step": 9.0, "rows": [ROW]},
    "variants": {
        "size": 448,
        "batch": 16,
        "rows": [{"variant": "a", "seconds": 1.0, "ratio": 1.0, "difference": 0.0}],
    },
    "engines": {"batch": 16, "engine": "FSDP", "seconds": 0.5, "rate": 32.0, "memory": None},
    "batch sizes": {"ended_by": "memory", "rows": [{"batch": 1, "rate": 4.0, "memory": 2**30}]},
    "evaluation": {"sentences": 3, "rates": {"sentence": 10.0, "image": 20.0}},
    "loader": {"size": 448, "file_bytes": 9000, "rows": [{"decoder": "pil", "workers": 0, "rate": 90.0}]},
    "saving": {"bytes": 2**30, "write": 4.0, "blocked": 0.5, "ratio": 0.125, "step": 1.0, "step_while_writing": None},
}


def options(*arguments: str) -> Namespace:
    return build_parser().parse_args(arguments)


def test_every_case_is_named_once_and_every_kind_is_planned() -> None:
    cases = plan(options())
    assert len({case.name for case in cases}) == len(cases)
    assert {case.kind for case in cases} == set(KINDS)
    assert [case.kind for case in plan(options("--only", "loader"))] == ["loader"]


def test_every_planned_model_is_registered() -> None:
    from amltrain.models import list_models

    assert {case.options["model"] for case in plan(options()) if "model" in case.options} <= set(list_models())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0 and must be more than 0"),
        (["--only", "stepz"], "unknown kind (--only) 'stepz'; did you mean steps?"),
    ],
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(["suite", *arguments])
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_every_table_is_complete() -> None:
    cases = {kind: {"kind": kind, "values": values} for kind, values in VALUES.items()}
    assert set(cases) == set(KINDS)
    cases["bad"] = {"kind": "loader", "error": "stopped after 9 s"}
    cases["note"] = {"kind": "evaluation", "values": {"note": "reads the sentence"}}
    text = markdown({"machine": {**MACHINE, "torch": "2.15", "python": "3.11"}, "cases": cases})
    assert text.startswith("## Card\n\nCard, 80 GiB, CUDA 13.0; 16 cores of CPU")
    assert "Failed: bad (stopped after 9 s)" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == len(KINDS)
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table


def test_a_failing_a_slow_and_a_dying_measurement(tmp_path: Path) -> None:
    missing = Case("a", "steps", "plan:nothing", {})

    def start() -> Worker:
        return Worker("single", "cpu", tmp_path / "log.txt")

    worker = start()
    assert worker.measure(missing, 60) == {
        "error": "AttributeError: module 'benchmarks.suite.plan' has no attribute 'nothing'"
    }
    assert not worker.alive
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    worker = start()
    assert worker.measure(missing, 0) == {"error": "stopped after 0 s"}
    assert not worker.alive
    worker = start()
    os.kill(worker._process.pid or 0, signal.SIGKILL)
    assert worker.measure(missing, 60) == {"error": "the process ended with code -9"}


def test_results_are_kept_and_those_of_other_options_are_not(tmp_path: Path) -> None:
    given = options("--output", str(tmp_path))
    case = Case("a", "steps", "f", {"batch": 4})
    known = {"kind": "steps", "options": {"batch": 4}, "values": {}}
    (tmp_path / "results.json").write_text(json.dumps({"cases": {"a": known}}))
    suite = Suite(given)
    assert suite.is_done(case)
    assert not suite.is_done(case._replace(options={"batch": 8}))
    assert not suite.is_done(case._replace(name="b"))
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="was not written by this command"):
        Suite(given)


def test_engines_are_chosen_by_the_environment() -> None:
    assert environment("single", "cuda") == {}
    assert environment("single", "cpu") == {"ACCELERATE_USE_CPU": "true"}
    assert environment("ddp", "cuda")["WORLD_SIZE"] == "1"
    assert environment("fsdp2", "cuda")["FSDP_VERSION"] == "2"


@pytest.mark.slow
def test_the_whole_suite_at_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--suite", "cpu", "--model", "caris_tiny", "--others", "lavt_tiny", "cris_tiny", "--size", "64"]
    arguments += ["--batch", "2", "--largest-batch", "2", "--rounds", "1", "--minutes", "60", "--limit", "900"]
    main([*arguments, "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    failed = {name: case["error"] for name, case in results["cases"].items() if "error" in case}
    assert failed == {"caris_tiny, fsdp2": "Accelerate does not run FSDP2 on this device"}
    assert {case["kind"] for case in results["cases"].values()} == set(KINDS)
    assert (tmp_path / "results.md").read_text().startswith("## ")
    capsys.readouterr()
    main([*arguments, "--output", str(tmp_path), "--only", "steps"])
    assert "] steps" not in capsys.readouterr().out  # all were measured before
