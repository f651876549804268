"""Prepared data is pushed to a Hub on loopback by the real client, loaded from there, and trained on from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amltrain.commands.prepare import main as prepare
from amltrain.errors import UserError
from amltrain.hub import push_data as module
from amltrain.hub.push_data import push_data
from tests.data.layouts import LAYOUTS
from tests.hub.test_push import server as server  # the fixture
from tests.hub_server import HubServer, running_hub

REPO = "alice/pictures"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own data in three splits, beside files that must not be published."""
    root = tmp_path_factory.mktemp("push")
    LAYOUTS["refsegrs"](root)
    rows = []
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        rows.append({"image": f"{number}.tif", "sentence": f"road {number}", "mask": f"../masks/{number}.tif"})
        rows[-1] |= {"split": split, "mask": f"{number}.tif"}
    (root / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = root / "RefSegRS"
    options = ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--output", str(root / "out")]
    prepare(["--table", str(root / "my.jsonl"), "--name", "mine", *options])
    (root / "out/source").mkdir()
    (root / "out/source/secret.txt").write_text("secret")
    return root / "out"


def test_what_is_pushed_and_resumed(prepared: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMIT_BYTES", 1)  # a commit for every shard
    commits = 0

    def third_commit_fails(request: str) -> bool:
        nonlocal commits
        commits += "/commit/" in request
        return commits == 3

    server.failing = third_commit_fails
    with pytest.raises(UserError, match=f"could not push to {REPO}: .*; rerun to resume"):
        push_data(prepared, REPO, private=True)
    assert len(server.files(REPO)) == 2  # two of three shards
    server.failing = lambda request: False
    said: list[str] = []
    address = push_data(prepared, REPO, private=True, log=said.append)
    assert said[0] == "2 of 3 shards are on the Hub already" and len(said) == 2
    assert address == f"{server.url}/datasets/{REPO}"
    shards = {f"mine/{split}-00000-of-00001.parquet" for split in ("train", "val", "test")}
    assert set(server.files(REPO)) == {"README.md", "mine/manifest.json", "mine/rows.jpg", *shards}
    assert f'load_dataset("{REPO}", "mine", split="train")' in server.files(REPO)["README.md"].decode()


def test_nothing_private_is_in_it(prepared: Path) -> None:
    for name in ("README.md", "mine/manifest.json"):
        assert str(prepared.parent) not in (prepared / name).read_text()


def test_what_cannot_be_pushed(prepared: Path, server: HubServer, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    shard = tmp_path / "copy/mine/val-00000-of-00001.parquet"
    for change, message in (
        (lambda: shard.write_bytes(shard.read_bytes()[:-1] + b"x"), "is damaged .it has changed since it was written"),
        (shard.unlink, "has no val-00000-of-00001.parquet, which its manifest lists"),
        (lambda: shutil.rmtree(tmp_path / "copy/mine"), "copy holds nothing prepared"),
    ):
        change()
        with pytest.raises(UserError, match=message):
            push_data(tmp_path / "copy", REPO, private=True)
    with pytest.raises(UserError, match="has no data set 'other'; it has mine"):
        push_data(prepared, REPO, private=True, names=["other"])
    assert REPO not in server.repos


SCRIPT = """
import sys
from amltrain.commands import evaluate, push_data, train
folder, output, repository = sys.argv[1:]
push_data.main([folder, "alice/pictures"])
from datasets import load_dataset
found = load_dataset("alice/pictures", "mine")
print("loaded", sorted(found), found["val"][0]["image"].size)
for streaming in ("false", "true"):
    train.main([
        "--config", repository + "/configs/recipes/refer_mini.yaml", "--data.datasets", "[mine]",
        "--data.prepared", "alice/pictures", "--data.refer_root", "null", "--data.streaming", streaming,
        "--data.workers", "0", "--output", output + streaming, "--train.max_steps", "2",
        "--train.global_batch_size", "1", "--evaluation.splits", "[val]", "--evaluation.every_steps", "null",
        "--preprocess.size", "64", "--evaluation.best_metric", "mIoU", "--tracking.trackers", "[]",
        "--checkpoint.every_steps", "2",
    ])
"""


@pytest.mark.slow
def test_trained_on_from_the_hub_mapped_and_streamed(prepared: Path, tmp_path: Path, repository: Path) -> None:
    with running_hub() as running:
        environment = {"HF_ENDPOINT": running.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(prepared), str(tmp_path / "run-"), str(repository)],
            env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loaded ['test', 'train', 'val'] (40, 30)" in done.stdout
    logs = [json.loads((tmp_path / f"run-{kind}/results.json").read_text()) for kind in ("false", "true")]
    scores = [log["results"][0]["metrics_percent"] for log in logs]
    assert scores[0] == scores[1] and logs[0]["results"][0]["dataset"] == "mine"
