"""A model folder: written whole or not at all, loaded exactly or rejected in a sentence."""

import errno
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amltrain.config.schema import Preprocess
from amltrain.errors import UserError
from amltrain.evaluation.results import named_protocol
from amltrain.hub.model_folder import load_pretrained, load_weights, save_pretrained
from amltrain.models.base import RISModel
from amltrain.registry import MODELS, Entry

PREPROCESS = Preprocess(
    size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=8, sentence_field="sent"
)


class TwoLinears(RISModel):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, 2)
        self.first.bias = nn.Parameter(torch.zeros(width))


@pytest.fixture(autouse=True)
def two_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*, width: int = 4, vision_weights: str | None = None) -> TwoLinears:
        assert vision_weights is None, "a saved model must not fetch what training started from"
        return TwoLinears(width)

    monkeypatch.setitem(MODELS._entries, "two_linears", Entry("two_linears", build, None, None))


def save(folder: Path, model: nn.Module, **changes) -> Path:
    given = {
        "name": "two_linears",
        "kwargs": {"width": 4, "vision_weights": "some_vision_tower"},
        "state_dict": model.state_dict(),
        "preprocess": PREPROCESS,
        "protocol": named_protocol("caris"),
        "tokenizer": None,
    }
    return save_pretrained(folder, **given | changes)


def test_round_trip(tmp_path: Path):
    model = TwoLinears(4)
    save(tmp_path / "model", model)
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.preprocess == PREPROCESS
    assert loaded.protocol == named_protocol("caris")
    assert (loaded.name, loaded.kwargs, loaded.tokenizer) == ("two_linears", {"width": 4}, None)
    assert not loaded.model.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)


def test_a_trained_folder_that_does_not_name_its_ground_truth_was_trained_on_it(tmp_path: Path):
    folder = save(tmp_path / "model", TwoLinears(4), protocol=replace(named_protocol("lavt"), mask_parts=None))
    (folder / "training.json").write_text(json.dumps({"recipe": {"data": {"mask_parts": "union"}}}))
    assert load_pretrained(folder).protocol == replace(named_protocol("lavt"), mask_parts="union")


def test_a_checkpoint_folder_finds_its_model(tmp_path: Path):
    save(tmp_path / "step-100" / "model", TwoLinears(4))
    assert load_pretrained(tmp_path / "step-100").name == "two_linears"


def test_saving_again_replaces_and_leaves_nothing_aside(tmp_path: Path):
    save(tmp_path / "model", TwoLinears(4))
    model = TwoLinears(4)
    save(tmp_path / "model", model)
    assert torch.equal(load_pretrained(tmp_path / "model").model.state_dict()["first.weight"], model.first.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tied_weights_are_saved(tmp_path: Path):
    model = TwoLinears(2)
    model.second.weight = model.first.weight
    save(tmp_path / "model", model, kwargs={"width": 2})
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(tensors["first.weight"], tensors["second.weight"])


def test_a_full_disk_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = TwoLinears(4)
    save(tmp_path / "model", model)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("amltrain.hub.model_folder.save_file", full)
    with pytest.raises(UserError, match="No space left on device; nothing was changed"):
        save(tmp_path / "model", TwoLinears(4))
    assert torch.equal(load_pretrained(tmp_path / "model").model.state_dict()["first.weight"], model.first.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a model folder"):
        save(tmp_path, TwoLinears(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("second.bias"), "lacks the key second.bias"),
        (lambda t: t.update(third=torch.zeros(1)), "has the key third, which the model has not"),
        (lambda t: t.update({"first.weight": torch.zeros(4, 5)}), r"first.weight has shape \[4, 5\], .* \[4, 4\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change, message: str):
    path = save(tmp_path / "model", TwoLinears(4)) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(tmp_path / "model")
    assert str(path) in str(error.value)


def test_many_wrong_keys_are_counted():
    with pytest.raises(UserError, match="and 3 more keys"):
        load_weights(TwoLinears(4), {}, "here")


def test_truncated_weights_are_damaged(tmp_path: Path):
    path = save(tmp_path / "model", TwoLinears(4)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is damaged"):
        load_pretrained(tmp_path / "model")


def test_pickled_weights_are_never_opened(tmp_path: Path):
    folder = save(tmp_path / "model", TwoLinears(4))
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle.*amltrain convert"):
        load_pretrained(folder)


def test_a_folder_without_weights_is_named(tmp_path: Path):
    folder = save(tmp_path / "model", TwoLinears(4))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"{folder} has no model.safetensors; copy or download"):
        load_pretrained(folder)


def test_values_of_another_type_are_named(tmp_path: Path):
    path = save(tmp_path / "model", TwoLinears(4)) / "config.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"protocol": whole["protocol"] | {"threshold": "x"}}, "threshold is 'x', not float"),
        ({"protocol": whole["protocol"] | {"ties": "lt"}}, "ties is 'lt', not ge or gt"),
        ({"protocol": []}, "has no 'protocol' object"),
        ({"model": ["two_linears"]}, "has no 'model' name"),
        ({"kwargs": {"width": "wide"}}, "argument width of model two_linears is 'wide', not int"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=message):
            load_pretrained(tmp_path / "model")


def test_a_damaged_tokenizer_is_named(tmp_path: Path):
    folder = save(tmp_path / "model", TwoLinears(4))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=rf"the tokenizer files in {folder} are missing or damaged"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "not readable JSON"),
        ("config.json", "{}", "has no 'model'"),
        ("preprocessor_config.json", '{"sise": 3}', "unknown key 'sise'"),
        ("preprocessor_config.json", None, "is missing"),
    ],
)
def test_broken_configs_are_named(tmp_path: Path, name: str, text: str | None, message: str):
    path = save(tmp_path / "model", TwoLinears(4)) / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "model")


def test_an_unknown_model_suggests(tmp_path: Path):
    path = save(tmp_path / "model", TwoLinears(4)) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "two_linear"}))
    with pytest.raises(UserError, match="did you mean two_linears"):
        load_pretrained(tmp_path / "model")


def test_neither_folder_nor_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither a folder here nor a Hub repository"):
        load_pretrained(tmp_path / "nowhere" / "model")
    with pytest.raises(UserError, match="no folder nobody/nothing here, and no Hub repository"):
        load_pretrained("nobody/nothing")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "step-000017" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint best; the first evaluation makes it; it has step-000017"):
        load_pretrained(tmp_path / "best")


def test_config_is_for_people(tmp_path: Path):
    protocol = replace(named_protocol("detris"), threshold=0.4)
    folder = save(tmp_path / "model", TwoLinears(4), protocol=protocol)
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == "two_linears"
    assert config["protocol"]["threshold"] == 0.4
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == 32
