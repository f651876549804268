"""Every way to cut a run short, at random moments; then the run is started again until it ends.

    python -m tests.training.faults --rounds 3          prints the table of docs/long-runs.md

A run is right if its final weights and its whole log equal, bit for bit, those of a run that nothing cut short. Lost
steps are those that had been done and were done again. A process costs a fork, so that one try takes seconds.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from amltrain import run_folder as checkpoints
from amltrain.data.prepare import prepare
from amltrain.data.sources.shapes import SPLIT_SIZES, write_refshapes
from amltrain.errors import CTRL_C_EXIT_CODE, REQUEUE_EXIT_CODE
from tests.training import runs, sabotage

STEPS, SAVES_EVERY, EVALUATES_EVERY = 16, 4, 8
SAVES, EVALUATIONS = STEPS // SAVES_EVERY, STEPS // EVALUATES_EVERY
USER_ERROR = 2
RUN = (
    *("--train.max_steps", str(STEPS), "--checkpoint.every_steps", str(SAVES_EVERY), "--checkpoint.keep", "2"),
    *("--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--data.workers", "1"),
    *(
        "--evaluation.every_steps",
        str(EVALUATES_EVERY),
        "--evaluation.batch_size",
        "2",
        "--evaluation.max_samples",
        "8",
    ),
)


@dataclass
class Trial:
    """One run that is cut short, and what became of it."""

    prepared: Path
    output: Path
    random: random.Random
    processes: int = 1
    struck: bool = True
    restarts: int = 0
    done: int = 0
    lost: list[int] = field(default_factory=list)

    def start(self, *extra: str, before: Callable[[], None] | None = None) -> runs.Launched:
        return runs.launch(self.prepared, self.output, *RUN, *extra, processes=self.processes, before=before)

    def steps(self) -> int:
        """Steps done so far."""
        return max((entry["step"] for entry in runs.log(self.output) if "loss" in entry), default=0)

    def some_step(self) -> int:
        return self.random.randint(1, STEPS - 1)

    def cut_at(self, step: int, number: int, expected: int, *, saved: int = 0) -> None:
        """Send a signal soon after a step. saved: checkpoints that the background must have written before."""
        launched = self.start()
        launched.wait_until(lambda: self.steps() >= step and len(checkpoints.checkpoints(self.output)) >= saved)
        time.sleep(self.random.random() * 0.2)
        launched.send(number)
        self.expect(launched, expected)

    def plant(self, fault: Callable[[], None], expected: int, *extra: str) -> None:
        """Run into a fault of `sabotage`."""
        self.expect(self.start(*extra, before=fault), expected)

    def expect(self, launched: runs.Launched, code: int) -> None:
        found = launched.finish()
        assert found in (code, 0), f"exit code {found}, expected {code}\n{launched.said()}"
        self.struck = found == code  # else the run ended first

    def newest(self) -> Path:
        return checkpoints.checkpoints(self.output)[-1]

    def finish(self) -> None:
        """Start again until the run ends by itself."""
        while True:
            before, log = max(self.steps(), self.done), self.output.with_name(f"{self.output.name}.log.0")
            already = len(log.read_text(errors="replace"))
            code = self.start().finish()
            said = log.read_text(errors="replace")[already:]
            resumed = re.search(r"resuming from \S+ at step (\d+)", said)
            self.lost.append(before - (int(resumed[1]) if resumed else 0))
            self.restarts, self.done = self.restarts + 1, 0
            if code == 0:
                return
            assert self.restarts < 5, said


def signalled(number: int, expected: int) -> Callable[[Trial], None]:
    return lambda trial: trial.cut_at(trial.some_step(), number, expected)


def killed_in_save(moment: str) -> Callable[[Trial], None]:
    def harm(trial: Trial) -> None:
        trial.plant(partial(sabotage.kill_in_save, moment, trial.random.randint(2, SAVES)), -signal.SIGKILL)

    return harm


def killed_in_scoring(moment: str) -> Callable[[Trial], None]:
    def harm(trial: Trial) -> None:
        trial.plant(partial(sabotage.kill_in_save, moment, trial.random.randint(1, EVALUATIONS)), -signal.SIGKILL)

    return harm


def signalled_in_evaluation(number: int, expected: int) -> Callable[[Trial], None]:
    def harm(trial: Trial) -> None:
        trial.plant(partial(sabotage.signal_in_evaluation, number, trial.random.randint(1, 8)), expected)

    return harm


def planted(fault: Callable[[int], None], expected: int, *extra: str, last: int = STEPS - 1) -> Callable[[Trial], None]:
    """A fault of `sabotage` with a number of its own, 1 to `last`."""
    return lambda trial: trial.plant(partial(fault, trial.random.randint(1, last)), expected, *extra)


def not_a_number(trial: Trial) -> None:
    first = trial.random.randrange(STEPS // SAVES_EVERY) * SAVES_EVERY + trial.random.randint(1, SAVES_EVERY - 1)
    trial.plant(partial(sabotage.nan_images, (first, first + 1)), USER_ERROR, "--train.max_bad_steps", "2")


def out_of_time(trial: Trial) -> None:
    seconds = trial.random.uniform(0.5, 6)
    trial.expect(trial.start("--train.time_limit", str(seconds / 3600)), REQUEUE_EXIT_CODE)


def one_of_two_killed(trial: Trial) -> None:
    launched = trial.start()
    launched.wait_until(lambda: trial.steps() >= trial.some_step())
    launched.processes[trial.random.randrange(2)].kill()
    for process in launched.processes:  # a launcher ends the rest of them
        process.join(20)
        process.kill()
        process.join()


def one_of_two_stopped(trial: Trial) -> None:
    """For longer than the other one waits."""
    launched = trial.start("--train.collective_timeout", "0.25")
    stopped = launched.processes[trial.random.randrange(2)]
    launched.wait_until(lambda: trial.steps() >= trial.some_step())
    os.kill(pid_of(stopped), signal.SIGSTOP)
    other = next(process for process in launched.processes if process is not stopped)
    other.join(120)
    trial.struck = other.exitcode == USER_ERROR
    assert other.exitcode in (0, USER_ERROR), f"exit code {other.exitcode}\n{launched.said()}"
    stopped.kill()
    stopped.join()


def one_of_two_paused(trial: Trial) -> None:
    """For less than the other one waits: nothing happens."""
    launched = trial.start()
    paused = pid_of(launched.processes[trial.random.randrange(2)])
    launched.wait_until(lambda: trial.steps() >= trial.some_step())
    os.kill(paused, signal.SIGSTOP)
    time.sleep(trial.random.uniform(0.5, 2))
    os.kill(paused, signal.SIGCONT)
    code = launched.finish()
    assert code == 0, f"exit code {code}\n{launched.said()}"


def pid_of(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def two_runs_at_once(trial: Trial) -> None:
    """The second is rejected; the first does not notice."""
    first = trial.start()
    first.wait_until(lambda: trial.steps() >= trial.some_step())
    second = trial.start()
    code = second.finish()
    trial.struck = code == USER_ERROR
    assert code in (USER_ERROR, 0) and ("is in use by process" in second.said() or not code), second.said()
    assert first.finish() == 0, first.said()


def folder_deleted(trial: Trial) -> None:
    launched = trial.start()
    launched.wait_until(lambda: trial.steps() >= trial.some_step())
    trial.done = trial.steps()  # its log goes, too
    with suppress(OSError):
        os.rename(trial.output, trial.output.with_suffix(".deleted"))
    shutil.rmtree(trial.output.with_suffix(".deleted"), ignore_errors=True)
    trial.expect(launched, USER_ERROR)


def folder_read_only(trial: Trial) -> None:
    trial.plant(partial(sabotage.read_only, trial.output, trial.random.randint(1, STEPS - SAVES_EVERY)), USER_ERROR)


def clock_jumps(trial: Trial) -> None:
    """The run does not notice."""
    seconds = trial.random.choice((-1, 1)) * trial.random.uniform(1, 10) * 86400
    trial.plant(partial(sabotage.clock_jump, trial.some_step(), seconds), 0)


def damaged(harm: Callable[[Trial, Path], Any]) -> Callable[[Trial], None]:
    """Killed, and then something happens to the newest of two checkpoints. Damage to the only one ends the run."""

    def kill_and_harm(trial: Trial) -> None:
        trial.cut_at(trial.random.randint(2 * SAVES_EVERY, STEPS - 1), signal.SIGKILL, -signal.SIGKILL, saved=2)
        harm(trial, trial.newest())

    return kill_and_harm


def truncate(trial: Trial, checkpoint: Path) -> None:
    model = checkpoint / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[: -trial.random.randint(1, 10_000)])


def flip(trial: Trial, checkpoint: Path) -> None:
    path = trial.random.choice(sorted(path for path in (checkpoint / "state").iterdir() if path.stat().st_size))
    content = bytearray(path.read_bytes())
    content[trial.random.randrange(len(content))] ^= 1 << trial.random.randrange(8)
    path.write_bytes(content)


def remove_a_file(trial: Trial, checkpoint: Path) -> None:
    trial.random.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file())).unlink()


def mislead(trial: Trial, checkpoint: Path) -> None:
    """`last` is gone or points at nothing, `best` at nothing."""
    (trial.output / "last").unlink(missing_ok=True)
    if trial.random.random() < 0.5:
        (trial.output / "last").symlink_to("step-999999")
    (trial.output / "best").unlink(missing_ok=True)
    (trial.output / "best").symlink_to("step-999998")


FAULTS: dict[str, Callable[[Trial], None]] = {
    "kill -9 in a step": signalled(signal.SIGKILL, -signal.SIGKILL),
    **{f"kill -9 in a save: {moment}": killed_in_save(moment) for moment in sabotage.SAVE_MOMENTS},
    **{f"kill -9 while scores are added: {moment}": killed_in_scoring(moment) for moment in sabotage.SCORE_MOMENTS},
    "kill -9 in an evaluation": signalled_in_evaluation(signal.SIGKILL, -signal.SIGKILL),
    "SIGTERM": signalled(signal.SIGTERM, REQUEUE_EXIT_CODE),
    "SIGUSR1": signalled(signal.SIGUSR1, REQUEUE_EXIT_CODE),
    "SIGHUP": signalled(signal.SIGHUP, REQUEUE_EXIT_CODE),
    "Ctrl-C": signalled(signal.SIGINT, CTRL_C_EXIT_CODE),
    "SIGTERM in an evaluation": signalled_in_evaluation(signal.SIGTERM, REQUEUE_EXIT_CODE),
    "time limit": out_of_time,
    "disk full in a save": planted(sabotage.full_disk, USER_ERROR, last=SAVES),
    "out of memory": planted(sabotage.out_of_memory, USER_ERROR),
    "NaN until it gives up": not_a_number,
    "unreadable image": planted(sabotage.unreadable_image, USER_ERROR, last=50),
    "loader process killed": planted(sabotage.kill_a_loader, USER_ERROR),
    "model file cut off": damaged(truncate),
    "bit flipped in a state file": damaged(flip),
    "manifest deleted": damaged(lambda trial, checkpoint: (checkpoint / checkpoints.MANIFEST).unlink()),
    "some file deleted": damaged(remove_a_file),
    "newest checkpoint deleted": damaged(lambda trial, checkpoint: shutil.rmtree(checkpoint)),
    "last, best: deleted or dangling": damaged(mislead),
    "one of two processes killed": one_of_two_killed,
    "one of two processes stopped (SIGSTOP)": one_of_two_stopped,
    "one of two processes paused": one_of_two_paused,
    "two runs at once": two_runs_at_once,
    "output folder deleted": folder_deleted,
    "output folder made read-only": folder_read_only,
    "clock jumps by days": clock_jumps,
    "/dev/shm filled": planted(sabotage.full_shared_memory, USER_ERROR, last=STEPS - SAVES_EVERY),
    "/dev/shm of 64 KiB": lambda trial: trial.plant(partial(sabotage.small_shared_memory, 64), USER_ERROR),
    "no further open files": planted(sabotage.no_more_files, USER_ERROR, last=STEPS - SAVES_EVERY),
    "ulimit -n 100": lambda trial: trial.plant(partial(sabotage.few_open_files, 100), USER_ERROR),
}


def processes_of(name: str) -> int:
    return 2 if "of two processes" in name else 1


@dataclass
class Outcome:
    """Of one kind of fault: tries, how many of them cut the run short and how many ended with the same bits, steps lost
    in each, what went wrong."""

    tries: int = 0
    struck: int = 0
    equal: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def difference(reference: Path, output: Path) -> str | None:
    """What differs in the weights or the logs of two runs; None if nothing does."""
    if not runs.same_weights(reference, output):
        return "the weights differ"
    wanted, found = runs.logged(reference), runs.logged(output)
    if wanted == found:
        return None
    pairs = zip(wanted, found, strict=False)
    first = next(((a, b) for a, b in pairs if a != b), (len(wanted), len(found)))
    return f"the logs differ: {first[1]} instead of {first[0]}"


def draw_scenes(folder: Path) -> Path:
    sizes = dict.fromkeys(SPLIT_SIZES, 4) | {"train": 20}
    write_refshapes(folder / "source", split_sizes=sizes, progress=False)
    prepare("refshapes", folder / "source", folder / "prepared", progress=False)
    return folder / "prepared"


def try_faults(
    names: Sequence[str], rounds: int, prepared: Path, folder: Path, *, seed: int = 0, jobs: int = 1
) -> dict[str, Outcome]:
    """Try every named fault so many times, `jobs` of them at once."""
    outcomes = {name: Outcome() for name in names}
    whole = {processes: folder / f"whole-{processes}" for processes in {processes_of(name) for name in names}}
    for processes, output in whole.items():
        runs.finished(prepared, output, *RUN, processes=processes)

    def one(job: tuple[int, str]) -> tuple[Trial, bool, str | None]:
        number, name = job
        output, moments = folder / f"run-{names.index(name)}-{number}", random.Random(json.dumps([name, number, seed]))
        trial = Trial(prepared, output, moments, processes_of(name))
        reference, wrong = whole[trial.processes], None
        try:
            FAULTS[name](trial)
            trial.finish()
        except AssertionError as error:
            wrong = str(error)[-2000:]
        wrong = wrong or difference(reference, output)
        shutil.rmtree(output)
        return trial, not wrong, wrong

    tries = [(number, name) for number in range(rounds) for name in names]
    with ThreadPoolExecutor(jobs) as pool:
        found = tqdm(pool.map(one, tries), total=len(tries), unit="try", smoothing=0)
        for (_, name), (trial, equal, wrong) in zip(tries, found, strict=True):
            outcome = outcomes[name]
            outcome.tries += 1
            outcome.struck += trial.struck
            outcome.equal += equal
            outcome.lost += trial.lost
            outcome.wrong += [wrong] if wrong else []
    return outcomes


def table(outcomes: dict[str, Outcome]) -> str:
    rows = [
        "| fault | tries | cut short | same bits at the end | steps lost: mean, most |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, outcome in outcomes.items():
        lost = outcome.lost or [0]
        counts = f"{outcome.tries} | {outcome.struck} | {outcome.equal}"
        rows.append(f"| {name} | {counts} | {sum(lost) / len(lost):.1f}, {max(lost)} |")
    sums = [sum(getattr(outcome, what) for outcome in outcomes.values()) for what in ("tries", "struck", "equal")]
    rows.append(f"| all {len(outcomes)} kinds | {' | '.join(map(str, sums))} | |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="tries of every kind (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="tries at once (default: 1)")
    parser.add_argument(
        "--only",
        default="",
        help="kinds whose name has one of these texts: A,B,C (default: all)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = [kind for kind in FAULTS if any(text in kind for text in arguments.only.split(","))]
        outcomes = try_faults(
            kinds, arguments.rounds, draw_scenes(folder), folder, seed=arguments.seed, jobs=arguments.jobs
        )
    print(table(outcomes))
    print(f"\nRuns of {STEPS} steps, saved every {SAVES_EVERY}, evaluated every {EVALUATES_EVERY}.")
    for kind, outcome in outcomes.items():
        for text in outcome.wrong:
            print(f"\n{kind}:\n{text}")


if __name__ == "__main__":
    main()
