"""Pretrained encoders from files of the official formats, written here, and what is said when they do not fit."""

import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from amltrain.errors import UserError
from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.backbones.weights import load_bert, load_encoders, load_swin, read_state_dict

SIZES = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
BERT = {"vocab_size": 40, "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32, "max_positions": 12}


def swin(window_size: int = 7, **kwargs) -> Swin:
    return Swin(**{**SIZES, **kwargs}, window_size=window_size, drop_path_rate=0.0)


def official_swin() -> dict[str, Tensor]:
    """The keys of swin_*_patch4_window7_224.pth for a small Swin, under its entry "model"."""
    torch.manual_seed(3)
    state = {key: torch.randn_like(value) for key, value in swin().state_dict().items()}
    state = {key: value for key, value in state.items() if not key.startswith(("norm0", "norm1", "norm2", "norm3"))}
    for stage, depth in enumerate(SIZES["depths"]):
        for block in range(depth):
            index = torch.zeros(49, 49, dtype=torch.long)
            state[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = index
    state["layers.1.blocks.1.attn_mask"] = torch.zeros(16, 49, 49)
    state |= {"norm.weight": torch.ones(128), "norm.bias": torch.zeros(128)}
    return state | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}


def write(state: dict[str, Tensor], path: Path) -> str:
    torch.save({"model": state}, path)
    return str(path)


def test_official_swin_file(tmp_path: Path) -> None:
    official, ours = official_swin(), swin()
    load_swin(ours, write(official, tmp_path / "swin.pth"))
    for key, value in ours.state_dict().items():
        if key.startswith("norm"):
            assert torch.equal(value, torch.full_like(value, 1.0 if key.endswith("weight") else 0.0))
        else:
            assert torch.equal(value, official[key]), key


def test_timm_swin_under_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm keeps the merging at the start of the next stage: the features must be its own all the same."""
    torch.manual_seed(4)
    theirs = SwinTransformer(img_size=56, num_classes=5, window_size=7, always_partition=True, **SIZES).eval()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: theirs)
    ours = swin().eval()
    load_swin(ours, "swin_of_this_test")
    image = torch.randn(2, 3, 56, 56)
    x = theirs.patch_embed(image)
    for i, stage in enumerate(theirs.layers):
        x = stage(x)
        assert (ours.state_dict()[f"norm{i}.weight"] == 1).all()
        expected = F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
        if i < 2:  # 14 and 7 cells a side: no padding, where the two models are the same
            torch.testing.assert_close(ours(image)[i], expected)


def test_bias_tables_of_another_window_are_resized_bicubically(tmp_path: Path) -> None:
    official, ours = official_swin(), swin(window_size=12)
    load_swin(ours, write(official, tmp_path / "swin.pth"))
    key = "layers.1.blocks.1.attn.relative_position_bias_table"
    table = official[key].T.reshape(1, 2, 13, 13)
    expected = F.interpolate(table, size=(23, 23), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(ours.state_dict()[key], expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"layers.0.surprise": torch.zeros(1)}, "layers.0.surprise does not belong to"),
        (lambda state: {k: v for k, v in state.items() if k != "patch_embed.norm.bias"}, "patch_embed.norm.bias is mi"),
        (lambda state: state | {"patch_embed.norm.bias": torch.zeros(3)}, r"patch_embed.norm.bias is \[3\], this Swin"),
    ],
)
def test_a_swin_file_that_does_not_fit_is_rejected_by_key(tmp_path: Path, change, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_swin(swin(), write(change(official_swin()), tmp_path / "swin.pth"))


def test_another_size_of_swin_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name weights of the same"):
        load_swin(swin(embed_dim=32), write(official_swin(), tmp_path / "swin.pth"))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_files_are_data_not_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "args": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_damaged_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "swin.pth"
    write(official_swin(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"swin\.pth is damaged"):
        read_state_dict(path)
    (tmp_path / "half.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"half\.safetensors is damaged"):
        read_state_dict(tmp_path / "half.safetensors")
    (tmp_path / "page.pth").write_text("<html>too many downloads</html>")
    with pytest.raises(UserError, match=r"^[^\n]*page\.pth is damaged or no checkpoint[^\n]*$") as error:
        read_state_dict(tmp_path / "page.pth")
    assert "weights_only" not in str(error.value)
    with pytest.raises(UserError, match=r"absent\.pth does not exist"):
        load_swin(swin(), str(tmp_path / "absent.pth"))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"empty\.pth holds no tensors"):
        read_state_dict(tmp_path / "empty.pth")


def test_an_unknown_name_says_how_to_go_on() -> None:
    with pytest.raises(UserError, match=r"'swin_base_of_nobody' is no weights file.*model\.vision_weights"):
        load_swin(swin(), "swin_base_of_nobody")
    with pytest.raises(UserError, match=r"'nobody/bert'.*model\.text_weights"):
        load_bert(build_bert(**BERT), "nobody/bert")


def pretrained_bert() -> BertForMaskedLM:
    torch.manual_seed(5)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
        )
    )


@pytest.mark.parametrize("form", ["folder", "safetensors", "bin of 2018"])
def test_bert_of_every_form(tmp_path: Path, form: str) -> None:
    theirs = pretrained_bert()
    if form == "bin of 2018":
        old = {k: v for k, v in theirs.state_dict().items() if "decoder" not in k}
        old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in old.items()}
        old = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in old.items()}
        old |= {"bert.pooler.dense.weight": torch.zeros(16, 16), "bert.embeddings.position_ids": torch.arange(12)[None]}
        torch.save(old, tmp_path / "pytorch_model.bin")
        source = tmp_path / "pytorch_model.bin"
    else:
        theirs.save_pretrained(tmp_path / "bert")
        source = tmp_path / "bert" / ("model.safetensors" if form == "safetensors" else "")
    ours = build_bert(**BERT)
    load_encoders(swin(), ours, None, str(source))
    expected = theirs.bert.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_bert_folder_that_lacks_a_tensor_is_rejected(tmp_path: Path) -> None:
    """transformers would fill it with random numbers and say so in a warning only."""
    theirs = pretrained_bert().bert
    theirs.save_pretrained(tmp_path)
    state = {k: v.contiguous() for k, v in theirs.state_dict().items() if k != "encoder.layer.1.output.dense.bias"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert BertModel.from_pretrained(tmp_path, add_pooling_layer=False) is not None
    with pytest.raises(UserError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        load_bert(build_bert(**BERT), str(tmp_path))
