"""CGFormer: the official code's keys and counts, its noise, and its evaluation without noise."""

import json

import pytest
import torch
from safetensors.torch import load_file

from amltrain.losses import create_loss
from amltrain.models import check_param_groups, create_model
from amltrain.models.cgformer import Grouping
from amltrain.records import ModelOutput
from tests.models.test_rela import batch_of
from tests.parity import cgformer as recorded_cgformer
from tests.parity import compare

UNUSED = 2 * 1024**2 + 2 * (2 * 512 + 2 * 512 * 1024 + 1024 + 512)
"""The last gate, and a norm and an MLP in each of two loading units."""


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("cgformer_tiny", vocab_size=64).eval()


def test_official_keys_counts_and_groups(shared_dir):
    recorded = json.loads((shared_dir / "goldens/cgformer/full_keys.json").read_text())
    with torch.device("meta"):
        model = create_model("cgformer_swin_base")
        official = {key: torch.empty(shape) for key, (shape, _) in recorded["keys"].items()}
    conversion = model.convert_state_dict(official)
    assert not conversion.unmatched
    assert not conversion.missing
    assert len(conversion.renamed) + len(conversion.dropped) == recorded["num_keys"]
    assert sum(p.numel() for p in model.parameters()) == recorded["total_parameters"] - UNUSED
    groups = model.param_groups(1e-4, 1e-4)
    check_param_groups(model, groups)
    assert {g["name"]: g["lr"] for g in groups} == {"decoder": 1e-4, "fusion": 1e-4, "vision": 5e-5, "text": 5e-5}


def test_recorded_evaluation_without_noise(shared_dir):
    folder = shared_dir / "goldens/cgformer"
    recorded = load_file(folder / "tiny.safetensors")
    config = json.loads((folder / "tiny.json").read_text())["config"]
    model, _ = compare.load_model(recorded_cgformer.ADAPTER, config, compare.official_weights(recorded))
    model.assignment_noise = False
    with torch.no_grad():
        logits = model.eval()(compare.default_batch(recorded)).logits
    torch.testing.assert_close(logits, recorded["output.logits_nonoise"], rtol=0, atol=5e-6)


def test_noise_belongs_to_the_sample(tiny):
    """The same key gives the same mask wherever the sample lies in a batch; another key another one."""
    batch = batch_of()
    swapped = batch._replace(**{name: getattr(batch, name).flip(0) for name in ("image", "input_ids", "text_mask")})
    with torch.no_grad():
        logits = tiny(batch).logits
        again = tiny(swapped._replace(random_key=batch.random_key.flip(0))).logits.flip(0)
        other = tiny(batch._replace(random_key=batch.random_key + 7)).logits
    torch.testing.assert_close(again, logits)
    assert not torch.equal(other, logits)


def test_noise_is_gumbel(tiny):
    noise = tiny.decoder.noise(torch.arange(64), 0, 500)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (70, 101)])
def test_shapes_at_any_size(tiny, height, width):
    with torch.no_grad():
        output = tiny(batch_of(height, width))
    assert output.logits.shape == (2, 1, height, width)
    assert all(output.aux[f"assigned{i}"].shape[0] == 2 for i in range(3))


def test_suppressed_positions_are_not_read():
    torch.manual_seed(0)
    grouping = Grouping(16, dropout=0.0)
    tokens, visual = torch.randn(1, 2, 16), torch.randn(1, 6, 16)
    suppressed = torch.tensor([[True, True, False, False, False, False]])
    changed = torch.where(suppressed[..., None], torch.randn(1, 6, 16), visual)
    with torch.no_grad():
        one, other = (grouping(tokens, maps, None, suppressed)[0] for maps in (visual, changed))
    torch.testing.assert_close(one, other)


def test_loss_by_hand():
    """Logits 0 give log 2; one half everywhere against an empty mask of n pixels gives 1 - 1 / (n / 2 + 1)."""
    batch = batch_of(8, 8)
    aux = {f"assigned{i}": torch.zeros(2, 4, 4) for i in range(3)}
    parts = create_loss("cgformer")(ModelOutput(torch.zeros(2, 1, 8, 8), aux), batch)
    expected = 0.693147 + (1 - 1 / 33) + (0.001 + 0.01 + 0.1) * (1 - 1 / 9)
    assert parts["loss"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="assigned0"):
        create_loss("cgformer")(ModelOutput(torch.zeros(2, 1, 8, 8)), batch)
