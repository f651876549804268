"""Merging: the same outputs without peft's layers, and without what a checkpoint left out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amltrain.commands.export import main
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.hub.base_weights import read_base
from amltrain.hub.model_folder import load_pretrained, save_pretrained
from amltrain.inference.merge import merge_folder, merged_state
from amltrain.models import create_model, model_info
from tests.models.test_registry import make_batch

LORA = {"mllm_tiny": {"text_tuning": "lora"}, "dual_tiny": {}}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = SentenceTokenizer.train_wordpiece(["the red ball on the left of a cup"], 12)
    kwargs = {"vocab_size": 64, **LORA[name]}
    model = create_model(name, **kwargs)
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.1)  # it starts at 0, and would change nothing
    info = model_info(name)
    return save_pretrained(
        folder,
        name=name,
        kwargs=kwargs,
        state_dict=model.state_dict(),
        preprocess=info.preprocess,
        protocol=info.protocol,
        tokenizer=tokenizer,
    )


@pytest.mark.parametrize("name", LORA)
def test_the_merged_model_says_the_same(name: str, tmp_path: Path) -> None:
    if LORA[name]:
        pytest.importorskip("peft")
    one = load_pretrained(saved(name, tmp_path / "model"))
    count = merge_folder(one, tmp_path / "whole")
    other = load_pretrained(tmp_path / "whole")
    assert (count > 0) == bool(LORA[name])
    assert not any("lora" in key or "base_layer" in key for key in other.model.state_dict())
    batch = make_batch(name, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(other.model(batch).logits, one.model(batch).logits, rtol=1e-3, atol=1e-4)


def test_an_update_that_is_not_added_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    one = load_pretrained(saved("mllm_tiny", tmp_path / "model"))
    first = next(key for key in one.model.state_dict() if key.endswith(".lora_B.default.weight"))
    state, count = merged_state(one.model)
    plain = first.replace(".lora_B.default", "")
    state[plain] = one.model.state_dict()[plain.replace(".weight", ".base_layer.weight")]
    monkeypatch.setattr("amltrain.inference.merge.merged_state", lambda model: (state, count))
    with pytest.raises(UserError, match="the merged model differs by"):
        merge_folder(one, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_the_command_writes_a_whole_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    source = saved("mllm_tiny", tmp_path / "model")
    main(["--checkpoint", str(source), "--output", str(tmp_path / "whole"), "--merged"])
    assert "6 low-rank updates added" in capsys.readouterr().out
    assert read_base(tmp_path / "whole") is None
    blocked = (
        "import sys; sys.modules['peft'] = None; from amltrain import load_pretrained; load_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", blocked, str(tmp_path / "whole")], check=True, timeout=120)
