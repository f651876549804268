"""Every recorded case of every baseline that has an adapter, within the tolerances of its official code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import find_shared
from tests.parity import compare

ADAPTERS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\nADAPTER = " in p.read_text())
SHARED = find_shared()


def cases() -> list[tuple[str, Path]]:
    if SHARED is None:
        return []
    return [
        (model, case) for model in ADAPTERS for case in sorted((SHARED / "goldens" / model).glob("tiny*.safetensors"))
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
    assert any(row.name == "output.logits" for row in rows)
    assert all(row.passed for row in rows), compare.table([row for row in rows if not row.passed])


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
def test_the_command_checks_a_case_from_anywhere(tmp_path: Path) -> None:
    """A lone file outside the repository borrows sizes and weights of the recorded tiny case."""
    recorded = load_file(SHARED / "goldens" / "caris" / "tiny_nopad.safetensors")
    off = {**recorded, "output.logits": recorded["output.logits"] + 1e-3}
    for tensors, code, said in ((recorded, 0, "0 beyond tolerance"), (off, 1, "BEYOND")):
        save_file(tensors, tmp_path / "case2.safetensors")
        command = [sys.executable, compare.__file__, "caris", str(tmp_path / "case2.safetensors")]
        environment = {**os.environ, "AMLTRAIN_SHARED": str(SHARED)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr
