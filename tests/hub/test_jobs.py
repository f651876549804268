"""A training is handed to a Hub on loopback as a job, by the real client; the job's script is then really run."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from amltrain.commands import train
from amltrain.errors import UserError
from amltrain.hub import jobs
from tests.hub.test_push import hub_of
from tests.hub_server import HubServer

REPO = "alice/run"
QUICK = (
    *("--config", "quickstart", "--train.max_steps", "4", "--evaluation.every_steps", "2"),
    *("--checkpoint.every_steps", "2", "--data.shapes.train", "64", "--data.shapes.evaluation", "8"),
    *("--evaluation.max_samples", "4", "--tracking.trackers", "[]", "--hub.repo", REPO),
)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_of(monkeypatch, tmp_path) as running:
        yield running


def test_the_job_is_what_was_asked_for(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*QUICK, "--job", "a100x4", "--job_timeout", "2h"])
    [job] = server.jobs
    assert (job["flavor"], job["timeoutSeconds"], job["dockerImage"]) == ("a100x4", 7200, jobs.IMAGE)
    assert job["secrets"] == {"HF_TOKEN": "hf_alice"}
    assert "hf_alice" not in json.dumps({key: value for key, value in job.items() if key != "secrets"})
    said = capsys.readouterr().out
    assert "started: http" in said and "hf jobs logs job1" in said
    assert server.repos[REPO].private
    files = server.files(REPO)
    with tarfile.open(fileobj=io.BytesIO(files["job/code.tar.gz"])) as archive:
        names = archive.getnames()
    assert files["job/code.tar.gz"] == jobs.packed_code()
    assert {"amltrain/cli.py", "amltrain/report/templates/report.css", "configs/quickstart.yaml"} <= set(names)
    assert not any("__pycache__" in name for name in names)
    Path("config.yaml").write_bytes(files["job/config.yaml"])
    config = train.read_run(["--config", "config.yaml"])
    assert (config.hub.push, config.hub.repo, config.resume, config.output) == ("state", REPO, "auto", jobs.OUTPUT)
    assert config.train.max_steps == 4


@pytest.mark.slow
def test_its_script_trains_and_its_second_attempt_goes_on(server: HubServer, tmp_path: Path) -> None:
    """In an empty folder, with the real `hf`; only the installation is left out. A new machine has no run yet."""
    train.main([*QUICK, "--job", "cpu-basic"])
    [job] = server.jobs
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "pip").write_text('#!/bin/sh\necho pip "$@"\n')
    (tools / "pip").chmod(0o755)
    for attempt, steps in (("first", 4), ("second", 6)):
        machine = tmp_path / attempt
        machine.mkdir()
        script = job["command"][2] + f" --train.max_steps {steps}"
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AMLTRAIN_SHARED")},
            "PATH": os.pathsep.join((str(tools), str(Path(sys.executable).parent), os.environ["PATH"])),
            **{"HF_TOKEN": job["secrets"]["HF_TOKEN"], "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"},
            **{"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(machine / "home"), "ACCELERATE_USE_CPU": "true"},
            "NO_PROXY": "127.0.0.1,localhost",
        }
        done = subprocess.run(["bash", "-c", script], cwd=machine, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        assert json.loads(server.files(REPO)["training/run.json"])["last"] == f"step-{steps:06d}"
        assert ("fetching step 4 of the run" in done.stdout + done.stderr) == (attempt == "second")
        assert (machine / "amltrain" / "cli.py").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--hub.repo", "null"), r"a job keeps its run in a repository"),
        (("--hub.private", "false"), "leave hub.private true"),
        (("--data.datasets", "[refcoco]"), "push the data"),
        (("--model.text_weights", "here.safetensors"), "the job cannot read model.text_weights here.safetensors"),
    ],
)
def test_what_a_job_lacks_is_said(given: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "here.safetensors").touch()
    with pytest.raises(UserError, match=message):
        jobs.job_config(train.read_run([*QUICK, *given]))


def test_data_of_the_hub_are_taken() -> None:
    given = ("--data.datasets", "[refcoco]", "--data.prepared", "alice/refcoco")
    assert jobs.job_config(train.read_run([*QUICK, *given])).data.prepared == "alice/refcoco"


def test_a_hub_that_refuses_is_named(server: HubServer) -> None:
    server.failing = lambda request: 403 if "/jobs/" in request else False
    with pytest.raises(UserError, match="could not start a job: the token may not write to"):
        jobs.start_job(train.read_run(QUICK), "a100-large")
