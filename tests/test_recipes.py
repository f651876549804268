"""Every recipe, and every full-size model's file, trains as the official code. The numbers here are the official ones.

Written as the official code writes them: lengths and milestones in epochs (steps for ReLA), batches over all GPUs.
"""

import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from amltrain.commands.train import read_run
from amltrain.config.files import shipped_configs
from amltrain.config.schema import RunConfig
from amltrain.models import model_info

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = CONFIGS / "recipes"
NAMES = [name.removeprefix("recipes/") for name in shipped_configs() if re.match("recipes/[^/]*/", name)]
"""Files and the variants inside them."""
CLASSIC = ["refcoco", "refcoco+", "refcocog"]


class Official(NamedTuple):
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    milestones: tuple[int, ...]
    length: int
    batch: int
    precision: str
    clip_norm: float | None
    sync_batchnorm: bool
    size: int
    tokens: int
    train_unit: str
    best_metric: str
    mask_parts: str
    loss: str
    amsgrad: bool = False
    warmup: int = 0
    first_epoch_full_lr: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


CARIS = Official(
    *("adamw", 1e-4, 0.01, "poly_caris", (), 50, 16, "fp16", 1.0, False, 448, 20, "referent", "oIoU"),
    *("union", "weighted_cross_entropy"),
    warmup=1500,
)
CGFORMER = Official(
    *("adamw", 1e-4, 1e-4, "poly", (), 50, 64, "fp16", None, True, 480, 20, "referent", "oIoU"),
    *("exclusive", "cgformer"),
    amsgrad=True,
)
ETRIS = Official(
    *("adam", 1e-4, 0.0, "multistep", (35,), 50, 32, "fp16", None, True, 416, 17, "referent", "mIoU"),
    *("union", "binary_cross_entropy"),
)
CRIS = ETRIS._replace(batch=64, first_epoch_full_lr=True)
DETRIS = ETRIS._replace(milestones=(35, 55), length=65, size=448)
LAVT = Official(
    *("adamw", 5e-5, 0.01, "poly", (), 40, 32, "no", None, True, 480, 20, "referent", "oIoU"),
    *("exclusive", "weighted_cross_entropy"),
)
MILESTONES = (110_000, 140_000)
RELA = Official(
    *("adamw", 1e-5, 0.05, "multistep", MILESTONES, 150_000, 48, "fp16", 0.01, False, 480, 20, "sentence", "cIoU"),
    *("union", "rela"),
)
SHORT = DETRIS._replace(milestones=(35,), length=50)
MAGNET = LAVT._replace(loss="cross_entropy_dice")  # ours: the official code cannot train
REMAMBER = Official(
    *("adamw", 5e-5, 1e-4, "cosine", (), 50, 64, "fp16", None, False, 480, 20, "referent", "mIoU"),
    *("union", "cross_entropy_dice"),
)
BARLERIA = ETRIS._replace(loss="barleria")
C3VG = Official(
    *("adam", 5e-4, 0.0, "multistep", (24,), 30, 32, "no", 0.15, False, 320, 20, "referent", "mIoU", "union", "c3vg"),
    amsgrad=True,
    betas=(0.9, 0.98),
    eps=1e-9,
)
DERIS = C3VG._replace(  # on gRefCOCO; the official batch is 1 per GPU, of an unknown number
    lr=1e-4,
    milestones=(5,),
    length=6,
    batch=16,
    size=384,
    tokens=50,
    train_unit="sentence",
    best_metric="cIoU",
    loss="deris",
)
OFFICIAL = {
    **{f"magnet/{name}": MAGNET for name in CLASSIC},
    **{f"remamber/{name}": REMAMBER for name in CLASSIC},
    **{f"barleria/{name}": BARLERIA for name in CLASSIC},
    **{f"paper/{name}": CARIS for name in [*CLASSIC, "combined"]},
    **{f"paper/{name}_10_epochs": CARIS._replace(length=10) for name in ("refcoco", "refcoco+")},  # the AML paper's
    **{f"cgformer/{name}": CGFORMER for name in CLASSIC},
    **{f"lavt/{name}": LAVT for name in CLASSIC},
    **{f"cris/{name}": CRIS._replace(tokens=22 if name == "refcocog" else 17) for name in CLASSIC},
    **{f"etris/{name}": ETRIS._replace(tokens=22 if name == "refcocog" else 17) for name in CLASSIC},
    **{f"detris/{name}": DETRIS._replace(tokens=22 if name == "refcocog" else 17) for name in CLASSIC},
    "detris/refcocog-google": SHORT,
    "detris/mixed": SHORT,
    "c3vg/combined": C3VG,
    **dict.fromkeys(["deris/grefcoco", "deris/grefcoco_l"], DERIS),
    **dict.fromkeys(
        ["deris/combined", "deris/combined_l"],
        DERIS._replace(milestones=(14, 18), length=20, tokens=20, train_unit="referent", best_metric="mIoU"),
    ),
    "rela/grefcoco": RELA,
    "rela/grefcoco_5k": RELA._replace(schedule="constant", milestones=(), length=5_000),  # the AML paper's row
}
OURS = ["evfsam/combined", "beit3/refcoco", "sam3/refcoco", "dual/refcoco"]
"""Nobody published how these are trained."""
LAYERS = {
    "c3vg_beit3_base": C3VG,
    **dict.fromkeys(["deris_b", "deris_l"], DERIS),
    "magnet_swin_base": MAGNET,
    **dict.fromkeys(["remamber_conv", "remamber_mamba"], REMAMBER),
    **dict.fromkeys(["barleria_vit_base", "barleria_eva02_base"], BARLERIA),
    **dict.fromkeys(["caris_swin_base", "caris_swin_tiny"], CARIS),
    "cgformer_swin_base": CGFORMER,
    **dict.fromkeys(["cris_r101", "cris_r50"], CRIS),
    "detris_base": DETRIS,
    **dict.fromkeys(["detris_large", "detris_large_mixed"], SHORT),
    **dict.fromkeys(["etris_r101", "etris_r50", "etris_vit_base"], ETRIS),
    "lavt_swin_base": LAVT,
    **dict.fromkeys(["rela_swin_base", "rela_swin_tiny", "rela_r50"], RELA),
}
NO_OFFICIAL_RECIPE = {
    *("dual_dinov3_base", "dual_siglip2_base", "dual_eva02_base", "dual_tipsv2_base", "caris_lite"),
    *("beit3_base", "beit3_large", "sam3", "sam3_instances", "evfsam_beit3_large", "evfsam2_beit3_large"),
    *("gsva_7b", "lisa_7b"),
}
"""Our own combinations, models that were published for other tasks, those whose training was not published, and those
whose official training mixes data of kinds that are not here (tests/models/test_mllm.py compares their schedule)."""


@cache
def parse(name: str) -> RunConfig:
    return read_run(["--config", f"recipes/{name}"])


def as_trained(run: RunConfig) -> Official:
    """The run's numbers in the official code's terms, with the model's own values filled in."""
    optim, train = run.optim, run.train
    info = model_info(run.model.name)
    length = train.max_steps or train.epochs
    return Official(
        optimizer=optim.optimizer,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        schedule=optim.schedule,
        milestones=tuple(round(share * length, 6) for share in optim.milestones),
        length=length,
        batch=train.global_batch_size,
        precision=train.mixed_precision,
        clip_norm=optim.clip_norm,
        sync_batchnorm=train.sync_batchnorm,
        size=run.preprocess.size or info.preprocess.size,
        tokens=run.preprocess.max_tokens or info.preprocess.max_tokens,
        train_unit=run.data.train_unit,
        best_metric=run.evaluation.best_metric.rpartition("/")[2],
        mask_parts=run.data.mask_parts or info.protocol.mask_parts,
        loss=run.loss.name or info.loss,
        amsgrad=optim.amsgrad,
        warmup=optim.warmup_steps,
        first_epoch_full_lr=optim.first_epoch_full_lr,
        betas=optim.betas,
        eps=optim.eps,
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_baseline_trains_as_its_official_code(name: str) -> None:
    run = parse(f"{name}.yaml")
    assert as_trained(run) == OFFICIAL[name]
    nothing_else(run)
    assert run.method == "supervised"


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_alone_trains_as_its_official_code(name: str) -> None:
    """The values that a run gets from the file of its model alone; a run in steps must give their number."""
    steps = ["--train.max_steps", str(RELA.length)] if LAYERS[name] is RELA else []
    run = read_run(["--config", str(CONFIGS / "models" / f"{name}.yaml"), *steps])
    assert as_trained(run) == LAYERS[name]
    nothing_else(run)


def nothing_else(run: RunConfig) -> None:
    """What all official codes have in common."""
    assert (run.optim.gamma, run.optim.power) == (0.1, 0.9)
    assert run.train.ema_decay is None


@pytest.mark.parametrize("name", [name for name in NAMES if "_aml" in name or "_released" in name])
def test_aml_changes_nothing_else(name: str) -> None:
    """Against the baseline's recipe, only `aml`, the output and, where the file's name says so, the length differ."""
    baseline_name = re.sub(r"_(aml|released).*", "", name)
    run, baseline = parse(name), parse(baseline_name)
    expected = as_trained(baseline)
    assert as_trained(run) == (expected._replace(length=10) if "10_epochs" in name else expected)
    for part in ("data", "model", "loss", "preprocess"):
        assert getattr(run, part) == getattr(baseline, part), part
    assert run.method == "aml"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_run_it(name: str) -> None:
    found = shipped_configs()[f"recipes/{name}"]
    if found.variant is None:
        header = found.path.read_text().split("\n\n")[0]
        assert f"amltrain train --config recipes/{name}" in header
        assert "# Ours: " in header
    else:
        header = found.path.read_text().split(f"\n  {found.variant}:\n")[0].split("\n    ")[-1]
    assert "# Published" in header
    assert parse(name).output == f"runs/{name}"


def test_every_recipe_is_compared() -> None:
    plain = {name for name in NAMES if not re.search("_(aml|released|mask_grounding)|magnet/.*_10_epochs", name)}
    assert plain == {*OFFICIAL, *OURS}


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_of_ours_says_so(name: str) -> None:
    header = shipped_configs()[f"recipes/{name}"].path.read_text().split("\n\n")[0]
    assert "ours" in header.split("# Published")[0]


def test_every_full_size_model_is_compared() -> None:
    models = {path.stem for path in (CONFIGS / "models").glob("*.yaml")}
    assert {name for name in models if not name.endswith("_tiny")} | {"caris_swin_tiny", "rela_swin_tiny"} == (
        set(LAYERS) | NO_OFFICIAL_RECIPE
    )


def blocks(path: Path) -> Iterator[tuple[str, frozenset[tuple[str, str]]]]:
    """The groups of a config file, with the settings that stand in this file."""

    def walk(prefix: str, group: dict[str, object]) -> Iterator[tuple[str, frozenset[tuple[str, str]]]]:
        yield prefix, frozenset((key, repr(value)) for key, value in group.items() if not isinstance(value, dict))
        for key, value in group.items():
            if isinstance(value, dict):
                yield from walk(f"{prefix}{key}.", value)

    yield from walk("", yaml.safe_load(path.read_text()))


def repeated(paths: list[Path]) -> list[str]:
    """Pairs of files with the same three settings in a group, or with a whole group of at least two in common."""
    found = []
    groups = {path: dict(blocks(path)) for path in paths}
    for one, two in itertools.combinations(paths, 2):
        other = groups[two]
        for group, settings in groups[one].items():
            common = settings & other.get(group, frozenset())
            if len(common) > 2 or (len(common) == 2 and common in (settings, other[group])):
                found.append(f"{one.name} and {two.name}: {group} {sorted(common)}")
    return found


def test_no_block_of_settings_is_in_two_files(tmp_path: Path) -> None:
    paths = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "accelerate"]
    assert len(paths) > 70
    assert repeated(paths) == []
    (tmp_path / "one.yaml").write_text("optim: {lr: 1, schedule: poly, power: 2, eps: 3}\n")
    (tmp_path / "two.yaml").write_text("optim: {lr: 1, schedule: poly, power: 2, eps: 4}\n")
    assert len(repeated([tmp_path / "one.yaml", tmp_path / "two.yaml"])) == 1


def test_one_suffix() -> None:
    assert {path.suffix for path in CONFIGS.rglob("*") if path.is_file()} == {".yaml"}
