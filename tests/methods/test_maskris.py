"""MaskRIS: recorded tensors of the official code, masking of words and blocks, borrowed maskers, what is rejected."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.base import Masker, Masking, build_method, mask_image
from amltrain.methods.maskris import (
    MaskRIS,
    MaskRISOptions,
    RandomMasker,
    distillation_loss,
    drop_words,
    hide_by_rank,
    mask_words,
)
from amltrain.models import create_model, model_info
from amltrain.records import Vocabulary
from tests.methods.aml.test_method import make_batch
from tests.parity import compare

BERT = Vocabulary(size=200, padding=0, mask=103, special=(0, 100, 101, 102, 103))
CLIP = Vocabulary(size=500, padding=0, mask=None, special=(0, 498, 499))


class Recorded(Masker):
    """Blocks from recorded noise."""

    def __init__(self, noise: torch.Tensor, ratio: float, block: int) -> None:
        super().__init__()
        self.noise, self.ratio, self.block = noise, ratio, block

    def forward(self, model, batch, features=None, output=None) -> Masking:
        side = batch.image.shape[-1] // self.block
        return Masking(hide_by_rank(self.noise, self.ratio).unflatten(1, (side, side)))


def recorded_words(ids: torch.Tensor, vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The official draws: Python's random, one number per position and one more per random replacement."""
    import random

    random.seed(seed)
    draws, replacements = torch.ones(ids.shape, dtype=torch.float64), torch.zeros_like(ids)
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            draw = random.random()
            draws[row, column] = draw
            if draw < 0.5 and int(ids[row, column]) not in BERT.special and 0.8 <= draw / 0.5 < 0.9:
                replacements[row, column] = random.randrange(vocabulary)
    return draws, replacements


def test_recorded_step_of_the_official_code(shared_dir: Path) -> None:
    """Masked image and ids equal bit for bit; losses, logits and gradients within the card's tolerances."""
    folder = shared_dir / "goldens"
    recorded = load_file(folder / "maskris" / "tiny.safetensors")
    facts = json.loads((folder / "maskris" / "tiny.json").read_text())
    config = compare.read_config(folder / "caris" / "tiny.json")
    weights = compare.official_weights(load_file(folder / "caris" / "tiny.safetensors"))
    model, renamed = compare.load_model(compare.load_adapter("caris"), config, weights)
    batch = compare.default_batch(recorded)
    options = MaskRISOptions(text_ratio=0.5)
    masker = Recorded(recorded["aug.noise"], facts["args"]["ratio"], facts["args"]["p"])
    vocabulary = BERT._replace(size=facts["vocab_size"])
    method = MaskRIS(model, create_loss("weighted_cross_entropy"), masker, vocabulary, options)

    draws, replacements = recorded_words(batch.input_ids, facts["vocab_size"], facts["args"]["tseed"])
    ids = mask_words(batch.input_ids, draws, replacements, vocabulary, options)
    assert torch.equal(ids, recorded["aug.ids_masked"])
    assert (ids != batch.input_ids).any()
    blocks = masker(model, batch).blocks
    assert torch.equal(mask_image(batch.image, blocks, masker.block), recorded["aug.image_masked"])

    method.masked_sentences = lambda batch: batch._replace(input_ids=ids)
    logits = []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.logits))
    result = method(batch)
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(logits[0], recorded["output.logits"], **close)
    torch.testing.assert_close(logits[1], recorded["output.logits_masked"], **close)
    assert result["clean_loss"].item() == pytest.approx(recorded["output.loss_org"].item(), abs=2e-6)
    assert result["distillation_loss"].item() == pytest.approx(recorded["output.loss_sub"].item(), abs=2e-6)

    result["loss"].backward()
    parameters = dict(model.named_parameters())
    for name, gradient in recorded.items():
        if name.startswith("grad_total."):
            ours = parameters[renamed[name.removeprefix("grad_total.")]].grad
            assert (ours - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_words_are_masked_replaced_and_kept_in_their_shares() -> None:
    ids = torch.randint(104, 200, (400, 50), generator=torch.Generator().manual_seed(0))
    draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    masked = mask_words(ids, draws, torch.full_like(ids, 7), BERT, MaskRISOptions(text_ratio=0.3))
    assert (masked == 103).float().mean().item() == pytest.approx(0.24, abs=0.01)
    assert (masked == 7).float().mean().item() == pytest.approx(0.03, abs=0.01)
    special = torch.tensor([[0, 100, 101, 102, 103]])
    everything = MaskRISOptions(text_ratio=1.0)
    assert torch.equal(mask_words(special, torch.zeros(1, 5), torch.full_like(special, 7), BERT, everything), special)


def test_dropped_words_close_up() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 0, 0]])
    mask = torch.tensor([[True, True, True, True, False, False]])
    kept, kept_mask = drop_words(ids, mask, torch.tensor([[False, True, False, False, False, False]]), padding=0)
    assert kept.tolist() == [[5, 7, 8, 0, 0, 0]]
    assert kept_mask.tolist() == [[True, True, True, False, False, False]]


def test_every_image_loses_the_same_number_of_blocks_and_each_its_own() -> None:
    batch = make_batch(size=(96, 80))
    blocks = RandomMasker(ratio=0.75, block=32)(None, batch).blocks
    assert blocks.shape == (2, 3, 3)
    assert blocks.flatten(1).sum(1).tolist() == [7, 7]
    other = RandomMasker(0.75, 32)(None, batch._replace(random_key=batch.random_key + 1)).blocks
    assert not torch.equal(blocks, other)


def test_one_channel_is_distilled_against_the_sigmoid() -> None:
    student, teacher = torch.randn(2, 1, 4, 4, requires_grad=True), torch.randn(2, 1, 4, 4, requires_grad=True)
    distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.sigmoid() - teacher.sigmoid()) / 32)
    assert teacher.grad is None


@pytest.mark.parametrize("masker", ["random", "aml"])
@pytest.mark.parametrize("name", ["caris_tiny", "cris_tiny", "rela_tiny"])
def test_a_step_trains_every_parameter(name: str, masker: str) -> None:
    torch.manual_seed(0)
    info = model_info(name)
    model = create_model(name)
    options = MaskRISOptions(masker=masker, masker_options={"tau": 0.95} if masker == "aml" else {})
    vocabulary = CLIP if name.startswith("cris") else BERT
    method = build_method("maskris", model, create_loss(info.loss, **info.loss_kwargs), options, vocabulary)
    batch = make_batch(size=(96, 96))
    method.setup([batch])
    method.train()
    result = method(batch)
    result["loss"].backward()
    assert 0 < result["masked_share"] <= 1
    assert not any(value.requires_grad for key, value in result.items() if key != "loss")
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert method.summary().startswith(f"maskris, masker {masker}, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masker": "randm"}, "unknown masker 'randm'; did you mean random"),
        ({"masker_options": {"ratoi": 0.5}}, "unknown option of masker random 'ratoi'; did you mean ratio"),
        ({"masker_options": {"ratio": "much"}}, "option ratio of masker random is 'much', not float"),
        ({"masker_options": {"ratio": 1.5}}, "ratio of masker random is 1.5 and must lie between 0 and 1"),
        ({"masker": "aml", "masker_options": {"level": "feature"}}, "belong to method aml"),
        ({"text_ratio": 2.0}, r"maskris\.text_ratio is 2\.0"),
        ({"mask_share": 0.8, "replace_share": 0.3}, "may add up to 1 at most"),
    ],
    ids=str,
)
def test_what_cannot_work_is_rejected(options: dict, message: str) -> None:
    model, loss = create_model("caris_tiny"), create_loss("weighted_cross_entropy")
    with pytest.raises(UserError, match=message):
        build_method("maskris", model, loss, MaskRISOptions(**options), BERT)
