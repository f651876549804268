"""Values that YAML reads as something else than people mean."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amltrain.commands.train import read_run
from amltrain.config.fields import expand, expand_arguments
from amltrain.errors import UserError


def read(tmp_path: Path, text: str, *arguments: str) -> Any:
    path = tmp_path / "c.yaml"
    path.write_text(f"base: [models/caris_tiny]\n{text}\n")
    found = read_run(["--config", str(path), *arguments])
    found = found[0] if isinstance(found, tuple) else found
    return getattr(found, "config", found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {time_limit: 23:50}",
            r"c.yaml, line 2: train.time_limit: YAML reads 23:50 in base 60, as 1430.*23\.83",
        ),
        ("train: {time_limit: 1:30:00}", "in base 60, as 5400; write one number .hours as 1.50."),
        ("seed: 010", 'c.yaml, line 2: seed: YAML may read 010 as an octal number; write 10, or "010" as a text'),
        ("seed: 08", "octal number; write 8"),
        ("tracking: {name: 001}", 'octal number; write 1, or "001" as a text'),
        ("data: {datasets: [refcoco, 007]}", "data.datasets: YAML may read 007"),
        ("output: $NOT_SET_ANYWHERE/x", "output: .* names the variable NOT_SET_ANYWHERE, which is not set"),
    ],
)
def test_what_would_mean_something_else_is_rejected(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_flag_in_base_60_is_rejected(tmp_path: Path) -> None:
    for flags in (["--train.time_limit", "23:50"], ["--train.time_limit=23:50"]):
        with pytest.raises(UserError, match=r"--train.time_limit: 23:50 would be 1430, in base 60; .*23\.83"):
            read(tmp_path, "seed: 1", *flags)
    for key in ("seed", "evaluation.protocol.threshold"):
        with pytest.raises(UserError, match=f"--{key}: 2:30 would be 150, in base 60"):
            read(tmp_path, "seed: 1", f"--{key}=2:30")
    assert read(tmp_path, "seed: 1", "--tracking.name", "12:30").tracking.name == "12:30"


def test_paths_are_those_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    text = "output: ~/runs/x\ndata: {refer_root: $SCRATCH/refer, prepared: '${SCRATCH}/p'}"
    config = read(tmp_path, text)
    assert config.output == "/home/me/runs/x"
    assert (config.data.refer_root, config.data.prepared) == ("/scratch/me/refer", "/scratch/me/p")
    assert read(tmp_path, "seed: 1", "--output=~/y").output == "/home/me/y"
    assert expand("a ~/b", "x") == "a ~/b" and expand("costs $5", "x") == "costs $5" and expand("~", "x") == "~"
    assert expand_arguments(["--a=~/b", "--c", "~/d", "~/e=f"]) == ["--a=/home/me/b", "--c", "~/d", "~/e=f"]


def test_words_are_words_where_a_key_takes_them(tmp_path: Path) -> None:
    config = read(tmp_path, "train: {mixed_precision: no, compile: yes, tf32: off}\ntracking: {name: 'on'}")
    assert config.train.mixed_precision == "no"
    assert (config.train.compile, config.train.tf32, config.tracking.name) == (True, False, "on")
    assert read(tmp_path, "tracking: {name: '001'}").tracking.name == "001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: null", "c.yaml, line 2: seed must be int, not null"),
        ("optim: {lr: null}", "c.yaml, line 2: optim.lr must be float, not null"),
        ("data: {workers: ~}", "data.workers must be int, not null"),
        (f"train: {{max_steps: {'9' * 400}}}", "train.max_steps is an integer that no counter holds"),
        (f"data: {{workers: {2**63 + 2**40}}}", "data.workers is an integer that no counter holds"),
    ],
)
def test_no_value_is_left_out_and_none_is_beyond_all_counters(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_value_of_another_type_from_python_is_named() -> None:
    config = read_run(["--model.name=caris_tiny"])
    with pytest.raises(UserError, match="seed must be int, not '8'"):
        replace(config, seed="8")
    with pytest.raises(UserError, match=r"train\.micro_batch_size must be int or null, not True"):
        replace(config, train=replace(config.train, micro_batch_size=True))
    assert replace(config, train=replace(config.train, micro_batch_size=None)).train.micro_batch_size is None
