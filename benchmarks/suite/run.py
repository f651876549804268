"""Run the suite's cases one after another until they or the time are over."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from amltrain.errors import UserError
from amltrain.files import write_text
from benchmarks.suite.plan import Case, plan
from benchmarks.suite.report import markdown
from benchmarks.suite.worker import Worker

LEAST = 5.0
"""Seconds without which a case is not started."""


def run_suite(options: argparse.Namespace) -> None:
    """Measure, write and print. Raises UserError for an unknown kind, a missing device or a damaged results.json."""
    cases = plan(options)
    end = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    suite = Suite(options)
    try:
        suite.find_machine()
        for number, case in enumerate(cases, 1):
            if suite.is_done(case):
                continue
            left = end - time.monotonic()
            if left < LEAST:
                break
            seconds = suite.measure(case, min(options.limit, left))
            text = f"[{number}/{len(cases)}] {case.kind}: {case.name}: {seconds:.0f} s, {suite.outcome(case)}"
            print(text, flush=True)
    finally:
        suite.close()
    suite.write()
    print(f"\n{suite.markdown}\nwritten: {suite.file}, {suite.file.with_suffix('.md')}")
    open_cases = [case.name for case in cases if not suite.is_done(case)]
    if open_cases:
        print(f"not measured ({len(open_cases)}): {'; '.join(open_cases)}; run again to measure them")


class Suite:
    """Results of a machine, and the process that measures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.file: Path = options.output / "results.json"
        self.results: dict[str, Any] = self._read()
        self.worker: Worker | None = None

    def find_machine(self) -> None:
        """Ask a process for the hardware. Raises UserError for a device that is not there, or for another machine."""
        case = Case("machine", "machine", "machine:describe", {"device": self.options.device})
        answer = self._ask(case, 300.0)
        if "error" in answer:
            raise UserError(answer["error"])
        machine, before = answer["values"], self.results.get("machine")
        if before is not None and before["name"] != machine["name"]:
            raise UserError(f"{self.file} is of another machine ({before['name']}); choose another --output")
        self.results["machine"] = machine

    def is_done(self, case: Case) -> bool:
        """Whether the case has been measured with the same options, now or in an earlier start."""
        known = self.results["cases"].get(case.name)
        return known is not None and "values" in known and known["options"] == case.options

    def measure(self, case: Case, limit: float) -> float:
        """Measure a case and write all results. Returns seconds."""
        start = time.monotonic()
        answer = self._ask(case, limit)
        seconds = time.monotonic() - start
        self.results["cases"][case.name] = {
            "kind": case.kind, "options": case.options, "seconds": round(seconds, 1), **answer
        }  # fmt: skip
        self.write()
        return seconds

    def outcome(self, case: Case) -> str:
        answer = self.results["cases"][case.name]
        return "measured" if "values" in answer else f"FAILED: {answer['error']}"

    def write(self) -> None:
        """Write both files."""
        write_text(self.file, json.dumps(self.results, indent=1) + "\n")
        write_text(self.file.with_suffix(".md"), self.markdown)

    @property
    def markdown(self) -> str:
        return markdown(self.results)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.end()

    def _ask(self, case: Case, seconds: float) -> dict[str, Any]:
        if self.worker is None or not self.worker.alive or self.worker.engine != case.engine or case.engine != "single":
            self.close()  # an engine's process group stays for good
            self.worker = Worker(case.engine, self.options.device, self.options.output / "log.txt")
        return self.worker.measure(case, seconds)

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"cases": {}}
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            assert isinstance(found["cases"], dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{self.file} was not written by this command; choose another --output") from error
        return found
