"""What a caller of the Python functions may get wrong: one sentence, before anything is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import amltrain
from amltrain.errors import UserError
from amltrain.registry import CALLBACKS

WRONG_RUNS: list[tuple[Any, str]] = [
    (5, "not of type int"),
    ([("seed", 1)], "not of type list"),
    ({1: 2}, "1 is of type int"),
    ({"train": {2: 3}}, "2 in train is of type int"),
    ({"train.max_steps": 3, "train": {"max_steps": 2}}, "train.max_steps is set twice"),
    ({"train": {"max_steps": 2}, "train.max_steps": 3}, "train.max_steps is set twice"),
    ({"train": 3, "train.max_steps": 3}, "train is set twice"),
    ({"trian": {}}, "unknown key trian; did you mean train?"),
    ({"data": {"shape": {}}}, "unknown key data.shape; did you mean data.shapes?"),
    ({"train": [1]}, "train is a group of keys, not a list"),
    ({"optim": {"lr": torch.tensor(0.1)}}, "optim.lr is of type Tensor"),
    ({"data": {"datasets": {"refshapes"}}}, "data.datasets is of type set"),
    ({"optim": {"lr": float("inf")}}, "optim.lr is inf and must be finite"),
]


@pytest.mark.parametrize(("values", "said"), WRONG_RUNS)
def test_a_wrong_run_is_one_sentence_without_our_file(values: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        amltrain.read_config(values)
    message = str(caught.value)
    assert said in message and "\n" not in message and "settings.yaml" not in message


def test_a_file_with_a_mistake_is_still_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trian: {}\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 1: unknown key trian; did you mean train\?"):
        amltrain.read_config(tmp_path / "mine.yaml")


def test_paths_and_numbers_of_numpy_are_values(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {max_steps: 7}\n")
    values = {"output": tmp_path / "run", "optim.lr": np.float64(0.5), "seed": np.int64(3), "train": {"epochs": 2}}
    run = amltrain.read_config(values, base=tmp_path / "base.yaml")
    assert (run.output, run.optim.lr, run.seed) == (str(tmp_path / "run"), 0.5, 3)
    assert (run.train.max_steps, run.train.epochs) == (7, 2)


WRONG_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"plugins": "mine.py"}, "plugins takes a list"),
    ({"plugins": [3]}, "plugins has 3 of type int"),
    ({"callbacks": amltrain.Callback()}, "callbacks takes a list"),
    ({"callbacks": [amltrain.Callback]}, r"write Callback\(\.\.\.\)"),
    ({"callbacks": ["stop_at"]}, "not an object of a Callback class"),
    ({"model": "caris_tiny"}, "model is of type str, not a RISModel"),
    ({"model": torch.nn.Linear(2, 2)}, "model is of type Linear, not a RISModel"),
    ({"method": "aml"}, "method is of type str, not a function"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG_ARGUMENTS)
def test_a_wrong_argument_is_said_before_anything_is_written(
    arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        amltrain.train({"output": tmp_path / "run"}, base="quickstart", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, new: amltrain.compare({}), "models is a dictionary"),
        (lambda model, new: amltrain.compare(["a"]), "models is a dictionary"),
        (lambda model, new: amltrain.compare({"a": []}), "model 'a' has no folder"),
        (lambda model, new: amltrain.compare({"a": "b"}, metrics="mIoU"), "metrics takes a list"),
        (lambda model, new: amltrain.evaluate(predictions=model, data="refcoco"), "data is of type str"),
        (lambda model, new: amltrain.evaluate(predictions=model, protocol={"thresh": 1}), "key of protocol 'thresh'"),
        (lambda model, new: amltrain.evaluate(predictions=model, splits="val"), "splits takes a list"),
    ],
)
def test_a_wrong_argument_of_another_function_is_said(call: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        call(tmp_path, tmp_path / "new")


def test_a_plugin_cannot_take_the_name_of_another_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CALLBACKS, "_entries", dict(CALLBACKS._entries))
    CALLBACKS.add("train", print)
    with pytest.raises(UserError, match="callback 'train' has the name of a key of every run"):
        amltrain.read_config({})
    CALLBACKS.remove("train")
    CALLBACKS.add("aml", print)
    with pytest.raises(UserError, match="callback 'aml' has the name of a registered method"):
        amltrain.read_config({})
