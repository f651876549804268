"""What the image is made of agrees with the project: its lock, the files it copies, what compose starts."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from amltrain.commands.train import read_run

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")


def test_the_lock_holds_every_requirement_in_its_range(repository: Path) -> None:
    lines = (repository / "docker" / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in locked.items()}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_what_is_copied_is_there(repository: Path) -> None:
    text = (repository / "docker" / "Dockerfile").read_text()
    sources = re.findall(r"^COPY (?:--\S+ )*(\S+) \S+$", text, re.MULTILINE)
    assert sources == ["docker/requirements.lock", "."]
    assert all((repository / source).exists() for source in sources)
    assert "USER root" not in text and re.search(r"^USER ", text, re.MULTILINE)


def test_the_command_that_compose_names_is_a_run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "docker" / "compose.yaml").read_text()
    service = yaml.safe_load(text)["services"]["train"]
    assert (repository / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    usage = " ".join(line.lstrip("# ").rstrip("\\") for line in text.splitlines()[1:3])
    arguments = shlex.split(usage)
    assert (repository / arguments[arguments.index("--config_file") + 1]).is_file()
    monkeypatch.chdir(repository)
    read_run(arguments[arguments.index("launch/train.py") + 1 :])
