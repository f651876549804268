"""A run that the Hub keeps is resumed on another machine, by the real client from a server on loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file

from amltrain.commands import push, train
from amltrain.errors import UserError
from amltrain.hub.push import push_model
from amltrain.hub.run_state import fetch_run
from amltrain.run_folder import is_repository, read_log
from tests.hub.test_push import hub_of
from tests.hub_server import HubServer
from tests.training import runs

REPO = "alice/run"
SHORT = ("--train.max_steps", "6", "--evaluation.every_steps", "2", "--checkpoint.every_steps", "2")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_of(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    runs.run(shapes, output, *SHORT)
    return output


@pytest.fixture(scope="module")
def half(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as it was after four steps."""
    output = tmp_path_factory.mktemp("half") / "run"
    shutil.copytree(whole, output, symlinks=True)
    shutil.rmtree(output / "step-000006")
    (output / "last").unlink()
    (output / "last").symlink_to("step-000004")
    (output / "finished").unlink()
    return output


def weights_equal(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "last" / "model" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def test_a_run_goes_on_elsewhere_bit_for_bit(
    half: Path, whole: Path, shapes: Path, server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push.main([str(half), REPO, "--state"])
    files = server.files(REPO)
    assert server.repos[REPO].private
    assert json.loads(files["training/run.json"])["last"] == "step-000004"
    assert {"model.safetensors", "training/step-000004/state/trainer.json", "training/config.yaml"} < files.keys()
    output = tmp_path / "elsewhere"
    runs.run(shapes, output, *SHORT, "--resume", REPO)
    said = capsys.readouterr().out
    assert f"fetching step 4 of the run from {REPO}" in said and "at step 4" in said
    assert weights_equal(output, whole)
    assert [row["step"] for row in read_log(output)] == [row["step"] for row in read_log(whole)]
    assert (output / "best").resolve().name == (whole / "best").resolve().name
    assert not (output / ".from-hub").exists()

    runs.run(shapes, output, *SHORT, "--resume", REPO)  # the same command again: here it is further
    assert f"at step 6, and {REPO} at 4: the run goes on from here" in capsys.readouterr().out


def test_a_training_pushes_its_state_and_removes_the_old_one(shapes: Path, server: HubServer, tmp_path: Path) -> None:
    output = tmp_path / "run"
    runs.run(shapes, output, *SHORT, "--hub.push", "state", "--hub.repo", REPO)
    names = json.loads(server.files(REPO)["training/run.json"])
    assert names["last"] == "step-000006"
    kept = {name.split("/")[1] for name in server.files(REPO) if name.startswith("training/step-")}
    assert kept == set(names.values())
    last = (output / "last" / "model" / "model.safetensors").read_bytes()
    assert server.files(REPO)["model.safetensors"] == last
    assert not list(output.glob(".step-*"))
    fetch_run(REPO, fresh(tmp_path), print)
    assert weights_equal(tmp_path / "fresh", output)


def test_the_same_command_goes_on_on_another_machine(
    half: Path, whole: Path, shapes: Path, server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `hub.push state` nobody has to name the run; without an answer it is not begun anew."""
    push_model(half, REPO, private=True, state=True)
    pushing = ("--hub.push", "state", "--hub.repo", REPO)
    server.failing = lambda request: 500 if "/training/" in request or "revision" in request else False
    with pytest.raises(UserError, match="the run may be there: try again"):
        fetch_run(REPO, fresh(tmp_path), print, may_be_new=True)
    server.failing = lambda request: False
    runs.run(shapes, tmp_path / "fresh", *SHORT, *pushing)
    assert "fetching step 4" in capsys.readouterr().out
    assert weights_equal(tmp_path / "fresh", whole)
    assert json.loads(server.files(REPO)["training/run.json"])["last"] == "step-000006"


def test_another_run_of_the_same_repository_is_rejected(
    half: Path, shapes: Path, server: HubServer, tmp_path: Path
) -> None:
    push_model(half, REPO, private=True, state=True)
    with pytest.raises(UserError, match=r"made with method aml.*name another --hub\.repo"):
        runs.run(shapes, tmp_path / "new", *SHORT, "--hub.push", "state", "--hub.repo", REPO, "--method", "supervised")
    assert json.loads(server.files(REPO)["training/run.json"])["last"] == "step-000004"


def fresh(tmp_path: Path) -> Path:
    (tmp_path / "fresh").mkdir()
    return tmp_path / "fresh"


def test_its_config_comes_along(half: Path, server: HubServer) -> None:
    push_model(half, REPO, private=True, state=True)
    arguments = train.with_config(["--resume", REPO, "--output", "elsewhere"])
    config = train.read_run(arguments)
    assert (config.train.max_steps, config.output, config.resume) == (6, "elsewhere", REPO)
    assert train.with_config(["--resume", "auto"])[:2] == ["--config", "quickstart"]
    assert train.with_config(["--config", "x", "--resume", REPO])[1] == "x"


def test_a_damaged_state_is_rejected(half: Path, server: HubServer, tmp_path: Path) -> None:
    push_model(half, REPO, private=True, state=True)
    branch = server.repos[REPO].branches["main"]
    oid, message, files = branch[-1]
    name = "training/step-000004/state/trainer.json"
    branch[-1] = (oid, message, {**files, name: files[name].replace(b"4", b"5")})
    with pytest.raises(UserError, match=rf"step-000004 of {REPO} is damaged: state/trainer.json has changed"):
        fetch_run(REPO, fresh(tmp_path), print)
    assert not list((tmp_path / "fresh").glob("step-*"))


@pytest.mark.parametrize("names", [b"[]", b'{"last": "../up"}', b"{", b'{"best": "step-000002"}'])
def test_names_that_lead_elsewhere_are_rejected(names: bytes, half: Path, server: HubServer, tmp_path: Path) -> None:
    push_model(half, REPO, private=True, state=True)
    branch = server.repos[REPO].branches["main"]
    oid, message, files = branch[-1]
    branch[-1] = (oid, message, {**files, "training/run.json": names})
    with pytest.raises(UserError, match="push the run again"):
        fetch_run(REPO, fresh(tmp_path), print)


def test_what_cannot_be_is_said(half: Path, whole: Path, server: HubServer, tmp_path: Path) -> None:
    push_model(half / "last", REPO, private=True)  # the model alone
    with pytest.raises(UserError, match="holds no run to resume"):
        fetch_run(REPO, fresh(tmp_path), print)
    with pytest.raises(UserError, match="nobody/none"):
        fetch_run("nobody/none", tmp_path / "fresh", print)
    with pytest.raises(UserError, match="last does not exist"):
        push_model(tmp_path / "fresh", REPO, private=True, state=True)
    server.repos[REPO].private = False
    with pytest.raises(UserError, match=f"{REPO} is public"):
        push_model(half, REPO, private=True, state=True)
    with pytest.raises(UserError, match=r"hub\.push=state needs a private repository"):
        train.read_run(["--config", "quickstart", "--hub.push", "state", "--hub.repo", REPO, "--hub.private", "false"])


def test_a_run_that_is_here_goes_on_without_the_hub(half: Path, server: HubServer, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(half, here, symlinks=True)
    server.stop()
    said: list[str] = []
    fetch_run(REPO, here, said.append)
    assert len(said) == 1 and said[0].startswith("WARNING") and "goes on from" in said[0]


def test_which_names_are_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "old").mkdir(parents=True)
    assert is_repository("alice/run") and is_repository("alice/run@v1") and is_repository("runs/other")
    for name in ("auto", "never", "runs/old", "runs/old/last", "./a/b", "/a/b", ""):
        assert not is_repository(name), name
    assert huggingface_hub.utils.validate_repo_id("alice/run") is None
