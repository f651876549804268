"""The job script under a Slurm of small programs: what it starts, on which nodes, and when it is queued again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("pkill")), reason="needs bash and pkill")

PROGRAMS = {
    "scontrol": """
        echo "$@" >> "$LOG/scontrol"
        if [[ $1 == show ]]; then printf 'node%s\\n' 1 2 3 4; fi
    """,
    # a task on every node; the job's signals are sent to these tasks, not to what they start
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
          SLURM_NODEID=$node "$@" &
          tasks+=($!)
        done
        status=0
        for task in "${tasks[@]}"; do
          echo "$task" >> "$LOG/tasks"
        done
        for task in "${tasks[@]}"; do wait "$task" || status=$?; done
        exit $status
    """,
    # as torchrun: does not know SIGUSR1, and turns every exit code of a training process into 1
    "accelerate": """
        echo "$@" >> "$LOG/accelerate"
        bash -c '
          trap "touch $OUTPUT/requeue; exit 75" USR1
          touch "$LOG/training.$SLURM_NODEID"
          while [[ ! -e $LOG/end ]]; do sleep 0.02; done
          exit "$(cat "$LOG/end")"
        ' launch/train.py || exit 1
    """,
}


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    """Small programs in bash, and the tests' own Python."""
    folder.mkdir(exist_ok=True)
    for name, text in {**programs, "python": f'exec "{sys.executable}" "$@"'}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)


class Job:
    """`sbatch --nodes=NODES train.sbatch recipe.yaml ARGUMENTS`, running."""

    def __init__(self, repository: Path, folder: Path, *arguments: str, nodes: int = 1) -> None:
        self.folder, self.nodes, self.output = folder, nodes, folder / "run"
        self.output.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(f"base: [models/caris_tiny]\noutput: {self.output}\n")
        write_programs(folder / "bin", PROGRAMS)
        environment = {
            **os.environ,
            **{"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder), "OUTPUT": str(self.output)},
            **{"SLURM_JOB_ID": "41234567", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_JOB_NUM_NODES": str(nodes)},
            "SLURM_GPUS_PER_NODE": "a100:8",
        }
        script = repository / "launch" / "slurm" / "train.sbatch"
        self.process = subprocess.Popen(
            ["bash", str(script), *(arguments or (str(folder / "recipe.yaml"),))],
            cwd=repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + 60
        while min(len(list(self.folder.glob("training.*"))), len(self.lines("tasks"))) < self.nodes:
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def signal_tasks(self, number: int) -> None:
        for task in self.lines("tasks"):
            os.kill(int(task), number)

    def end(self, code: int = 0) -> None:
        """Let the training processes end with this code."""
        (self.folder / "aside").write_text(str(code))
        (self.folder / "aside").rename(self.folder / "end")

    def finish(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.is_file() else []

    @property
    def requeued(self) -> bool:
        return "requeue 41234567" in self.lines("scontrol")


@pytest.mark.parametrize(("nodes", "engine"), [(1, "ddp"), (4, "multi_node")])
def test_every_node_launches_its_share(nodes: int, engine: str, repository: Path, tmp_path: Path) -> None:
    job = Job(repository, tmp_path, str(tmp_path / "recipe.yaml"), "--seed", "1", nodes=nodes)
    job.wait_until_it_trains()
    job.end()
    code, said = job.finish()
    assert code == 0, said
    assert not job.requeued
    launched = [launch_command_parser().parse_args(line.split()[1:]) for line in job.lines("accelerate")]
    assert sorted(args.machine_rank for args in launched) == list(range(nodes))
    for args in launched:
        assert (args.num_machines, args.num_processes) == (nodes, 8 * nodes)
        assert (args.main_process_ip, args.main_process_port) == ("node1", 34567)
        assert args.config_file == f"configs/accelerate/{engine}.yaml" and (repository / args.config_file).is_file()
        assert args.training_script == "launch/train.py" and (repository / args.training_script).is_file()
        assert args.training_script_args == ["--config", str(tmp_path / "recipe.yaml"), "--seed", "1"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_whose_time_is_up_is_queued_again(number: int, nodes: int, repository: Path, tmp_path: Path) -> None:
    job = Job(repository, tmp_path, nodes=nodes)
    job.wait_until_it_trains()
    job.signal_tasks(number)
    code, said = job.finish()
    assert job.requeued, said
    assert job.lines("scontrol").count("requeue 41234567") == 1
    assert code != 0 and "queueing job 41234567 again" in said


def test_a_job_that_failed_is_not(repository: Path, tmp_path: Path) -> None:
    """Not even if an earlier start of it had asked to be."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").touch()
    job = Job(repository, tmp_path)
    job.wait_until_it_trains()
    job.end(code=2)
    assert job.finish()[0] == 1
    assert not job.requeued


@pytest.mark.parametrize("form", ["--output {}", "--output={}"])
def test_the_output_may_be_an_argument(form: str, repository: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "elsewhere.yaml"
    recipe.write_text("base: [models/caris_tiny]\noutput: somewhere/else\n")
    job = Job(repository, tmp_path, str(recipe), *form.format(tmp_path / "run").split())
    job.wait_until_it_trains()
    job.signal_tasks(signal.SIGUSR1)
    job.finish()
    assert job.requeued


def test_a_shipped_name_is_a_recipe(repository: Path, tmp_path: Path) -> None:
    """As the page writes it: a variant has no file of its own."""
    job = Job(repository, tmp_path, "recipes/paper/refcoco_aml", f"--output={tmp_path / 'run'}")
    job.wait_until_it_trains()
    job.signal_tasks(signal.SIGUSR1)
    job.finish()
    assert job.requeued


def test_what_is_missing_is_said(repository: Path, tmp_path: Path) -> None:
    code, said = Job(repository, tmp_path, "--seed").finish()
    assert code == 2 and said.startswith("usage: sbatch")
    code, said = Job(repository, tmp_path, "recipes/paper/refcocco").finish()
    assert code == 2 and "did you mean recipes/paper/refcoco" in said
    assert not (tmp_path / "accelerate").exists()
