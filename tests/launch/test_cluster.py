"""What Kubernetes and SkyPilot start on a node: its share of the run, signals passed on, and how it ends."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from tests.launch.test_slurm import PROGRAMS, pytestmark, write_programs

__all__ = ["pytestmark"]
OURS = {"accelerate": PROGRAMS["accelerate"].replace("$SLURM_NODEID", "$NODE_RANK"), "nvidia-smi": "seq 4"}


class Node:
    """One node's `launch/cluster.sh`, or a command that calls it, running."""

    def __init__(self, repository: Path, folder: Path, command: list[str], **environment: str) -> None:
        self.folder, self.output = folder, folder / "run"
        self.output.mkdir(exist_ok=True)
        write_programs(folder / "bin", OURS)
        path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder), "OUTPUT": str(self.output)}
        self.process = subprocess.Popen(
            command,
            cwd=repository,
            env={**os.environ, **path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + 60
        while not list(self.folder.glob("training.*")):
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def end(self, code: int) -> None:
        (self.folder / "aside").write_text(str(code))
        (self.folder / "aside").rename(self.folder / "end")

    def finish(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def launched(self) -> Any:
        [line] = (self.folder / "accelerate").read_text().splitlines()
        return launch_command_parser().parse_args(line.split()[1:])


def cluster(repository: Path, folder: Path, *flags: str, **environment: str) -> Node:
    recipe = ["bash", "launch/cluster.sh", "recipes/paper/refcoco_aml", f"--output={folder / 'run'}"]
    return Node(repository, folder, [*recipe, *flags], **{"NODE_RANK": "0"} | environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 4, 0, "127.0.0.1", 29400, "ddp")),
        (
            {"NODES": "2", "NODE_RANK": "1", "HEAD": "first", "PORT": "1234", "GPUS": "8"},
            (2, 16, 1, "first", 1234, "multi_node"),
        ),
        ({"ENGINE": "configs/accelerate/fsdp2.yaml"}, (1, 4, 0, "127.0.0.1", 29400, "fsdp2")),
    ],
)
def test_a_node_launches_its_share(
    environment: dict[str, str], expected: tuple[Any, ...], repository: Path, tmp_path: Path
) -> None:
    node = cluster(repository, tmp_path, "--seed", "3", **environment)
    node.wait_until_it_trains()
    node.end(0)
    code, said = node.finish()
    assert code == 0, said
    args = node.launched()
    engine = Path(args.config_file)
    assert (repository / engine).is_file()
    found = (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip, args.main_process_port)
    assert (*found, engine.stem) == expected
    assert args.training_script_args == [
        "--config", "recipes/paper/refcoco_aml", f"--output={tmp_path / 'run'}", "--seed", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_node_that_is_drained_saves_and_ends_with_75(number: int, repository: Path, tmp_path: Path) -> None:
    node = cluster(repository, tmp_path)
    node.wait_until_it_trains()
    node.process.send_signal(number)
    code, said = node.finish()
    assert code == 75 and "node 0: asking the training processes to save and stop" in said


def test_a_run_that_failed_ends_with_its_own_code(repository: Path, tmp_path: Path) -> None:
    """Not with 75, though an earlier start had asked for another one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").touch()
    node = cluster(repository, tmp_path)
    node.wait_until_it_trains()
    node.end(2)
    assert node.finish()[0] == 1


def test_wrong_flags_reach_no_card(repository: Path, tmp_path: Path) -> None:
    for flags, message in ((["--train.epoch", "3"], "train.epochs"), (["--train.epochs", "many"], "does not fit")):
        node = cluster(repository, tmp_path, *flags)
        code, said = node.finish()
        assert code == 2 and message in said
    assert not (tmp_path / "accelerate").exists()


def test_the_job_set_of_kubernetes(repository: Path, tmp_path: Path) -> None:
    """Its command runs with its variables, its nodes agree, and its policies know the codes of a run."""
    jobs = yaml.safe_load((repository / "launch/kubernetes/train.yaml").read_text())
    [job] = jobs["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(variables["NODES"])
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    assert variables["HEAD"] == f"{jobs['metadata']['name']}-{job['name']}-0-0.{jobs['metadata']['name']}"
    assert "job-completion-index" in str(container["env"][2]) and container["env"][2]["name"] == "NODE_RANK"
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2] and rule["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    command = [word.replace("/runs/refcoco_aml", str(tmp_path / "run")) for word in container["command"]]
    node = Node(repository, tmp_path, command, NODES="2", NODE_RANK="1", HEAD=variables["HEAD"], GPUS="8")
    node.wait_until_it_trains()
    node.end(0)
    assert node.finish()[0] == 0
    assert node.launched().num_processes == 16 and node.launched().main_process_ip == "amltrain-node-0-0.amltrain"


def test_the_task_of_skypilot(repository: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((repository / "launch/skypilot/train.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    (tmp_path / "activate").touch()
    run = task["run"].replace(".venv/bin/activate", str(tmp_path / "activate")).replace("/runs/", f"{tmp_path}/run/")
    variables = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **task["envs"],
    }  # fmt: skip
    node = Node(repository, tmp_path, ["bash", "-ec", run], **variables)
    node.wait_until_it_trains()
    node.end(0)
    code, said = node.finish()
    assert code == 0, said
    args = node.launched()
    assert (args.num_machines, args.num_processes, args.main_process_ip) == (2, 16, "10.0.0.1")
    assert f"{tmp_path}/run/refcoco_aml" in args.training_script_args
