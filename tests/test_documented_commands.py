"""Every command that README and docs show is one that today's programs take."""

import importlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from amltrain.cli import COMMANDS, RENAMED, split_command
from amltrain.commands.finetune import read as read_finetune
from amltrain.commands.train import read_run, take_job_options
from amltrain.config.schema import RunConfig
from amltrain.distributed import plan_batches
from amltrain.training.launcher import take_launch_options
from benchmarks.command import choose_benchmark

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "docker/README.md", "launch/slurm/train.sbatch"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs/recipes").rglob("*.yaml"))]
PARSERS: dict[str, Callable[[list[str]], object]] = {
    name: importlib.import_module(module).build_parser().parse_args for name, (module, _) in COMMANDS.items()
} | {"benchmark": lambda arguments: None}
PARSERS["train"] = read_run
PARSERS["finetune"] = read_finetune
SCRIPTS = {"prepare_data": "data prepare", "convert_checkpoint": "convert"}
STAND_INS = {
    "configs/models/NAME.yaml": "configs/models/lavt_tiny.yaml",
    "configs/models/my_model_tiny.yaml": "configs/models/lavt_tiny.yaml",
    "runs/photos/finetune.yaml": "configs/quickstart.yaml",
    "RECIPE.yaml": "recipes/paper/refcoco_aml",
    "SEED": "1",
}


def commands(page: str) -> Iterator[str]:
    """The lines of code on a page, or in a file's head, that start one of our programs; continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        code = re.match(r"(?:#? {3,})?((?:[A-Z_]+=\S+ +)*(?:python|accelerate|torchrun|sbatch|amltrain) .*)", line)
        if code and re.search(r"launch/\w+\.py|launch/slurm/|amltrain (?!COMMAND)[\w-]+( |$)", code[1]):
            yield code[1]


SHOWN = [(page, command) for page in PAGES for command in commands(page) if "--import" not in command]
"""tests/docs/test_doors.py runs those with --import, which need the files of their pages."""


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_is_taken(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [STAND_INS.get(word, word) for word in shlex.split(command, comments=True) if word != "…"]
    program = next(i for i, word in enumerate(words) if word == "amltrain" or word.startswith("launch/"))
    if words[program] == "amltrain":
        name, arguments = split_command(words[program + 1 :])
        assert name in COMMANDS and words[program + 1] not in RENAMED
    else:
        assert os.path.isfile(words[program])
        script = Path(words[program]).stem
        name, arguments = SCRIPTS.get(script, script), words[program + 1 :]
    if "sbatch" in words:
        assert arguments and not arguments[0].startswith("-")
        arguments = ["--config", *arguments]
    if {"--help", "--print_config"} & set(arguments):
        return
    parse = PARSERS[name]
    if name == "benchmark":
        module, arguments = choose_benchmark(arguments)
        parse = importlib.import_module(module).build_parser().parse_args
    processes = None
    if name == "train":
        arguments, processes, _ = take_launch_options(take_job_options(arguments)[0])
    parsed = parse(arguments)
    if isinstance(parsed, RunConfig):
        can_be_launched(parsed, " ".join(words[:program]), processes)


def can_be_launched(run: RunConfig, launcher: str, processes: int | None) -> None:
    """The processes that a launcher starts can share the batch, and its engine has the run's precision."""
    engine = re.search(r"(?:ENGINE=|--config_file )(\S+)", launcher)
    settings = yaml.safe_load((ROOT / engine[1]).read_text()) if engine else {}
    count, nodes = re.search(r"--num_processes (\d+)", launcher), re.search(r"--nodes=(\d+)", launcher)
    if "sbatch" in launcher:
        processes = 8 * int(nodes[1] if nodes else 1)  # train.sbatch asks for 8 GPUs a node
    elif processes is None:
        processes = int(count[1]) if count else settings.get("num_processes", 1)
    plan_batches(run.train, processes)
    assert settings.get("distributed_type") != "DEEPSPEED" or run.train.mixed_precision != "fp16"


def test_they_are_found() -> None:
    assert {page for page, _ in SHOWN} >= {"README.md", "docs/data.md", "docs/aml.md", "docs/evaluation.md"}
    assert len([command for _, command in SHOWN if "sbatch" in command]) > 5
    assert len(SHOWN) > 20
