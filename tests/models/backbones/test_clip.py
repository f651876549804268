"""CLIP's text tower against transformers', and its weights in every container they come in."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from amltrain.errors import UserError
from amltrain.models.backbones.clip import CLIPText, load_clip_text, text_tower
from amltrain.models.backbones.weights import is_torchscript, read_torchscript

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 24,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
IDS = torch.tensor([[58, 3, 7, 9, 59, 0, 0, 0], [58, 4, 4, 4, 4, 4, 4, 59]])


def tiny_text() -> CLIPText:
    return CLIPText(width=32, layers=3, heads=4, vocab_size=60, max_positions=12, embed_dim=24).eval()


@pytest.fixture
def theirs() -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # transformers' own start is too small to show a mistake
    return model


def official(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """A tower under OpenAI's names, in the precision of its archives, with what else lies in them."""
    own = tiny_text()
    own.load_state_dict(_ours(model))
    renamed = {}
    for key, value in own.state_dict().items():
        for ours, name in (
            (".norm1.", ".ln_1."),
            (".norm2.", ".ln_2."),
            (".fc1.", ".c_fc."),
            (".fc2.", ".c_proj."),
            ("blocks.", "transformer.resblocks."),
        ):
            key = key.replace(ours, name)
        renamed[key] = value
    return {**renamed, "visual.conv1.weight": torch.randn(2, 3, 4, 4)}


def _ours(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    return text_tower(model.state_dict())


class Archive(nn.Module):
    """A module tree with the given state dict, which torch.jit can save."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in state.items():
            *path, leaf = key.split(".")
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            half = value.half() if value.is_floating_point() else value
            parent.register_parameter(leaf, nn.Parameter(half, requires_grad=False))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("context_length", torch.tensor(12))
        self.register_buffer("vocab_size", torch.tensor(60))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_archive(state: dict[str, Tensor], path: Path) -> None:
    torch.jit.trace(Archive(state), torch.zeros(1)).save(str(path))


def test_equal_to_transformers(theirs) -> None:
    ours = tiny_text()
    ours.load_state_dict(_ours(theirs))
    with torch.no_grad():
        tokens, sentence = ours(IDS, IDS != 0)
        expected = theirs(input_ids=IDS)
    torch.testing.assert_close(tokens, expected.last_hidden_state, atol=2e-5, rtol=0)
    torch.testing.assert_close(sentence, expected.text_embeds, atol=2e-5, rtol=0)


def test_any_padding_id_reads_as_zero(theirs) -> None:
    ours = tiny_text()
    ours.load_state_dict(_ours(theirs))
    with torch.no_grad():
        zeros, _ = ours(IDS, IDS != 0)
        ends, _ = ours(IDS.masked_fill(IDS == 0, 59), IDS != 0)
    assert torch.equal(zeros, ends)


def test_a_sentence_too_long_is_rejected() -> None:
    ids = torch.ones(1, 13, dtype=torch.int64)
    with pytest.raises(UserError, match=r"13 tokens .* 12 positions"):
        tiny_text()(ids, ids > 0)


@pytest.mark.parametrize("form", ["archive.pt", "state.pt", "huggingface.safetensors", "whole.bin", "folder"])
def test_every_container(form: str, theirs, tmp_path: Path) -> None:
    path = tmp_path / form
    expected = _ours(theirs)
    if form == "archive.pt":
        save_archive(official(theirs), path)
        expected = {key: value.half().float() for key, value in expected.items()}
    elif form == "state.pt":
        torch.save(official(theirs), path)
    elif form == "huggingface.safetensors":
        save_file(theirs.state_dict(), path)
    elif form == "whole.bin":  # both towers in one file, as the Hub's openai/clip-* repositories have them
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        both = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=24))
        both.load_state_dict(theirs.state_dict(), strict=False)
        torch.save(both.state_dict(), path)
        expected["logit_scale"] = both.logit_scale.detach()
    else:
        theirs.save_pretrained(path)
    text = tiny_text()
    load_clip_text(text, str(path))
    state = text.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_an_archive_gives_the_state_dict_that_running_it_would(theirs, tmp_path: Path) -> None:
    path = tmp_path / "archive.pt"
    save_archive(official(theirs), path)
    assert is_torchscript(path)
    read, run = read_torchscript(path), torch.jit.load(path).state_dict()
    assert read.keys() == run.keys()
    assert all(torch.equal(read[key], run[key]) and read[key].dtype == run[key].dtype for key in run)


def test_an_archive_that_wants_to_run_code_is_rejected(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Harmful()))
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(UserError, match="holds more than a module's weights"):
        load_clip_text(tiny_text(), str(path))
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_named(theirs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        load_clip_text(tiny_text(), str(tmp_path / "absent.pt"))
    other = CLIPText(width=32, layers=2, heads=4, vocab_size=60, max_positions=12, embed_dim=24)
    torch.save(official(theirs), tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"blocks\.2.* does not belong to this CLIPText"):
        load_clip_text(other, str(tmp_path / "state.pt"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        load_clip_text(tiny_text(), str(tmp_path / "cut.pt"))
    with pytest.raises(UserError, match="cannot be fetched"):
        load_clip_text(tiny_text(), "nobody/no-such-clip")


def test_checkpointing_changes_nothing(theirs) -> None:
    gradients = []
    for enabled in (False, True):
        text = tiny_text().train()
        text.load_state_dict(_ours(theirs))
        text.gradient_checkpointing = enabled
        tokens, sentence = text(IDS, IDS != 0, {1: lambda hidden: 0.1 * hidden})
        (tokens.square().mean() + sentence.sum()).backward()
        gradients.append({name: p.grad for name, p in text.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
