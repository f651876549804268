"""Random faults that nobody has chosen: what, when, how many and on how many processes are functions of a seed.

    python -m tests.training.fuzz --rounds 100 --seed 0 --processes 1

A run is struck one to three times, in a running process or between two starts, and started again until it ends. It is
right if weights, optimizer and log equal those of a run that nothing struck, bit for bit, and if everything that it
said on the way is a sentence: no traceback, one "error:" per start, an exit code that means what it says.
"""

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from amltrain.errors import CTRL_C_EXIT_CODE, ENDING, REQUEUE_EXIT_CODE
from tests.training import runs
from tests.training.failing_calls import end_state, same

STEPS = 8
RUN = (
    *("--train.max_steps", str(STEPS), "--train.global_batch_size", "4", "--train.micro_batch_size", "2"),
    *("--checkpoint.every_steps", "2", "--checkpoint.keep", "2", "--evaluation.every_steps", "4"),
    *("--evaluation.max_samples", "4", "--evaluation.batch_size", "2", "--train.collective_timeout", "0.5"),
)
SIGNALS = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: REQUEUE_EXIT_CODE,
    signal.SIGUSR1: REQUEUE_EXIT_CODE,
    signal.SIGHUP: REQUEUE_EXIT_CODE,
    signal.SIGINT: CTRL_C_EXIT_CODE,
}
CALLS = ("open", "rename", "replace", "link", "mkdir", "fsync", "unlink", "write", "symlink", "stat", "rmdir")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT, errno.EROFS, errno.EACCES, errno.EMFILE)
LONGEST = 120.0


class WrongError(AssertionError):
    """A run that is not right, with what it said."""


def fail_calls(output: str, call: str, number: int, error: int, ranks: str) -> None:
    """Let the `number`-th call of Python's `os` (or open for writing) below the run's folder fail, once."""
    if ranks == "main" and os.environ.get("RANK", "0") != "0":
        return
    seen = [0]

    def strikes(path: Any) -> bool:
        if not str(path).startswith(output):
            return False
        seen[0] += 1
        return seen[0] == number

    if call in ("open", "write"):
        import io

        sound = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            writes = set(mode) & set("wxa+")
            if writes and call == "open" and strikes(file):
                raise OSError(error, os.strerror(error), str(file))
            stream = sound(file, mode, *arguments, **keywords)
            if writes and call == "write" and strikes(file):
                stream.write = partial(_fail, error)  # type: ignore[method-assign]
            return stream

        io.open = opened  # type: ignore[assignment]  # pathlib's
        __import__("builtins").open = opened
        return
    sound_call = getattr(os, call)

    def called(path: Any, *arguments: Any, **keywords: Any) -> Any:
        named = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
        if strikes(named):
            raise OSError(error, os.strerror(error), str(named))
        return sound_call(path, *arguments, **keywords)

    setattr(os, call, called)


def _fail(error: int, *_: Any) -> None:
    raise OSError(error, os.strerror(error))


class Round:
    """One run under its random faults."""

    def __init__(self, prepared: Path, output: Path, seed: int, processes: int) -> None:
        self.prepared, self.output, self.processes = prepared, output, processes
        self.random = random.Random(seed)
        self.log_every = self.random.choice((1, 1, 3, 100))
        self.told: list[str] = []

    def start(self, before: Callable[[], None] | None = None) -> runs.Launched:
        extra = ("--train.log_every", str(self.log_every), "--data.workers", str(self.random.choice((0, 0, 1))))
        return runs.launch(self.prepared, self.output, *RUN, *extra, processes=self.processes, before=before)

    def finish(self, launched: runs.Launched, allowed: set[int]) -> set[int]:
        """Wait; check what was said and the exit codes."""
        deadline = time.monotonic() + LONGEST
        for process in launched.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in launched.processes if process.exitcode is None]
        for process in hung:
            process.kill()
            process.join()
        new = ""
        for rank in range(self.processes):
            log = self._log(rank)
            if log.exists():  # else it was killed before it said anything
                new += log.read_text(errors="replace") + "\n"
                log.unlink()
        if hung:
            raise WrongError(f"hangs after {LONGEST:g} s: {new[-1500:]}")
        codes = {process.exitcode for process in launched.processes if process.exitcode is not None}
        if "Traceback" in new or "Exception ignored" in new or "[c10d]" in new:
            raise WrongError(f"no sentence: {new[-2500:]}")
        errors = [line for line in new.splitlines() if line.startswith("error: ")]
        self.told += errors
        if codes - allowed - {0}:
            raise WrongError(f"exit codes {codes}, expected {allowed}: {new[-1500:]}")
        if 2 in codes and not errors:
            raise WrongError(f"exit code 2 without a sentence: {new[-1500:]}")
        if len(errors) != len(set(errors)) or any(len(line) > 700 for line in errors):
            raise WrongError(f"said twice, or too long: {errors}")
        return codes

    def _log(self, rank: int) -> Path:
        return self.output.with_name(f"{self.output.name}.log.{rank}")

    def signalled(self) -> str:
        number = self.random.choice(list(SIGNALS))
        launched, seconds = self.start(), self.random.uniform(0.0, 4.0)
        everybody = self.processes == 1 or self.random.random() < 0.6
        time.sleep(seconds)
        if everybody:
            launched.send(number)
        else:
            victim = self.random.choice(launched.processes)
            if victim.pid is not None and victim.is_alive():
                os.kill(victim.pid, number)
        # before a run listens, a signal ends it as it ends any program: in one line once Python runs our code
        allowed = {SIGNALS[number], REQUEUE_EXIT_CODE, -number, *({128 + number} if number in ENDING else ())}
        if not everybody:
            allowed |= {2, *([-signal.SIGABRT] if number == signal.SIGKILL else [])}
            if number == signal.SIGKILL:  # what a launcher does
                others = [process for process in launched.processes if process is not victim]
                for process in others:
                    process.join(45)
        self.finish(launched, allowed)
        return f"{number.name} after {seconds:.1f} s" + ("" if everybody else " to one process")

    def failed_call(self) -> str:
        call, number = self.random.choice(CALLS), self.random.randint(1, 60)
        error, ranks = self.random.choice(ERRORS), self.random.choice(("main", "all"))
        plant = partial(fail_calls, str(self.output), call, number, error, ranks)
        self.finish(self.start(plant), {2})
        return f"{errno.errorcode[error]} in {call} {number} ({ranks})"

    def damaged(self) -> str:
        """Something happens to any file of the run's folder between two starts."""
        files = sorted(p for p in self.output.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            return "nothing to damage"
        victim = self.random.choice(files)
        content = bytearray(victim.read_bytes())
        how = self.random.choice(("bit", "cut", "empty", "gone", "noise"))
        if how == "bit" and content:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        elif how == "cut":
            content = content[: self.random.randrange(len(content) + 1)]
        elif how == "noise":
            content = bytearray(self.random.randbytes(len(content) or 7))
        if how == "gone":
            victim.unlink()
        else:
            victim.write_bytes(b"" if how == "empty" else content)
        return f"{how} of {victim.relative_to(self.output)}"

    def run(self) -> str:
        """Strike one to three times, then go on to the end; what happened."""
        done = []
        for _ in range(self.random.randint(1, 3)):
            strike = self.random.choice((self.signalled, self.signalled, self.failed_call, self.damaged))
            done.append(strike())
        for _ in range(6):
            codes = self.finish(self.start(), {2})
            if codes == {0}:
                return "; ".join(done)
            if self.told and re.search(r"every checkpoint in .* is damaged|is damaged: ", self.told[-1]):
                shutil.rmtree(self.output)  # as the sentence says: a new run
                done.append("all checkpoints damaged, run from the start")
        raise WrongError(f"does not end after {done}: {self.told[-3:]}")


def rounds(prepared: Path, scratch: Path, *, seed: int, count: int, processes: int) -> Counter[str]:
    """Run so many rounds and print each; counts of right and wrong ones and of sentences."""
    wholes: dict[int, Any] = {}
    counts: Counter[str] = Counter()
    for number in range(seed, seed + count):
        folder = scratch / f"{processes}-{number}"
        folder.mkdir()
        trial = Round(prepared, folder / "run", number, processes)
        if trial.log_every not in wholes:
            whole = folder.with_name(f"whole-{processes}-{trial.log_every}")
            first = Round(prepared, whole, 0, processes)
            first.log_every = trial.log_every
            first.finish(first.start(), set())
            wholes[trial.log_every] = end_state(whole)
        try:
            done, fault = trial.run(), ""
            state = end_state(trial.output)
            if "of log.jsonl" in done:  # its lines are a record, not a state
                state["log"] = wholes[trial.log_every]["log"]
            if not same(wholes[trial.log_every], state):
                fault = "another end state"
        except (WrongError, OSError, ValueError) as error:
            done, fault = "", str(error)
        counts["wrong" if fault else "right"] += 1
        counts["sentences"] += len(trial.told)
        print(f"{'WRONG' if fault else 'right'} seed {number}: {done} {json.dumps(fault) if fault else ''}", flush=True)
        shutil.rmtree(folder)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    from tests.training.failing_calls import _shapes

    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        prepared = _shapes(Path(name))
        counts = rounds(prepared, Path(name), seed=options.seed, count=options.rounds, processes=options.processes)
    print(dict(counts))
    sys.exit(bool(counts["wrong"]))


if __name__ == "__main__":
    main()
