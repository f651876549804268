"""What every registered model must do. A new baseline is tested as soon as it is registered.

Its full-size parameter counts belong in `PARAMETERS`. Small models (fewer than 20 M parameters) run; full-size ones are
built without memory on the meta device.
"""

import inspect
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from amltrain.commands.train import read_run
from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.aml.method import AML
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import build_method
from amltrain.models import RISModel, check_param_groups, create_model, list_models, model_builder, model_info
from amltrain.records import Batch

PARAMETERS = {
    "barleria_eva02_base": (175_836_962, 26_186_785),
    "barleria_vit_base": (176_136_738, 26_706_721),
    "beit3_base": (223_352_323, 223_352_323),
    "beit3_large": (675_461_379, 675_461_379),
    "c3vg_beit3_base": (240_294_729, 240_294_729),
    "caris_lite": (29_266_912, 29_266_912),
    "caris_swin_base": (226_572_664, 226_572_664),
    "caris_swin_tiny": (166_832_250, 166_832_250),
    "cgformer_swin_base": (249_506_171, 249_506_171),
    "cris_r101": (161_251_682, 161_251_681),
    "cris_r50": (146_849_122, 146_849_121),
    "deris_b": (291_193_229, 242_354_627),
    "deris_l": (781_274_427, 694_394_051),
    "detris_base": (175_529_778, 25_518_129),
    "detris_large": (394_106_930, 26_306_097),
    "detris_large_mixed": (424_327_842, 56_527_009),
    "dual_dinov3_base": (225_412_992, 225_412_992),
    "dual_eva02_base": (180_505_728, 179_849_856),
    "dual_siglip2_base": (406_114_176, 398_436_480),
    "dual_tipsv2_base": (226_826_880, 226_826_880),
    "etris_r101": (146_923_938, 26_328_129),
    "etris_r50": (132_783_522, 28_819_009),
    "etris_vit_base": (173_259_330, 23_829_313),
    "evfsam2_beit3_large": (890_932_341, 674_013_440),
    "evfsam_beit3_large": (1_315_098_084, 677_520_000),
    "gsva_7b": (7_708_935_652, 287_707_520),
    "lavt_swin_base": (225_642_362, 187_629_434),
    "lisa_7b": (7_708_927_460, 287_699_328),
    "magnet_swin_base": (289_564_024, 289_564_024),
    "rela_r50": (153_368_197, 115_355_269),
    "rela_swin_base": (225_521_469, 187_508_541),
    "rela_swin_tiny": (162_560_575, 124_547_647),
    "remamber_conv": (254_578_177, 254_578_177),
    "remamber_mamba": (281_551_937, 281_551_937),
    "sam3": (840_376_374, 29_571_634),
    "sam3_instances": (840_376_374, 31_150_902),
}
"""Full size: all parameters and trained ones. Those of the releases, less what a model's header says is left out."""

TINY = [name for name in list_models() if name not in PARAMETERS]
VOCABULARY = 64
DROPOUTS = ("dropout", "drop_path_rate", "text_dropout")


def build(name: str, dropout: float = 0.0) -> RISModel:
    torch.manual_seed(0)
    accepted = inspect.signature(model_builder(name)).parameters
    return create_model(name, vocab_size=VOCABULARY, **{key: dropout for key in DROPOUTS if key in accepted})


def make_batch(name: str, height: int, width: int, count: int = 2) -> Batch:
    torch.manual_seed(1)
    tokens = model_info(name).preprocess.max_tokens
    real = torch.arange(tokens) < torch.tensor([[tokens - 3 * i] for i in range(count)])
    target = torch.zeros(count, height, width, dtype=torch.uint8)
    target[:, height // 4 : height // 2, width // 3 : width // 2] = 255
    return Batch(
        image=torch.randn(count, 3, height, width),
        input_ids=torch.randint(5, VOCABULARY, (count, tokens)) * real,
        text_mask=real,
        target=target,
        no_target=torch.zeros(count, dtype=torch.bool),
        sample_id=torch.arange(count),
        random_key=torch.arange(count) + 77,
        geometry=torch.zeros(count, 6, dtype=torch.float64),
        regions=(target // 127),
    )


def loss_of(name: str, model: RISModel, batch: Batch) -> torch.Tensor:
    info = model_info(name)
    return create_loss(info.loss, **info.loss_kwargs)(model(batch), batch)["loss"]


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch(name: str) -> Batch:
    return make_batch(name, 70, 98)


@pytest.mark.parametrize("full", list(PARAMETERS))
def test_full_size(full: str) -> None:
    with torch.device("meta"):
        model = create_model(full)
    parameters = list(model.parameters())
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    assert counts == PARAMETERS[full]
    check_param_groups(model, model.param_groups(lr=1e-4, weight_decay=0.01))


def test_what_is_not_full_size_is_small(name: str) -> None:
    assert name.endswith("_tiny")
    assert sum(p.numel() for p in build(name).parameters()) < 20e6


@pytest.mark.parametrize("registered", list_models())
def test_every_entry_is_complete(registered: str) -> None:
    info = model_info(registered)
    assert all(
        isinstance(text, str) and text for text in (info.paper, info.official_code, info.licence, info.aml_scores)
    )
    assert None not in asdict(info.preprocess).values()
    assert None not in [value for key, value in asdict(info.protocol).items() if key != "no_target_pixels"]
    create_loss(info.loss, **info.loss_kwargs)
    parameters = inspect.signature(model_builder(registered)).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    assert {"vision_weights", "text_weights", "vocab_size"} <= {p.name for p in parameters}
    assert model_builder(registered).__doc__


@pytest.mark.parametrize("registered", list_models())
def test_every_model_has_a_config_that_builds_it(registered: str, repository: Path) -> None:
    config = read_run(["--config", str(repository / "configs" / "models" / f"{registered}.yaml")])
    assert config.model.name == registered
    assert config.loss.name in (None, model_info(registered).loss)
    with torch.device("meta"):
        create_model(registered, **config.model.kwargs)


def test_an_argument_that_a_model_does_not_take_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*'vocab_sise'; did you mean vocab_size.*model\.kwargs\.vocab_sise"):
        create_model(name, vocab_sise=3)


@pytest.mark.parametrize("size", [(70, 98), (97, 65), (96, 96)])
def test_every_trained_parameter_gets_a_gradient_at_any_size(name: str, size: tuple[int, int]) -> None:
    model, batch = build(name).train(), make_batch(name, *size)
    loss = loss_of(name, model, batch)
    loss.backward()
    assert loss.shape == ()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert (without, frozen, broken) == ([], [], [])


@torch.no_grad()
def test_evaluation_is_deterministic_and_sample_by_sample(name: str, batch: Batch) -> None:
    model = build(name, dropout=0.5).eval()
    output = model(batch)
    assert output.logits.shape[:2] in ((2, 1), (2, 2))
    assert output.logits.isfinite().all()
    torch.testing.assert_close(model(batch).logits, output.logits, rtol=0, atol=0)
    for i in range(2):
        alone = batch.mapped(lambda part, i=i: part[i : i + 1])
        torch.testing.assert_close(model(alone).logits, output.logits[i : i + 1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_words_are_read_and_the_image_too(name: str, batch: Batch) -> None:
    model = build(name).eval()
    logits = model(batch).logits
    other_words = batch._replace(input_ids=batch.input_ids.roll(1, 1), text_mask=batch.text_mask)
    assert not torch.allclose(model(other_words).logits, logits, atol=1e-6)
    assert not torch.allclose(model(batch._replace(image=batch.image.flip(0))).logits, logits, atol=1e-6)


@torch.no_grad()
def test_forward_is_encode_and_decode(name: str, batch: Batch) -> None:
    model = build(name).eval()
    features = model.encode(batch)
    expected = model(batch).logits
    torch.testing.assert_close(model.decode(features, batch).logits, expected)
    again = model.reencode_image(batch, model.encode(batch._replace(image=torch.zeros_like(batch.image))))
    if torch.equal(again.text, features.text):  # else the words are conditioned on the image, and are kept
        torch.testing.assert_close(model.decode(again, batch).logits, expected)


@torch.no_grad()
def test_weights_survive_a_file(name: str, batch: Batch) -> None:
    model = build(name).eval()
    torch.manual_seed(9)
    copy = create_model(name, vocab_size=VOCABULARY).eval()
    assert not torch.allclose(copy(batch).logits, model(batch).logits)
    copy.load_state_dict(load(save({k: v.contiguous() for k, v in model.state_dict().items()})), strict=True)
    torch.testing.assert_close(copy(batch).logits, model(batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, batch: Batch, dtype: torch.dtype) -> None:
    model = build(name).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(name, model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = loss_of(name, build(name).train(), batch)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_checkpointing_changes_nothing(name: str, batch: Batch) -> None:
    gradients = []
    for enabled in (False, True):
        model = build(name).train()
        model.set_gradient_checkpointing(enabled)
        loss_of(name, model, batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-6)


def test_traced_whole(name: str, batch: Batch) -> None:
    """torch.compile finds nothing that breaks the graph; what can be traced, any of its backends can compile."""
    torch._dynamo.reset()
    model = build(name).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(batch)
    torch.testing.assert_close(compiled.logits, build(name).train()(batch).logits, rtol=1e-4, atol=1e-5)


def test_param_groups(name: str) -> None:
    model = build(name)
    groups = model.param_groups(lr=0.5, weight_decay=0.25)
    check_param_groups(model, groups)
    assert all(set(group) == {"name", "params", "lr", "weight_decay"} for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(0 < group["lr"] <= 0.5 and group["weight_decay"] in (0.0, 0.25) for group in groups)


@torch.no_grad()
def test_channels_of_its_logits_and_its_loss(name: str, batch: Batch) -> None:
    info = model_info(name)
    channels = build(name).eval()(batch).logits.shape[1]
    assert channels == build(name).mask_channels == create_loss(info.loss, **info.loss_kwargs).channels


@torch.no_grad()
def test_what_aml_scores(name: str, batch: Batch) -> None:
    model = build(name).eval()
    scored = model.alignment_features(batch)
    assert (scored.visual.shape[1], scored.text.shape[2]) == model.alignment_dims
    assert scored.visual.ndim == 4
    assert scored.text.shape[:2] == batch.input_ids.shape
    assert torch.equal(scored.text_mask, batch.text_mask)
    if model.fused_dims is not None:
        aux = model(batch).aux
        assert (aux["fused_visual"].shape[1], aux["fused_text"].shape[2]) == model.fused_dims


VARIANTS = [
    {},
    {"preset": "released"},
    {"features": "late"},
    {"features": "pred"},
    {"level": "feature"},
    {"level": "random"},
    {"projection": "learnable"},
    {"projection": "identity"},
    {"stage1_size": 56},
    {"level": "loss"},
    {"features": "oracle", "share": 0.2},
    {"dynamic_tau": 0.5},
]
IDENTITY = {"projection": "identity"}
REJECTED = {
    "lavt_tiny": [{"level": "feature"}, IDENTITY],
    "cris_tiny": [],
    "etris_tiny": [],
    "barleria_tiny": [],
    "remamber_tiny": [{"level": "feature"}, IDENTITY],
    "beit3_tiny": [{"level": "feature"}],
    "c3vg_tiny": [{"level": "feature"}],
    "deris_tiny": [{"level": "feature"}, {"level": "loss"}],
    "evfsam2_tiny": [{"level": "feature"}],
    "evfsam_tiny": [{"level": "feature"}],
    "dual_tiny": [],
    "mllm_tiny": [{"features": "late"}, {"level": "feature"}],
    "sam3_tiny": [{"level": "feature"}],
    "sam3_instances_tiny": [{"level": "feature"}],
}
"""Variants that a model cannot have. The others' encoders share no space, so only identity is rejected."""


def aml_task(name: str, **options) -> AML:
    """Masks much: untrained features are much alike, and a test where nothing is masked tests little."""
    info = model_info(name)
    aml = AMLOptions(**{"tau": 0.8, **options})
    return build_method("aml", build(name).train(), create_loss(info.loss, **info.loss_kwargs), aml)


def check_aml_step(task: AML, batch: Batch, autocast: torch.dtype | None = None) -> None:
    task.calibrate([batch])
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        result = task(batch)
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert 0 < result["masked_share"] <= 1
    assert 0 < result["mean_score"] <= 1
    assert not any(value.requires_grad for key, value in result.items() if key != "loss")
    trained = {n: p.grad for n, p in task.named_parameters() if p.requires_grad}
    assert [n for n, gradient in trained.items() if gradient is None or not gradient.isfinite().all()] == []


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_aml_trains_it(name: str, options: dict) -> None:
    if options in REJECTED.get(name, [IDENTITY]):
        with pytest.raises(UserError, match=r"^aml\.[^\n]*; use [^\n]*$"):
            aml_task(name, **options)
    else:
        check_aml_step(aml_task(name, **options), make_batch(name, 70, 98, count=4))


def test_aml_trains_it_in_half_precision(name: str) -> None:
    check_aml_step(aml_task(name), make_batch(name, 70, 98, count=4), torch.bfloat16)
