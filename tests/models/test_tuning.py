"""Freezing, low-rank updates and layer-wise rates, by module names, for every model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from amltrain.config.parse import checked
from amltrain.config.schema import OptimConfig
from amltrain.errors import UserError
from amltrain.hub.model_folder import load_pretrained
from amltrain.inference.merge import merge_folder
from amltrain.losses import create_loss
from amltrain.methods.base import Method, NoOptions, build_method
from amltrain.models import RISModel, create_model, model_info
from amltrain.models.base import check_param_groups
from amltrain.models.tuning import depths_of, matching
from amltrain.records import Vocabulary
from amltrain.training.build import check_before_data
from amltrain.training.optim import optimizer_groups
from tests.models.test_registry import TINY, VOCABULARY, build, loss_of, make_batch
from tests.training import runs


def method_of(name: str, model: RISModel) -> Method:
    info = model_info(name)
    loss = create_loss(info.loss, **info.loss_kwargs)
    return build_method("supervised", model, loss, NoOptions(), Vocabulary(100, 0, 3, (0, 1, 2, 3, 4)))


def trained_parts(name: str) -> RISModel:
    """The model with all of its encoders trained, where it freezes them by itself."""
    model = build(name)
    for encoder in model.encoders:
        model.get_submodule(encoder).requires_grad_(True)
    return model


@pytest.mark.parametrize("name", TINY)
def test_what_is_frozen_keeps_weights_and_mode(name: str) -> None:
    encoder = build(name).encoders[-1]
    model = create_model(name, freeze=[encoder]).train()
    part = model.get_submodule(encoder)
    assert not any(parameter.requires_grad for parameter in part.parameters())
    assert model.training and not any(module.training for module in part.modules())
    groups = optimizer_groups(method_of(name, model), OptimConfig())
    check_param_groups(model, groups)
    before = {key: value.clone() for key, value in part.state_dict().items()}
    loss_of(name, model, make_batch(name, 70, 98)).backward()
    torch.optim.SGD(groups, lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())
    model.eval().train()
    assert not any(module.training for module in part.modules())


@pytest.mark.parametrize("name", TINY)
def test_low_rank_updates_train_and_start_at_nothing(name: str) -> None:
    plain = build(name).eval()
    encoder = next(
        e for e in reversed(plain.encoders) if sum(type(m) is nn.Linear for m in plain.get_submodule(e).modules()) > 1
    )
    torch.manual_seed(0)
    adapted = create_model(name, vocab_size=VOCABULARY, lora={encoder: 4})
    state = {key.replace(".base_layer.", "."): key for key in adapted.state_dict() if ".lora_" not in key}
    assert state.keys() == plain.state_dict().keys()
    adapted.load_state_dict({state[k]: v for k, v in plain.state_dict().items()}, strict=False)
    batch = make_batch(name, 70, 98)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(batch).logits, plain(batch).logits)
    trained = [key for key, p in adapted.get_submodule(encoder).named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in key for key in trained)
    check_param_groups(adapted, optimizer_groups(method_of(name, adapted), OptimConfig()))
    loss_of(name, adapted.train(), batch).backward()
    moved = [p.grad for key, p in adapted.named_parameters() if ".lora_B." in key and p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in moved)


@pytest.mark.parametrize("name", TINY)
def test_rates_fall_towards_the_input_of_every_encoder(name: str) -> None:
    model = trained_parts(name)
    for depths, last in depths_of(model):
        assert last > 2, "an encoder without blocks"
        assert set(depths.values()) <= set(range(last + 1)) and {1, last - 1} <= set(depths.values())
    method = method_of(name, model)
    plain = {id(p): g["lr"] for g in optimizer_groups(method, OptimConfig()) for p in g["params"]}
    groups = optimizer_groups(method, OptimConfig(layer_decay=0.5))
    rates = {id(p): g["lr"] / plain[id(p)] for g in groups for p in g["params"]}
    assert rates.keys() == plain.keys() and len({g["name"] for g in groups}) == len(groups)
    inside: set[int] = set()
    for depths, last in depths_of(model):
        inside |= depths.keys()
        for parameter, depth in depths.items():
            if parameter in rates:
                assert rates[parameter] == pytest.approx(0.5 ** (last - depth))
    assert all(rate == 1 for parameter, rate in rates.items() if parameter not in inside)


def test_depths_by_hand() -> None:
    """BERT of two layers: embeddings, two layers, nothing behind them; Swin of four stages of two blocks."""
    model = create_model("caris_tiny")
    (vision, last_vision), (text, last_text) = depths_of(model)
    names = {id(p): n for n, p in model.named_parameters()}
    of = {names[p]: d for p, d in [*vision.items(), *text.items()]}
    assert of["text.embeddings.word_embeddings.weight"] == 0
    assert of["text.encoder.layer.0.attention.self.query.weight"] == 1
    assert of[f"text.encoder.layer.{last_text - 2}.output.dense.weight"] == last_text - 1
    blocks = sorted({n.partition(".blocks.")[0] + n.partition(".blocks.")[2][0] for n in of if ".blocks." in n})
    assert len(blocks) == last_vision - 1
    first = next(n for n in of if n.startswith("vision.") and "blocks" not in n)
    assert of[first] == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"freeze": ["txt"]}, r"unknown module \(model.freeze\) 'txt'; did you mean text"),
        ({"freeze": ["vision.layers.[9]"]}, "unknown module"),
        ({"freeze": "text"}, "model.freeze is 'text', not a list of module names"),
        ({"freeze": ["*"]}, "model.freeze leaves nothing to train"),
        ({"lora": ["text"]}, "model.lora is .*; give names of modules and ranks"),
        ({"lora": {"text": 0}}, "give names of modules and ranks"),
        ({"lora": {"text": True}}, "give names of modules and ranks"),
        ({"lora": {"vision.patch_embed": 4}}, "linear"),
    ],
)
def test_what_does_not_fit_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("caris_tiny", **kwargs)


def test_layer_decay_without_a_trained_block_is_named() -> None:
    model = create_model("caris_tiny", freeze=["vision", "text"])
    with pytest.raises(UserError, match=r"optim\.layer_decay: CARIS trains no block of an encoder; leave it out"):
        optimizer_groups(method_of("caris_tiny", model), OptimConfig(layer_decay=0.9))


def test_a_pattern_matches_the_outermost() -> None:
    model = create_model("caris_tiny")
    assert matching(model, "text", "x") == ["text"]
    assert matching(model, "text*", "x") == ["text"]
    assert matching(model, "text.encoder.layer.[01]", "x") == ["text.encoder.layer.0", "text.encoder.layer.1"]


FLAGS = (
    *("--model.freeze", "[vision]", "--model.lora", json.dumps({"text": 2}), "--train.max_steps", "4"),
    *("--optim.layer_decay", "0.7", "--checkpoint.every_steps", "2", "--model.allow_random_frozen", "true"),
)


def test_a_run_stops_resumes_and_its_folder_is_whole(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.run(shapes, tmp_path / "whole", *FLAGS)
    assert "0.7 of it per block of the encoders" in capsys.readouterr().out
    runs.run(shapes, tmp_path / "parts", *FLAGS, "--train.stop_after", "2")
    runs.run(shapes, tmp_path / "parts", *FLAGS)
    whole, parts = (load_file(tmp_path / name / "last/model/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    pretrained = load_pretrained(str(tmp_path / "whole" / "last"))
    assert pretrained.kwargs["lora"] == {"text": 2} and pretrained.model.frozen_modules == ("vision",)
    assert merge_folder(pretrained, tmp_path / "merged") > 0
    merged = load_pretrained(str(tmp_path / "merged"))
    assert "lora" not in merged.kwargs and not any(".lora_" in key for key in merged.model.state_dict())


def test_updates_on_top_of_a_trained_model(shapes: Path, tmp_path: Path) -> None:
    """Weights without updates are loaded first; a folder with the same updates goes on with them."""
    runs.run(shapes, tmp_path / "plain", "--train.max_steps", "1")
    start = str(tmp_path / "plain" / "last" / "model")
    runs.run(shapes, tmp_path / "tuned", *FLAGS, "--model.checkpoint", start)
    before, after = (load_file(tmp_path / name / "last/model/model.safetensors") for name in ("plain", "tuned"))
    query = "text.encoder.layer.0.attention.self.query"
    assert torch.equal(before[f"{query}.weight"], after[f"{query}.base_layer.weight"])
    again = ("--model.checkpoint", str(tmp_path / "tuned" / "last" / "model"))
    runs.run(shapes, tmp_path / "again", *FLAGS, *again)
    further = load_file(tmp_path / "again/last/model/model.safetensors")
    key = next(key for key in after if ".lora_B." in key)
    assert not torch.equal(after[key], further[key])


def test_the_keys_reach_the_run() -> None:
    config = checked(["--model.freeze", "[text]", "--model.lora", "{vision: 8}", "--optim.layer_decay", "0.8"])
    assert (config.model.freeze, config.model.lora, config.optim.layer_decay) == (["text"], {"vision": 8}, 0.8)
    for flags, message in ((["--model.lora", "{vision: many}"], "lora"), (["--optim.layer_decay", "0"], "more than 0")):
        with pytest.raises(UserError, match=message):
            checked(flags)


@pytest.mark.parametrize("flags", [("--model.freeze", "[txt]"), ("--model.lora", "{txt: 4}")])
def test_a_wrong_name_is_said_before_data_are_prepared(flags: tuple[str, str]) -> None:
    config = checked(["--config", "quickstart", *flags])
    with pytest.raises(UserError, match="'txt'; did you mean"):
        check_before_data(config)
