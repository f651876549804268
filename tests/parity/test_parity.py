"""Every recorded case of every baseline that has an adapter, within the tolerances of its official code."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amltrain.models import Conversion, RISModel
from tests.conftest import find_shared
from tests.parity import compare
from tests.parity.judge import Exact, Row, nudged, row

ADAPTERS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\nADAPTER = " in p.read_text())
SHARED = find_shared()


def cases() -> list[tuple[str, Path]]:
    if SHARED is None:
        return []
    return [
        (model, case) for model in ADAPTERS for case in sorted((SHARED / "goldens" / model).glob("*tiny*.safetensors"))
    ]


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
@pytest.mark.parametrize(("model", "case"), cases(), ids=lambda value: getattr(value, "stem", value))
def test_parity(model: str, case: Path) -> None:
    adapter = compare.load_adapter(model)
    recorded = load_file(case)
    config = compare.read_config(compare.find_beside(model, case, ".json"))
    weights = compare.official_weights(recorded)
    if not weights:
        weights = compare.official_weights(load_file(compare.find_tiny_weights(model, case)))
    rows = compare.compare(adapter, config, recorded, weights)
    assert any(part in row.name for row in rows for part in ("output.logits", "masks", "low_res_logits"))
    assert all(row.passed for row in rows), compare.table([row for row in rows if not row.passed])
    left_out = compare.not_compared(adapter, recorded, rows, compare.load_model(adapter, config, weights)[1])
    assert not [name for name, why in left_out.items() if why == compare.NO_RULE]


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
def test_a_changed_weight_is_noticed() -> None:
    """The comparison can fail: one weight off by one in a thousand is beyond tolerance."""
    case = SHARED / "goldens" / "caris" / "tiny.safetensors"
    recorded = load_file(case)
    weights = compare.official_weights(recorded)
    key = "pixel_decoder.lang_embed.0.weight"
    weights[key] = weights[key] * 1.001
    config = compare.read_config(case.with_suffix(".json"))
    rows = compare.compare(compare.load_adapter("caris"), config, recorded, weights)
    assert not all(row.passed for row in rows)


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
@pytest.mark.parametrize("model", ADAPTERS)
def test_a_wrong_epsilon_is_noticed(model: str) -> None:
    """Ten times the right epsilon in the norms of one kind (1e-5 for 1e-12) is not rounding, on any CPU.

    The forward pass alone shows it.
    """
    case = SHARED / "goldens" / model / "tiny.safetensors"
    adapter, recorded = compare.load_adapter(model), load_file(case)
    weights = compare.official_weights(recorded)
    recorded = {n: v for n, v in recorded.items() if n.startswith(("input.", "inter.", "output.")) and "loss" not in n}
    config = compare.read_config(case.with_suffix(".json"))
    kinds = {(type(m), m.eps) for m in adapter.build(config).modules() if hasattr(m, "eps")}
    assert kinds
    for kind, right in kinds:

        def build(config: Mapping[str, Any], kind: type = kind, right: float = right) -> RISModel:
            built = adapter.build(config)
            for module in built.modules():
                if type(module) is kind and module.eps == right:
                    module.eps = max(10 * right, 1e-5)
            return built

        rows = compare.compare(replace(adapter, build=build), config, recorded, weights)
        assert not all(row.passed for row in rows), f"{kind.__name__} with epsilon {right}"


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
@pytest.mark.parametrize("model", ["lavt", "rela", "barleria"])
def test_what_is_beyond_tolerance_is_judged_in_float64(model: str) -> None:
    """A tolerance that float32 cannot meet: noise passes with its reason, what is wrong by 1 % does not."""
    case = SHARED / "goldens" / model / "tiny.safetensors"
    recorded = compare.read_tensors(case)
    strict = replace(compare.load_adapter(model), gradient=1e-9, value=1e-9)
    largest = max((name for name in recorded if name.startswith("grad.")), key=lambda name: recorded[name].abs().max())
    wrong = {largest, "output.logits"}
    recorded |= {name: recorded[name] * 1.01 for name in wrong}
    config = compare.read_config(case.with_suffix(".json"))
    rows = compare.compare(strict, config, recorded, compare.official_weights(recorded))
    assert {row.name for row in rows if not row.passed} == wrong
    rechecked = [row for row in rows if row.reason]
    assert len(rechecked) > 15
    assert all(row.reason.startswith("from our float64: recorded") for row in rechecked)
    assert "BEYOND (from our float64" in compare.table(rechecked)


def test_a_tensor_that_is_zero_is_judged_by_the_scale_of_its_case() -> None:
    """The gradient of a key's bias before a softmax is 0: float32 leaves rounding there, and nothing larger passes."""
    large, zero = torch.tensor([3.0, -1.0]), torch.full((2,), 1e-17)
    noise = torch.tensor([6e-8, 0.0])
    own = Exact(
        {"grad.a": large.double(), "grad.b": zero.double()},
        [{"grad.a": large, "grad.b": noise}, {"grad.a": large, "grad.b": -noise}],
    )

    def judged(recorded: Tensor) -> bool:
        return own.judge(Row("grad.b", 0.0, 0.0, "rel 1e-4", False), recorded, tolerance=1e-4).passed

    assert judged(torch.tensor([0.0, 0.0]))
    assert judged(torch.tensor([1e-7, -1.5e-7]))
    assert not judged(torch.tensor([0.0, 1e-5]))
    assert row("f64.grad.b", zero.double(), 2 * zero.double(), 1e-9, relative=True, scale=3.0).passed
    assert not row("f64.grad.b", zero.double(), torch.full((2,), 1e-8).double(), 1e-9, relative=True, scale=3.0).passed


def test_joined_and_split_parameters_are_compared_in_the_official_form() -> None:
    """Ours has q, k and v in one tensor and one official tensor in two: their gradients are told apart."""

    class Ours(RISModel):
        def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
            joined = torch.cat([official["q"], official["k"], official["v"]])
            upper, lower = official["fused"].chunk(2)
            state = {"qkv": joined, "upper": upper, "lower": lower, "twin": official["q"]}
            return Conversion(state, {}, {}, [], [])

    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(2, 3, generator=generator) for name in ("q", "k", "v", "fused")}
    places = compare.find_places(Ours(), weights)
    found = {
        "grad.qkv": torch.arange(18.0).reshape(6, 3),
        "grad.upper": torch.ones(1, 3),
        "grad.lower": torch.zeros(1, 3),
    }
    official = compare.officially(found, places, {f"grad.{name}": value for name, value in weights.items()})
    assert official["grad.k"].tolist() == [6, 7, 8, 9, 10, 11]
    assert official["grad.fused"].tolist() == [1, 1, 1, 0, 0, 0]
    tied = compare.officially({**found, "grad.twin": torch.ones(2, 3)}, places, {"grad.q": weights["q"]})
    assert tied["grad.q"].tolist() == [1, 2, 3, 4, 5, 6]
    assert compare.officially({"grad.upper": torch.ones(1, 3)}, places, {"grad.fused": weights["fused"]}) == {}


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", ["lavt", "cris"])
def test_a_case_recorded_from_our_code(
    model: str,
    dtype: torch.dtype,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other weights and inputs, recorded from our code: the command finds the sizes itself and agrees.

    In float32 the recording run has its image moved by the last bit, as another CPU's rounding would.
    """
    recorded = record_own(model, dtype, seed)
    save_file(recorded, tmp_path / "own.safetensors")
    monkeypatch.setenv("AMLTRAIN_SHARED", str(SHARED))
    monkeypatch.setattr(sys, "argv", ["compare.py", model, str(tmp_path / "own.safetensors")])
    assert compare.main() == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    count = sum(name.startswith(("output.", "grad.")) for name in recorded)
    assert f"{count} compared, 0 beyond tolerance; 0 recorded but not compared" in printed
    recorded["output.logits"] *= 1 + 1e-3
    save_file(recorded, tmp_path / "own.safetensors")
    assert compare.main() == 1


def record_own(model: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Record a case from our own code: shuffled weights, new images and sentences."""
    adapter, case = compare.load_adapter(model), SHARED / "goldens" / model / "tiny.safetensors"
    old, generator = load_file(case), torch.Generator().manual_seed(seed)
    config = compare.read_config(case.with_suffix(".json"))

    def shuffled(value: Tensor) -> Tensor:
        order = torch.randperm(value.numel(), generator=generator)
        return value.flatten()[order].reshape(value.shape) if value.is_floating_point() else value

    weights = {key: shuffled(value) for key, value in compare.official_weights(old).items()}
    inputs = {key: value for key, value in old.items() if key.startswith("input.")}
    inputs["input.image"] = torch.randn(inputs["input.image"].shape, generator=generator)
    inputs["input.ids"] = inputs["input.ids"].flip(0)
    if "input.mask" in inputs:
        inputs["input.mask"] = inputs["input.mask"].flip(0)
    network, renamed = compare.load_model(adapter, config, weights)
    network.to(dtype)
    batch = (adapter.batch or compare.default_batch)(inputs)
    if dtype == torch.float32:
        batch = batch._replace(image=nudged(batch.image, generator))
    batch = batch._replace(image=batch.image.to(dtype))
    outputs = compare.run(adapter, network, batch, {"output.logits": old["output.logits"]})
    trained = compare.backward(adapter, network, batch, {})
    outputs["output.loss"] = trained["output.loss"].detach()
    names = {ours: official for official, ours in renamed.items()}
    gradients = {f"grad.{names[k[5:]]}": v for k, v in trained.items() if k.startswith("grad.") and k[5:] in names}
    single = {key: value.float().contiguous() for key, value in {**outputs, **gradients}.items()}
    return {**weights, **inputs, **single}


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("maskris", "maskris/tiny.safetensors"), "tests/methods/test_maskris.py compares its recorded tensors"),
        (("cris", "cris/preproc.safetensors"), "a test of that component compares it"),
        (("etris", "etris/full_r101.safetensors"), "stores no image"),
        (("lavt", "caris/tiny.safetensors"), "no JSON has sizes that the weights of tiny.safetensors fit"),
        (("lavt", "lavt/tiny.json"), "is not a readable .safetensors file"),
    ],
)
def test_what_cannot_be_compared_ends_in_a_sentence(
    arguments: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, case = arguments
    monkeypatch.setenv("AMLTRAIN_SHARED", str(SHARED))
    monkeypatch.setattr(sys, "argv", ["compare.py", model, str(SHARED / "goldens" / case)])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(SHARED is None, reason="the recorded tensors are not here (set AMLTRAIN_SHARED)")
def test_the_command_checks_a_case_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lone file outside the repository borrows sizes and weights of the recorded tiny case."""
    case = tmp_path / "case2.safetensors"
    recorded = load_file(SHARED / "goldens" / "caris" / "tiny_nopad.safetensors")
    save_file(recorded, case)
    environment = {**os.environ, "AMLTRAIN_SHARED": str(SHARED)}
    command = [sys.executable, compare.__file__, "caris", str(case)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, "0 beyond tolerance" in done.stdout) == (0, True), done.stdout + done.stderr
    save_file({**recorded, "output.logits": recorded["output.logits"] + 1e-3}, case)
    monkeypatch.setenv("AMLTRAIN_SHARED", str(SHARED))
    monkeypatch.setattr("sys.argv", command[1:])
    assert compare.main() == 1
    assert "BEYOND" in capsys.readouterr().out
