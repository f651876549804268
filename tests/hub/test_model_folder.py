"""A model folder: written whole or not at all, loaded exactly or rejected in a sentence."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amltrain import files, run_folder
from amltrain.config.schema import Preprocess
from amltrain.errors import UserError
from amltrain.evaluation.results import named_protocol
from amltrain.hub import model_folder
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
        ({"protocol": whole["protocol"] | {"no_target_pixels": -1}}, "config.json: no_target_pixels is -1 and must be"),
        ({"protocol": whole["protocol"] | {"no_target_pixels": 2**70}}, "an integer that no counter holds"),
        ({"protocol": whole["protocol"] | {"threshold": 1.5}}, "threshold is 1.5 and must lie between 0 and 1"),
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


TOKENIZER = {"tokenizer.json": '{"model": {}}', "tokenizer_config.json": "{}"}


def checkpoint(run: Path, step: int = 4) -> Path:
    def write(folder: Path) -> None:
        torch.manual_seed(step)
        save(folder / "model", TwoLinears(4))
        for name, text in TOKENIZER.items():
            (folder / "model" / name).write_text(text)
        (folder / "state" / "trainer.json").write_text("{}")

    return run_folder.write_checkpoint(run, step, write)


def a_bit(name: str, place: float) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        content = bytearray((model / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        (model / name).write_bytes(content)

    return harm


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def edited(name: str, key: str, value: object) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        content = json.loads((model / name).read_text())
        content[key] = value
        (model / name).write_text(json.dumps(content, indent=2))

    return harm


def zeros(model: Path) -> None:
    """Another model of the same shapes, whole and loadable."""
    state = {key: torch.zeros_like(value) for key, value in load_file(model / "model.safetensors").items()}
    save_file(state, model / "model.safetensors")


FILES = ("model.safetensors", "config.json", "preprocessor_config.json", *TOKENIZER)
CHANGES: dict[str, Callable[[Path], None]] = {
    **{f"bit of {name} at {place}": a_bit(name, place) for name in FILES for place in (0.0, 0.5, 0.97)},
    **{f"{name} empty": written(name, "") for name in FILES},
    **{f"{name} gone": lambda model, name=name: (model / name).unlink() for name in FILES},
    "other weights": zeros,
    "size 16": edited("preprocessor_config.json", "size", 16),
    "letterbox": edited("preprocessor_config.json", "resize", "letterbox"),
    "normalization": edited("preprocessor_config.json", "normalization", "clip"),
    "threshold": edited("config.json", "protocol", {"threshold": 0.01}),
    "kwargs": edited("config.json", "kwargs", {"width": 4}),
    "vocabulary": written("tokenizer.json", '{"model": {"vocab": {"left": 1}}}'),
    "added token file": written("added_tokens.json", "{}"),
    "added vocabulary": written("vocab.txt", "left"),
    "added special tokens": written("special_tokens_map.json", "{}"),
    "manifest cut": lambda model: (model.parent / "manifest.json").write_text('{"files"') and None,
    "manifest empty": lambda model: (model.parent / "manifest.json").write_text("") and None,
    "manifest lists nothing": lambda model: (model.parent / "manifest.json").write_text('{"files": {}}') and None,
    "manifest of numbers": lambda model: (
        (model.parent / "manifest.json").write_text('{"files": {"model/x": 3}}') and None
    ),
    "manifest is a list": lambda model: (model.parent / "manifest.json").write_text("[]") and None,
    "manifest nested": lambda model: (model.parent / "manifest.json").write_text("[" * 100_000) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint_is_no_model(tmp_path: Path, change: str) -> None:
    saved = checkpoint(tmp_path)
    assert run_folder.check_model(saved / "model").step == 4
    CHANGES[change](saved / "model")
    for name in (tmp_path / "last", saved, saved / "model"):
        if (saved / "model" / "config.json").exists():
            with pytest.raises(UserError, match="is not the model that was saved") as caught:
                load_pretrained(name)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        else:
            with pytest.raises(UserError):
                load_pretrained(name)


def test_what_a_model_does_not_read_may_change(tmp_path: Path) -> None:
    """State, scores that have no entry yet, notes and pictures."""
    saved = checkpoint(tmp_path)
    (saved / "state" / "trainer.json").write_text("{ }")
    (saved / "model" / "results.json").write_text("{}")
    (saved / "model" / "README.md").write_text("a note")
    before = run_folder.check_model(saved / "model")
    assert before.weights == run_folder.saved_weights(saved) and before.described()["step"] == 4
    shutil.copytree(saved / "model", tmp_path / "mine")  # a folder of its own may be changed
    edited("config.json", "kwargs", {"width": 4})(tmp_path / "mine")
    assert run_folder.check_model(tmp_path / "mine") == (None, before.weights)


def test_a_folder_of_its_own_with_a_manifest_is_checked(tmp_path: Path) -> None:
    save(tmp_path / "model", TwoLinears(4))
    run_folder.write_model_manifest(tmp_path / "model")
    assert load_pretrained(tmp_path / "model").identity.step is None
    (tmp_path / "model" / "manifest.json").write_text('{"files": {}, "name": "a stranger\'s"}')
    load_pretrained(tmp_path / "model")  # not ours: ignored
    run_folder.write_model_manifest(tmp_path / "model")
    zeros(tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.safetensors has 400 bytes instead of 432"):
        load_pretrained(tmp_path / "model")


def test_best_that_moves_while_a_model_loads_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    for saved in (first, second):
        for name in TOKENIZER:
            (saved / "model" / name).unlink()
        run_folder._write_manifest(saved)
    run_folder.point(tmp_path, "best", first)
    sound = model_folder._from_dict

    def moved(*arguments: object) -> object:
        run_folder.point(tmp_path, "best", second)
        return sound(*arguments)

    monkeypatch.setattr(model_folder, "_from_dict", moved)
    loaded = load_pretrained(tmp_path / "best")
    assert loaded.identity == (4, run_folder.saved_weights(first))
    weights = load_file(first / "model" / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in loaded.model.state_dict().items())


def test_large_files_are_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, hashed = checkpoint(tmp_path), []
    files._hashed.cache_clear()
    sound = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sound(path))
    for _ in range(3):
        run_folder.check_model(saved / "model")
        assert run_folder.find_fault(saved) is None
    assert sorted(hashed) == sorted({*FILES, "trainer.json"})
