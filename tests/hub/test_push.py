"""Pushed by the real client to a server that speaks the Hub's endpoints on loopback, pulled from it, and used."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import amltrain
from amltrain import network
from amltrain import run_folder as checkpoints
from amltrain.commands import push
from amltrain.errors import UserError
from amltrain.evaluation.results import read_results
from amltrain.hub import push as hub
from amltrain.hub.model_folder import load_pretrained
from amltrain.hub.push import Publisher, push_model
from amltrain.inference.predictor import Predictor
from tests.hub_server import HubServer, running_hub
from tests.training import runs

REPO, SENTENCE = "alice/caris-shapes", "the red circle"
SHORT = (
    *("--train.max_steps", "4", "--evaluation.every_steps", "2", "--checkpoint.every_steps", "2"),
    *("--evaluation.protocol.threshold", "0.35"),  # such a short training reaches no 0.5
)


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    runs.run(shapes, output, *SHORT)
    return output


@contextmanager
def hub_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process's client talks to, logged in as alice."""
    with running_hub() as running:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield running


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_of(monkeypatch, tmp_path) as running:
        yield running


def test_pushed_and_pulled_by_the_command_lines(trained: Path, tmp_path: Path) -> None:
    """In a process of its own, whose environment names the Hub as a user's would."""
    picture = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(picture)
    script = (
        "from amltrain.commands import predict, push\n"
        f"push.main([{str(trained / 'best')!r}, {REPO!r}, '--private'])\n"
        f"predict.main(['--checkpoint', {REPO + '@main'!r}, '--image', {str(picture)!r}, '--sentence', {SENTENCE!r},\n"
        f"  '--output', {str(tmp_path / 'found')!r}])\n"
    )
    with running_hub() as running:
        environment = {"HF_ENDPOINT": running.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"pushed to {running.url}/{REPO}/commit/" in done.stdout
        assert running.repos[REPO].private
        assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json", "results.json"} < set(
            running.files(REPO)
        )
    [mask] = (tmp_path / "found" / "masks").glob("*circle.png")
    [local] = Predictor.from_pretrained(trained / "best")(Image.open(picture), SENTENCE)
    assert 0 < local.mask.mean() < 1
    assert np.array_equal(np.asarray(Image.open(mask)) > 0, local.mask)


def test_the_card_says_what_was_scored_and_how(trained: Path, server: HubServer) -> None:
    push_model(trained / "best", REPO, private=False)
    card = ModelCard.load(REPO)
    [results] = read_results(trained / "best" / "model" / "results.json")
    found = {entry.metric_type: entry for entry in card.data.eval_results}
    assert {name: entry.metric_value for name, entry in found.items()} == {
        name: round(value, 2) for name, value in results.metrics.items()
    }
    entry = found["oIoU"]
    assert (entry.dataset_type, entry.dataset_split) == ("refshapes", "val")
    assert entry.dataset_args == {"protocol": results.protocol, "counts": results.counts}
    assert card.data.license == "mit"
    for said in (
        f'from_pretrained("{REPO}")',
        "hardware: ",
        "- commit: ",
        "- seed: 0",
        "- optimizer: adamw, lr ",
        "- length: ",
        "versions: ",
        "caris_tiny",
    ):
        assert said in card.text
    assert str(trained.parent) not in card.text


def test_the_card_shows_one_prediction_unless_it_should_not(shapes: Path, server: HubServer, tmp_path: Path) -> None:
    runs.run(shapes, tmp_path / "run", *SHORT, "--evaluation.pictures", "3")
    push_model(tmp_path / "run" / "best", REPO, private=False)
    files = server.files(REPO)
    step = checkpoints.step_of(tmp_path / "run" / "best")
    drawn = tmp_path / "run" / "pictures" / "examples" / f"step-{step:06d}-val.png"
    assert files["example.png"] == drawn.read_bytes() and len(files["example.png"]) < 300_000
    card = files["README.md"].decode()
    assert "![Sentence, truth and prediction](example.png)" in card
    assert "the 3 predictions drawn of refshapes val" in card
    assert "example.png" in push_model(tmp_path / "run" / "best", REPO, private=False, dry_run=True)
    waiting = tmp_path / "run" / f".step-{step:06d}.abc.pushing"  # as a run's publisher keeps it
    shutil.copytree(tmp_path / "run" / "best" / "model", waiting)
    assert hub.find_example(waiting) == drawn
    push_model(tmp_path / "run" / "best", REPO, private=False, picture=False)
    assert "example.png" not in server.files(REPO)
    assert "example.png" not in server.files(REPO)["README.md"].decode()


def test_a_run_that_scored_a_part_on_its_way_shows_its_last_scores(
    shapes: Path, server: HubServer, tmp_path: Path
) -> None:
    """As `finetune` does."""
    run = tmp_path / "run"
    runs.run(shapes, run, *SHORT, "--evaluation.max_samples", "8")
    push_model(run / "best", REPO, private=False)
    assert "Not evaluated" in server.files(REPO)["README.md"].decode()
    data = {"datasets": ["refshapes"], "prepared": str(shapes), "workers": 0}
    [result] = amltrain.evaluate(run / "best", data=data, splits=["val"], output=str(run / "evaluation"), pictures=0)
    push_model(run / "best", REPO, private=False)
    card = server.files(REPO)["README.md"].decode()
    assert f"{result.metrics['mIoU']:.2f}" in card and "Not evaluated" not in card
    push_model(run / "last", REPO, private=False)  # other weights, unless the last step was the best
    same = checkpoints.step_of(run / "last") == checkpoints.step_of(run / "best")
    assert ("Not evaluated" in server.files(REPO)["README.md"].decode()) != same


def test_a_model_that_nobody_scored(trained: Path, server: HubServer, tmp_path: Path) -> None:
    """As a converted checkpoint; the scores of what was there before do not stay."""
    push_model(trained / "best", REPO, private=False)
    converted = tmp_path / "converted"
    shutil.copytree(trained / "best" / "model", converted)
    for name in ("results.json", "training.json"):
        (converted / name).unlink()
    push_model(converted, REPO, private=False)
    assert {"results.json", "training.json"}.isdisjoint(server.files(REPO))
    assert "Not evaluated" in server.files(REPO)["README.md"].decode()
    assert sum(request.startswith("PUT") for request in server.requests) == 1  # the weights were there already


def test_a_branch(trained: Path, server: HubServer) -> None:
    push_model(trained / "best", REPO, private=False, revision="step-4")
    assert server.files(REPO) == {} and server.files(REPO, "step-4")


def test_a_push_that_is_cut_off_leaves_nothing(trained: Path, server: HubServer) -> None:
    server.failing = lambda request: "/commit/" in request
    with pytest.raises(UserError, match="the Hub answered 500"):
        push_model(trained / "best", REPO, private=False)
    assert server.objects and server.files(REPO) == {}


@pytest.mark.parametrize("fault", ["answers 500", "rejects connections"])
def test_training_goes_on_without_the_hub(
    fault: str,
    shapes: Path,
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The Hub is away while the run trains, and back when it ends."""
    if fault == "answers 500":
        server.failing = lambda request: True
    else:
        server.stop()

    def back_at_the_end(publisher: Publisher, *arguments: str) -> None:
        for thread in threading.enumerate():
            if thread.name == "hub":
                thread.join()
        if fault == "answers 500":
            server.failing = lambda request: False
        else:
            server.start()
        finish(publisher, *arguments)

    finish = Publisher.finish
    monkeypatch.setattr(Publisher, "finish", back_at_the_end)
    output = tmp_path / "run"
    runs.run(shapes, output, *SHORT, "--hub.push", "last", "--hub.repo", REPO)
    said = capsys.readouterr().out
    warnings = [line for line in said.splitlines() if line.startswith("WARNING: step-")]
    assert warnings and all("was not pushed to the Hub" in line for line in warnings), said
    assert "step-000004 is on the Hub" in said
    weights = (output / "last" / "model" / "model.safetensors").read_bytes()
    assert server.files(REPO)["model.safetensors"] == weights
    assert server.repos[REPO].private
    assert not list(output.glob(".step-*"))


def test_a_hub_that_stays_away_is_named_at_the_end(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def away(folder: Path) -> str:
        tries.append(folder)
        raise UserError("the Hub answered 500; try again later")

    monkeypatch.setattr(hub, "PAUSES", (0.0, 0.0))
    tries: list[Path] = []
    said: list[str] = []
    Publisher(away, said.append).finish(trained / "last", "push it later")
    assert len(tries) == 2
    assert said[-1] == "WARNING: step-000004 is NOT on the Hub; push it later"


def test_training_does_not_wait_and_old_checkpoints_may_go(tmp_path: Path) -> None:
    """While a push is under way only the newest checkpoint waits, and removing it does not pull it away."""

    def slow(folder: Path) -> str:
        started.set()
        assert release.wait(30)
        pushed.append((folder / "weights").read_text())
        return "address"

    started, release = threading.Event(), threading.Event()
    pushed: list[str] = []
    said: list[str] = []
    publisher = Publisher(slow, said.append)
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"step-{step:06d}"
        (checkpoint / "model").mkdir(parents=True)
        (checkpoint / "model" / "weights").write_text(str(step))
        before = time.monotonic()
        publisher.submit(checkpoint)
        assert time.monotonic() - before < 5
        assert started.wait(30)
        if step != 3:
            shutil.rmtree(checkpoint)
    release.set()
    publisher.finish(tmp_path / "step-000003", "")
    assert pushed == ["1", "3"]
    shutil.rmtree(checkpoint / "model")
    (checkpoint / "model").mkdir()
    (checkpoint / "model" / "weights").write_text("3 with its scores")
    publisher.finish(checkpoint, "")
    assert pushed == ["1", "3", "3 with its scores"]
    assert said[-1] == "step-000003 is on the Hub"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize(
    ("change", "repo", "named"),
    [
        ("wrong token", REPO, "the Hub does not know the token"),
        ("no token", REPO, "there is no Hub token"),
        ("off-line", REPO, "HF_HUB_OFFLINE is set"),
        ("another's", "bob/caris", "the token may not write to bob/caris"),
        ("nobody's", "caris", "write user/caris"),
        ("malformed", "alice/-caris", "cannot name a Hub repository"),
        ("no folder", REPO, "does not exist"),
        ("truncated weights", REPO, "is not the model that was saved: model/model.safetensors has"),
    ],
)
def test_one_line_says_what_is_wrong(
    change: str,
    repo: str,
    named: str,
    trained: Path,
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained / "best"
    if change == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_mallory")
    elif change == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif change == "off-line":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif change == "no folder":
        folder = tmp_path / "nowhere"
    elif change == "truncated weights":
        folder = tmp_path / "step-000004"
        shutil.copytree(trained / "best", folder)
        with (folder / "model" / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(SystemExit) as stopped:
        push.main([str(folder), repo])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert said.startswith("error: ") and named in said and "\n" not in said
    assert not server.repos.get(repo)


STATUS = {
    401: ("the Hub does not know the token", "there is no alice/caris-shapes, or it is private"),
    403: ("the token may not write to alice/caris-shapes", "the token may not read alice/caris-shapes"),
    404: ("there is no alice/caris-shapes, or one of its files is gone",) * 2,
    429: ("the Hub asks to slow down (429); try again in 7 s",) * 2,
    500: ("the Hub answered 500; try again later",) * 2,
    502: ("the Hub answered 502; try again later",) * 2,
    503: ("the Hub answered 503; try again later",) * 2,
    504: ("the Hub answered 504; try again later",) * 2,
}
WRITES = {"create": "repos/create", "preupload": "/preupload/", "lfs": "objects/batch", "commit": "/commit/"}
READS = {"info": "/revision/", "file": "/resolve/", "weights": "/storage/"}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between its tries; its limits of silence are short here."""
    monkeypatch.setattr("time.sleep", lambda seconds, sound=time.sleep: sound(min(seconds, 0.05)))
    monkeypatch.setattr(network, "SILENCE", 1.0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)


@pytest.mark.parametrize("place", WRITES)
@pytest.mark.parametrize("status", STATUS)
def test_every_answer_to_a_push_says_what_to_do(trained: Path, server: HubServer, status: int, place: str) -> None:
    server.failing = lambda request: status if WRITES[place] in request else False
    with pytest.raises(UserError) as caught:
        push_model(trained / "best", REPO, private=False)
    assert f"could not push to {REPO}: {STATUS[status][0]}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", READS)
@pytest.mark.parametrize("status", STATUS)
def test_every_answer_to_a_download_says_what_to_do(trained: Path, server: HubServer, status: int, place: str) -> None:
    push_model(trained / "best", REPO, private=False)
    server.failing = lambda request: status if READS[place] in request else False
    with pytest.raises(UserError) as caught:
        load_pretrained(REPO)
    assert STATUS[status][1] in str(caught.value) or "out of reach" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("place", [*WRITES, *READS])
@pytest.mark.parametrize("how", ["silent", "cut"])
def test_a_hub_that_is_silent_or_hangs_up_is_left(trained: Path, server: HubServer, how: str, place: str) -> None:
    before = time.monotonic()
    if place in READS:
        push_model(trained / "best", REPO, private=False)
    server.failing = lambda request: how if (WRITES | READS)[place] in request else False
    action = (
        partial(load_pretrained, REPO) if place in READS else partial(push_model, trained / "best", REPO, private=False)
    )
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - before < 120  # the client asks for every file, and tries again


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_bit_that_flips_on_the_way_is_found(trained: Path, server: HubServer, name: str) -> None:
    push_model(trained / "best", REPO, private=False)
    large = name.endswith("safetensors")
    server.failing = lambda request: (
        "flip"
        if ("/storage/" if large else "/resolve/") in request
        and (large or request.endswith(name))
        and not request.startswith("HEAD")
        else False
    )
    with pytest.raises(UserError, match=r"is not the file that the Hub named|consistency|hash"):
        load_pretrained(REPO)


def test_a_pushed_model_has_a_manifest_that_its_download_is_checked_against(trained: Path, server: HubServer) -> None:
    push_model(trained / "best", REPO, private=False)
    listed = json.loads(server.files(REPO)["manifest.json"])["files"]
    assert listed["model.safetensors"]["sha256"] == checkpoints.saved_weights(trained / "best")
    assert load_pretrained(REPO).identity.weights == listed["model.safetensors"]["sha256"]
    commit = server.repos[REPO].branches["main"][-1]
    commit[2]["config.json"] += b" "  # changed on the Hub, and not by a push
    server.repos[REPO].commit("main", "edited", dict(commit[2]))
    with pytest.raises(UserError, match=r"config.json has \d+ bytes instead of"):
        load_pretrained(REPO)


def test_a_push_that_hangs_is_ended_and_holds_nobody(
    trained: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.failing = lambda request: "silent"
    monkeypatch.setattr(hub, "LONGEST_WAIT", 3.0)
    said: list[str] = []
    process = hub.PushProcess(REPO, private=True)
    publisher = Publisher(process, said.append, process.stop)
    before = time.monotonic()
    publisher.submit(trained / "last")
    publisher.finish(trained / "last", "push it later")
    assert time.monotonic() - before < 10
    assert said[-1] == "WARNING: step-000004 is NOT on the Hub; push it later"
    assert process._running is not None and process._running.wait(10) is not None


@pytest.mark.parametrize("command", ["push", "push_data"])
def test_a_repository_is_private_unless_it_is_public(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = importlib.import_module(f"amltrain.commands.{command}").build_parser()
    assert [parser.parse_args(["x", "u/y", *flag]).public for flag in ([], ["--private"], ["--public"])] == [0, 0, 1]
    with pytest.raises(SystemExit):
        parser.parse_args(["x", "u/y", "--public", "--private"])
    assert "not allowed with argument --public" in capsys.readouterr().err
