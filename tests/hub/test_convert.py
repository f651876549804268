"""Official files of every shape the releases use, written here; what does not match is rejected by name."""

import argparse
import contextlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amltrain.commands import convert
from amltrain.config.schema import Preprocess
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.evaluation.results import named_protocol
from amltrain.hub.convert import _load, convert_official, read_official, summary
from amltrain.hub.model_folder import load_pretrained
from amltrain.models import model_info
from amltrain.models.base import Conversion, RISModel
from amltrain.models.registry import ModelInfo
from amltrain.registry import MODELS, Entry
from tests.parity import compare

ADAPTERS = sorted(p.stem for p in Path(compare.__file__).parent.glob("*.py") if "\nADAPTER = " in p.read_text())

WEIGHTS = {"stem.0.weight": torch.randn(4, 4), "stem.0.bias": torch.randn(4), "old_head.weight": torch.randn(2)}


class Linear(RISModel):
    """A model whose release called `vision` "stem.0" and had a head that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(4, 4)

    def convert_state_dict(self, official):
        renamed = {f"stem.0.{k}": f"vision.{k}" for k in ("weight", "bias") if f"stem.0.{k}" in official}
        dropped = {k: "the official code's unused head" for k in official if k.startswith("old_head.")}
        state = {ours: official[theirs] for theirs, ours in renamed.items()}
        unmatched = [k for k in official if k not in renamed and k not in dropped]
        return Conversion(state, renamed, dropped, unmatched, [k for k in self.state_dict() if k not in state])


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(
        size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=8, sentence_field="sent"
    )
    info = ModelInfo("paper", "release", "MIT", "everything", preprocess, named_protocol("caris"), "cross_entropy")
    monkeypatch.setitem(MODELS._entries, "linear", Entry("linear", Linear, info, None))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-4, bs=8)},
        {
            "state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()},
            "best_iou": np.float64(0.5),
            "prec": {"50": 1.0},
        },
        {"state_dict": WEIGHTS, "best_iou": np.float32(0.5), "prec": np.array([0.1, 0.2])},
        {"model_state_dict": WEIGHTS, "cur_iou": torch.tensor(0.1)},
    ],
)
def test_containers_of_the_releases(tmp_path: Path, content: dict):
    torch.save(content, tmp_path / "official.pth")
    assert same(read_official(tmp_path / "official.pth"), WEIGHTS)


def test_zip_and_legacy_and_safetensors_files(tmp_path: Path):
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "new.safetensors")
    assert same(read_official(tmp_path / "old.pth"), WEIGHTS)
    assert same(read_official(tmp_path / "new.safetensors"), WEIGHTS)


def test_lavt_keeps_bert_apart(tmp_path: Path):
    torch.save({"model": WEIGHTS, "bert_model": {"layer.weight": torch.ones(1)}}, tmp_path / "lavt.pth")
    state = read_official(tmp_path / "lavt.pth")
    assert same(state, WEIGHTS | {"text_encoder.layer.weight": torch.ones(1)})


def test_an_entry_by_name(tmp_path: Path):
    average = {k: v + 1 for k, v in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "model_ema": average}, tmp_path / "best.pth")
    assert same(read_official(tmp_path / "best.pth", entry="model_ema"), average)
    with pytest.raises(UserError, match="no entry 'ema'; it has model, model_ema"):
        read_official(tmp_path / "best.pth", entry="ema")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_code_in_a_file_is_rejected_and_named(tmp_path: Path):
    torch.save({"model": WEIGHTS, "args": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"holds a _pytest\S+; loading it could run code"):
        read_official(tmp_path / "trap.pth")


def test_a_numpy_array_of_an_official_file_is_never_built(tmp_path: Path):
    """An object array's elements are pointers: over chosen bytes, they point where the file wants."""

    class Pointers:
        def __reduce__(self):
            kind = np.dtype([("a", "O")])
            return np.ndarray, ((1,), kind, b"AAAAAAAA")

    for value in (Pointers(), np.array(["a"], object), np.zeros(2, "V8"), np.array([1.0, 2.0])):
        torch.save({"model": WEIGHTS, "best": value}, tmp_path / "official.pth")
        with contextlib.suppress(UserError):
            best = _load(tmp_path / "official.pth")["best"]
            assert not isinstance(best, np.ndarray) and not vars(best)
            assert same(read_official(tmp_path / "official.pth"), WEIGHTS)


def test_damaged_and_absent_files(tmp_path: Path):
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:500])
    (tmp_path / "page.pth").write_text("<html>Google Drive: too many downloads</html>")
    for name in ("half.pth", "page.pth"):
        with pytest.raises(UserError, match=name):
            read_official(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        read_official(tmp_path / "none.pth")
    for seed in range(20):
        (tmp_path / "junk.pth").write_bytes(np.random.default_rng(seed).bytes(400))
        with pytest.raises(UserError, match=r"junk\.pth is damaged or no checkpoint \([^\n]*\); download it again$"):
            read_official(tmp_path / "junk.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no weights; it has epoch"):
        read_official(tmp_path / "empty.pth")


def test_a_whole_conversion(tmp_path: Path):
    torch.save({"model": WEIGHTS, "args": argparse.Namespace()}, tmp_path / "official.pth")
    conversion = convert_official("linear", tmp_path / "official.pth", tmp_path / "ours")
    loaded = load_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.model.vision.weight, WEIGHTS["stem.0.weight"])
    assert loaded.protocol == named_protocol("caris")
    text = summary(conversion)
    assert "2  stem.N -> vision" in text
    assert "1  the official code's unused head (e.g. old_head.weight)" in text
    said = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert said["renamed"]["stem.0.bias"] == "vision.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stranger.weight": torch.zeros(1)}, "it has stranger.weight that linear does not know"),
        ({f"s.{i}": torch.zeros(1) for i in range(9)}, "s.0, s.1, s.2 and 6 more keys"),
        ({"stem.0.bias": None}, "it lacks what becomes vision.bias"),
        ({"stem.0.bias": torch.zeros(5)}, r"vision.bias has shape \[5\], the model's is \[4\]"),
    ],
)
def test_a_file_that_does_not_match_is_rejected(tmp_path: Path, change: dict, message: str):
    state = {k: v for k, v in (WEIGHTS | change).items() if v is not None}
    torch.save(state, tmp_path / "official.pth")
    with pytest.raises(UserError, match=message):
        convert_official("linear", tmp_path / "official.pth", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_numbers_pickled_by_numpy_1(tmp_path: Path):
    torch.save({"state_dict": WEIGHTS, "best_iou": np.float64(0.5), "prec": np.zeros(2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for item in new.infolist():
            content = new.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(item, content)
    assert same(read_official(tmp_path / "old.pth"), WEIGHTS)


@pytest.mark.parametrize("wrapping", ["model", "state_dict"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_recorded_official_weights(
    name: str, wrapping: str, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    case = shared_dir / "goldens" / name / "tiny.safetensors"
    adapter, config = compare.load_adapter(name), compare.read_config(case.with_suffix(".json"))
    weights = compare.official_weights(load_file(case))
    if wrapping == "model":
        torch.save({"model": weights, "epoch": 49, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    else:
        parallel = {f"module.{k}": v for k, v in weights.items()}
        torch.save({"state_dict": parallel, "best_iou": np.float64(0.7)}, tmp_path / "official.pth")
    build = lambda *, config: adapter.build(config)  # noqa: E731
    monkeypatch.setitem(MODELS._entries, "recorded", Entry("recorded", build, model_info("linear"), None))

    convert_official("recorded", tmp_path / "official.pth", tmp_path / "ours", kwargs={"config": config})
    expected, _ = compare.load_model(adapter, config, weights)
    assert same(load_pretrained(tmp_path / "ours").model.state_dict(), expected.state_dict())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"model": WEIGHTS}, tmp_path / "official.pth")
    given = ["--model", "linear", "--file", str(tmp_path / "official.pth"), "--output", str(tmp_path / "ours")]
    convert.main([*given, "--tokenizer", "none"])
    said = capsys.readouterr().out
    assert "2 keys taken over, 0 under their own name, the others renamed:" in said
    assert "1 keys dropped:" in said
    with pytest.raises(SystemExit) as stopped:
        convert.main([*given, "--tokenizer", "none"])
    assert stopped.value.code == 2
    assert "ours exists already and is never overwritten" in capsys.readouterr().err
    given[-1] = str(tmp_path / "other")
    with pytest.raises(SystemExit) as stopped:
        convert.main([*given, "--tokenizer", "none", "--entry", "ema"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'official.pth'} has no entry 'ema'; it has model\n"


def test_how_a_file_was_trained_is_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"model": WEIGHTS}, tmp_path / "official.pth")
    given = ["--model", "linear", "--file", str(tmp_path / "official.pth"), "--output", str(tmp_path / "ours")]
    words = SentenceTokenizer.train_wordpiece(["a red car on the left of the blue one"], max_tokens=8)
    words.save(tmp_path / "words")
    convert.main([*given, "--tokenizer", str(tmp_path / "words"), "--max_tokens", "22", "--size", "64"])
    loaded = load_pretrained(tmp_path / "ours")
    assert (loaded.preprocess.max_tokens, loaded.preprocess.size, loaded.preprocess.resize) == (22, 64, "square")
    assert loaded.tokenizer.max_tokens == 22
    assert "input: 64 px square, 22 tokens a sentence\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "caris_tiny", "--kwargs", '{"vocab_size": "a"}', "--tokenizer", "none"], "vocab_size .* not int"),
        (["--model", "linear", "--tokenizer", "none", "--max_tokens", "0"], "--max_tokens is 0 and must be at least 1"),
        (["--model", "caris_swin_base", "--file", "nothing.pth"], "--file: nothing.pth does not exist"),
        (["--model", "caris_swin_base", "--tokenizer", "nobody/nothing"], "--tokenizer FOLDER, or --tokenizer none"),
    ],
)
def test_mistakes_on_the_command_line_get_one_line(tmp_path: Path, capsys, flags: list[str], message: str):
    torch.save({"model": WEIGHTS}, tmp_path / "official.pth")
    with pytest.raises(SystemExit):
        convert.main(["--file", str(tmp_path / "official.pth"), *flags, "--output", str(tmp_path / "ours")])
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
