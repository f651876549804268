"""Every table and figure of the AML paper (arXiv 2602.22740) with a published number or a command, as data.

Published values are those of the paper. None: the value is not known to us, so only ours is printed.
"""

from collections.abc import Sequence

from amltrain.errors import unknown_name
from amltrain.paper.plan import Row, Run, Table
from amltrain.paper.published import (
    ALIGNMENT,
    AML,
    CARIS,
    CLASSIC,
    COVERAGE,
    FIVE,
    LOSS_EPOCHS,
    LOSSES,
    NO_TAU,
    PERTURBED,
    PRECISIONS,
    RHOS,
    SCORES,
    SECOND,
    SHARE_ROWS,
    TAUS,
    TEN,
)

FIRST_TEN = Run(CARIS, 10, True), Run(AML, 10, True)


def _cells(dataset: str, **metrics: Sequence[float | None]) -> dict[str, float | None]:
    """Published values by metric, in the order of the data set's splits."""
    splits = CLASSIC[dataset][1]
    return {
        f"{dataset}:{split}/{metric}": value
        for metric, values in metrics.items()
        for split, value in zip(splits, values, strict=True)
    }


def _val(value: float | None, **more: float | None) -> dict[str, float | None]:
    return {"refcoco+:val/oIoU": value, **{f"refcoco+:{name}/oIoU": other for name, other in more.items()}}


def _on(dataset: str, split: str, metrics: Sequence[str], values: Sequence[float | None]) -> dict[str, float | None]:
    """Published values of one split by metric."""
    return {f"{dataset}:{split}/{metric}": value for metric, value in zip(metrics, values, strict=True)}


def _epochs(measure: str, first: Sequence[int], values: Sequence[float | None]) -> dict[str, float | None]:
    """Published values of a measure after each of these epochs."""
    return {f"{measure}, epoch {epoch}": value for epoch, value in zip(first, values, strict=True)}


NAMES = {
    "cris": "CRIS",
    "etris": "ETRIS",
    "barleria": "BarLeRIa",
    "lavt": "LAVT",
    "detris": "DETRIS",
    "cgformer": "CGFormer",
    "magnet": "MagNet",
    "remamber": "ReMamber",
}


def _others(model: str, **metrics: Sequence[Sequence[float] | None]) -> tuple[Row, ...]:
    """Rows of another model; a metric's values by data set, None where the paper has none."""
    rows = []
    for number, (dataset, (shown, splits)) in enumerate(CLASSIC.items()):
        published = {metric: values[number] or (None,) * len(splits) for metric, values in metrics.items()}
        rows.append(Row(f"{NAMES[model]}, {shown}", Run(f"{model}/{dataset}"), _cells(dataset, **published)))
    return tuple(rows)


NOT_TRAINED = Run("")
"""Stands where a system has published values and no recipe here."""


def _published(label: str, *values: Sequence[float], metric: str = "oIoU") -> Row:
    """A system that is not trained here: values by data set."""
    cells: dict[str, float | None] = {}
    for dataset, numbers in zip(CLASSIC, values, strict=True):
        cells |= _cells(dataset, **{metric: numbers})
    return Row(label, NOT_TRAINED, cells, "published")


MAIN = Table(
    ("main", "table1"),
    "main results",
    "every data set on its own",
    (
        Row(
            "CARIS, RefCOCO",
            Run("paper/refcoco"),
            _cells("refcoco", mIoU=(76.77, 79.03, 74.56), oIoU=(74.65, 77.83, 71.70)),
        ),
        Row(
            "CARIS + AML, RefCOCO",
            Run("paper/refcoco_aml"),
            _cells("refcoco", mIoU=(77.89, 79.53, 74.99), oIoU=(75.45, 78.33, 72.12)),
        ),
        Row("CARIS, RefCOCO+", Run(CARIS), _cells("refcoco+", mIoU=(69.33, 74.51, 62.69), oIoU=(65.54, 71.86, 57.97))),
        Row(
            "CARIS + AML, RefCOCO+",
            Run(AML),
            _cells("refcoco+", mIoU=(71.33, 75.61, 64.61), oIoU=(67.37, 73.19, 59.51)),
        ),
        Row("CARIS, RefCOCOg", Run("paper/refcocog"), _cells("refcocog", mIoU=(68.87, 68.51), oIoU=(65.15, 65.00))),
        Row(
            "CARIS + AML, RefCOCOg",
            Run("paper/refcocog_aml"),
            _cells("refcocog", mIoU=(69.24, 69.73), oIoU=(65.67, 66.78)),
        ),
        *(
            Row(
                f"CARIS + AML as in the public code, {shown}",
                Run(f"paper/{name}_released"),
                _cells(name, mIoU=(None,) * len(splits), oIoU=(None,) * len(splits)),
            )
            for name, (shown, splits) in CLASSIC.items()
        ),
        *_others("cris", mIoU=((70.47, 73.18, 66.10), (62.27, 68.08, 53.68), (59.87, 60.36))),
        *_others("etris", mIoU=((71.06, 74.11, 66.66), (62.23, 68.51, 52.79), (60.28, 60.42))),
        *_others("barleria", mIoU=((72.40, 75.90, 68.30), (65.00, 70.80, 56.90), None)),
        *_others(
            "lavt",
            mIoU=((74.46, 76.89, 70.94), (65.81, 70.97, 59.23), (63.34, 63.62)),
            oIoU=((72.73, 75.82, 68.79), (62.14, 68.38, 55.10), (61.24, 62.09)),
        ),
        *_others(
            "detris",
            mIoU=((75.64, 77.39, 73.11), (68.47, 73.03, 60.00), None),
            oIoU=((74.05, 76.68, 71.33), (65.39, 70.82, 55.82), None),
        ),
        *_others(
            "cgformer",
            mIoU=((76.93, 78.70, 73.32), (68.56, 73.76, 61.72), (67.57, 67.83)),
            oIoU=((74.75, 77.30, 70.64), (64.54, 71.00, 57.14), (64.68, 65.09)),
        ),
        *_others(
            "magnet",
            mIoU=((77.43, 79.43, 74.11), (70.10, 74.50, 63.59), (68.53, 69.15)),
            oIoU=((75.24, 78.24, 71.05), (66.16, 71.32, 58.14), (65.36, 66.03)),
        ),
        *_others("remamber", oIoU=((74.54, 76.74, 70.89), (65.00, 70.78, 57.53), (63.90, 64.00))),
        _published("PGBD", (76.45, 78.57, 73.14), (68.82, 73.84, 61.56), (68.42, 67.99), metric="mIoU"),
        _published("PGBD", (74.43, 76.89, 70.91), (65.27, 71.26, 56.98), (65.21, 66.31)),
        _published("NeMo", (74.48, 76.32, 71.51), (62.86, 69.92, 55.56), (64.40, 64.80)),
    ),
    ("The paper does not state whether its public code produced its numbers; preset `released` follows that code.",),
)
COMBINED = Table(
    ("combined",),
    "combined training",
    "one model for three data sets",
    (
        Row(
            "CARIS",
            Run("paper/combined"),
            _cells("refcoco", oIoU=(76.67, 78.24, 71.32))
            | _cells("refcoco+", oIoU=(67.64, 72.77, 60.87))
            | _cells("refcocog", oIoU=(67.44, 69.17)),
        ),
        Row(
            "CARIS + AML",
            Run("paper/combined_aml"),
            _cells("refcoco", oIoU=(77.20, 79.53, 73.61))
            | _cells("refcoco+", oIoU=(68.60, 73.76, 61.55))
            | _cells("refcocog", oIoU=(68.84, 70.01)),
        ),
        _published("PixelLM-7B", (73.0, 76.5, 68.2), (66.3, 71.7, 58.3), (69.3, 70.5)),
        _published("GSVA-7B", (76.4, 77.4, 72.8), (64.5, 67.7, 58.6), (71.1, 72.0)),
        _published("PerceptionGPT-7B", (75.1, 78.6, 71.7), (68.5, 73.9, 61.3), (70.3, 71.7)),
        _published("PolyFormer", (74.82, 76.64, 71.06), (67.64, 72.89, 59.33), (67.76, 69.05)),
        _published("MagNet", (76.55, 78.27, 72.15), (68.10, 73.64, 61.81), (67.79, 69.29)),
    ),
    ("The paper does not state whether test images were left out of training; here they are (data.leak_filter).",),
)
TABLE_2 = Table(
    ("table2", "detris"),
    "Table 2",
    "AML on another baseline",
    (
        Row("CARIS, RefCOCO+", Run(CARIS), _cells("refcoco+", oIoU=(65.54, 71.86, 57.97))),
        Row("CARIS + AML, RefCOCO+", Run(AML), _cells("refcoco+", oIoU=(67.37, 73.19, 59.51))),
        Row("DETRIS, RefCOCO+", Run("detris/refcoco+"), _cells("refcoco+", oIoU=(65.39, 70.82, 55.82))),
        Row("DETRIS + AML, RefCOCO+", Run("detris/refcoco+_aml"), _cells("refcoco+", oIoU=(66.20, 71.20, 56.80))),
    ),
)
GRES = Table(
    ("gres", "grefcoco", "table11"),
    "Table 11",
    "ReLA on generalized expressions",
    (
        Row("ReLA, 5,000 steps", Run("rela/grefcoco_5k"), {"grefcoco:val/cIoU": 28.49, "grefcoco:val/gIoU": 17.33}),
        Row(
            "ReLA + AML, 5,000 steps",
            Run("rela/grefcoco_5k_aml"),
            {"grefcoco:val/cIoU": 30.86, "grefcoco:val/gIoU": 21.08},
        ),
        Row("ReLA, 150,000 steps", Run("rela/grefcoco"), {"grefcoco:val/cIoU": 62.50, "grefcoco:val/gIoU": 63.25}),
        Row(
            "ReLA + AML, 150,000 steps",
            Run("rela/grefcoco_aml"),
            {"grefcoco:val/cIoU": 62.61, "grefcoco:val/gIoU": 63.52},
        ),
    ),
    ("Ours is the best model on val; the official code reports its last one.",),
)
TABLE_3 = Table(
    ("table3",),
    "Table 3",
    "early training",
    (
        Row("MagNet, RefCOCO", Run("magnet/refcoco_10_epochs"), {"refcoco:val/oIoU": 68.52}),
        Row("CARIS, RefCOCO", Run("paper/refcoco_10_epochs"), {"refcoco:val/oIoU": None}),
        Row("CARIS + AML, RefCOCO", Run("paper/refcoco_aml_10_epochs"), {"refcoco:val/oIoU": 71.83}),
        Row("CARIS + AML, RefCOCO, 10 of 50", Run("paper/refcoco_aml_10_of_50_epochs"), {"refcoco:val/oIoU": 71.83}),
        Row("MagNet, RefCOCO+", Run("magnet/refcoco+_10_epochs"), _val(57.26)),
        Row("CARIS, RefCOCO+", Run("paper/refcoco+_10_epochs"), _val(None)),
        Row("CARIS + AML, RefCOCO+", Run("paper/refcoco+_aml_10_epochs"), _val(63.79)),
        Row("CARIS + AML, RefCOCO+, 10 of 50", Run("paper/refcoco+_aml_10_of_50_epochs"), _val(63.79)),
        Row(
            "ReLA, gRefCOCO, 5,000 steps",
            Run("rela/grefcoco_5k"),
            {"grefcoco:val/cIoU": 28.49, "grefcoco:val/gIoU": 17.33},
        ),
        Row(
            "ReLA + AML, gRefCOCO, 5,000 steps",
            Run("rela/grefcoco_5k_aml"),
            {"grefcoco:val/cIoU": 30.86, "grefcoco:val/gIoU": 21.08},
        ),
    ),
    (
        "It is not known which of the two schedules the paper used, so its number stands beside both. It compares AML "
        "on CARIS with MagNet, another model; the split is taken to be val.",
    ),
)


def _tau(dataset: str, tau: float, val: float, second: float | None) -> Row:
    recipe = f"paper/{dataset}_aml" + ("" if tau == 0.4 else f"_tau_{tau:g}")
    cells: dict[str, float | None] = {f"{dataset}:val/oIoU": val}
    if second is not None:
        cells[f"{dataset}:{SECOND[dataset]}/oIoU"] = second
    return Row(f"tau {tau:g}, {CLASSIC[dataset][0]}", Run(recipe), cells)


TABLE_4 = Table(
    ("table4", "table17"),
    "Tables 4, 17",
    "threshold tau",
    tuple(
        row
        for dataset, values in TAUS.items()
        for row in (
            _tau(dataset, 0, NO_TAU[dataset], None),
            *(_tau(dataset, tau, *numbers) for tau, numbers in values.items()),
        )
    ),
    ("tau 0 masks nothing: it is the baseline with another name.",),
)
DIMS = {1024: "paper/refcoco+_aml_dim_1024", 2048: AML, 4096: "paper/refcoco+_aml_dim_4096"}
TABLE_5 = Table(
    ("table5", "table8"),
    "Tables 5, 8",
    "dimension of the projections",
    (
        *(
            Row(str(dim), Run(DIMS[dim]), _on("refcoco+", "val", ("oIoU", "mIoU", "Pr@0.5", "Pr@0.9"), values))
            for dim, values in (
                (1024, (66.82, 70.83, 80.15, 36.27)),
                (2048, (67.37, 71.33, 80.82, 36.35)),
                (4096, (67.08, 71.21, 80.85, 36.22)),
            )
        ),
        *(
            Row(str(dim), Run(DIMS[dim]), {"JL error of the paper": error, "distortion bound": None}, "bound")
            for dim, error in ((1024, 0.2955), (2048, 0.2088), (4096, 0.1478))
        ),
    ),
    (
        "The bound (Johnson-Lindenstrauss) is the epsilon that all squared distances between the patches and tokens of "
        "one sample keep to with probability 0.95. It covers distances inside a modality and of concatenated pairs, "
        "not inner products across modalities.",
        "The paper's JL error is another formula: its three values are sqrt(89.4 / D) to 0.0002; the bound's constant "
        "depends on the number of points.",
    ),
)
TABLE_6 = Table(
    ("table6",),
    "Table 6",
    "features that are scored",
    tuple(
        Row(label, Run(recipe), _on("refcoco+", "val", PRECISIONS, values))
        for label, recipe, values in (
            ("CARIS", CARIS, (78.85, 71.76, 33.48, 65.54)),
            ("late", "paper/refcoco+_aml_features_late", (76.98, 69.67, 33.66, 63.35)),
            ("prediction", "paper/refcoco+_aml_features_pred", (79.57, 73.02, 35.40, 66.41)),
            ("early", AML, (80.82, 73.85, 36.35, 67.37)),
        )
    ),
)
TABLE_7 = Table(
    ("table7",),
    "Table 7",
    "projection, after one epoch",
    tuple(
        Row(label, Run(recipe, 1), _on("refcoco+", "val", PRECISIONS, values))
        for label, recipe, values in (
            ("CARIS", CARIS, (8.66, 2.70, 0.25, 20.24)),
            ("learnable", "paper/refcoco+_aml_projection_learnable", (10.36, 6.02, 0.92, 16.92)),
            ("random", AML, (17.35, 9.40, 1.33, 24.85)),
        )
    ),
    ("The paper has no row with projection `identity`; it needs encoders of one width.",),
)
TABLE_9 = Table(
    ("table9",),
    "Table 9",
    "cost of a training step with AML, relative to the step without",
    (
        Row("CARIS", Run(AML), {"time": 1.172, "memory": 1.049, "FLOPs": None}, "cost"),
        Row("DETRIS", Run("detris/refcoco+_aml"), {"time": 1.196, "memory": 1.053, "FLOPs": None}, "cost"),
    ),
    (
        "The paper measured epochs on an A800 with batch 16: CARIS 35,168 MB, 30.16 min, with AML 36,902 MB (+4.9 %) "
        "and 35.35 min (+17.2 %); DETRIS 12,206 MB and 27.03 min, with AML 12,860 MB (+5.3 %) and 32.34 min (+19.6 %). "
        "12,860 / 12,206 is 5.4 %.",
    ),
)


def _scores_at(epochs: Sequence[float], oiou: Sequence[float], miou: Sequence[float]) -> dict[str, float | None]:
    cells: dict[str, float | None] = {}
    for epoch, overall, mean in zip(epochs, oiou, miou, strict=True):
        cells |= {f"val/oIoU, epoch {epoch:g}": overall, f"val/mIoU, epoch {epoch:g}": mean}
    return cells


SAME_TIME = tuple(round(epoch / 1.172, 2) for epoch in (10, 30, 50))
"""Epochs of AML in the time of 10, 30 and 50 without it, at the paper's times."""
TABLE_10 = Table(
    ("table10",),
    "Table 10",
    "scores during training",
    (
        Row("CARIS", Run(CARIS), _scores_at((10, 30, 50), (60.2, 64.7, 65.5), (62.3, 68.3, 69.3)), "log"),
        Row(
            "CARIS + AML, same time",
            Run(AML),
            _scores_at(SAME_TIME, (61.8, 65.3, 66.7), (64.2, 69.5, 70.8)),
            "log",
        ),
        Row(
            "CARIS + AML, same steps", Run(AML), _scores_at((10, 30, 50), (63.8, 66.1, 67.4), (65.4, 70.1, 71.3)), "log"
        ),
    ),
    (
        "Same time: the evaluation nearest to the epoch that AML reaches in the time of 10, 30 and 50 plain ones at "
        "the paper's 1.172 times the time, on the schedule of fifty.",
    ),
)
TABLE_12 = Table(
    ("table12",),
    "Table 12",
    "alignment scores during training",
    (
        Row(
            "CARIS + AML",
            FIRST_TEN[1],
            {key: value for name, values in ALIGNMENT.items() for key, value in _epochs(name, TEN, values).items()},
            "alignment",
        ),
        Row(
            "CARIS + AML",
            FIRST_TEN[1],
            {f"above_{limit}, epoch {epoch}": None for limit in (0.5, 0.9) for epoch in (1, 10)},
            "alignment",
        ),
        Row(
            "shares of the paper, thresholds not known",
            NOT_TRAINED,
            {key: value for name, values in SHARE_ROWS.items() for key, value in _epochs(name, TEN, values).items()},
            "published",
        ),
        Row("CARIS", FIRST_TEN[0], {f"{s}, epoch {e}": None for s in SCORES for e in (1, 10)}, "alignment"),
    ),
    (
        "The same pairs at every epoch, one temperature, solved on the untrained model. A rise of the mean does not "
        "show grounding: it comes without any (docs/aml.md).",
    ),
)
TABLE_13 = Table(
    ("table13",),
    "Table 13",
    "share of the referents in patches scored below tau",
    (
        Row(
            "CARIS + AML",
            FIRST_TEN[1],
            {
                key: value
                for tau, values in COVERAGE.items()
                for key, value in _epochs(f"referent_below_{tau}", range(11), values).items()
            },
            "alignment",
        ),
        Row(
            "CARIS",
            FIRST_TEN[0],
            {f"referent_below_{tau}, epoch {epoch}": None for tau in COVERAGE for epoch in (0, 10)},
            "alignment",
        ),
    ),
    ("The same pairs and temperature as in Table 12.",),
)
TABLE_14 = Table(
    ("table14",),
    "Table 14",
    "training loss",
    (
        Row("CARIS", Run(CARIS), _epochs("epoch_loss", LOSS_EPOCHS, LOSSES[CARIS]), "log"),
        Row("CARIS + AML", Run(AML), _epochs("epoch_loss", LOSS_EPOCHS, LOSSES[AML]), "log"),
        Row("CARIS, images without masks", FIRST_TEN[0], {"loss, epoch 1": None, "loss, epoch 9": None}, "losses"),
        Row(
            "CARIS + AML, images without masks", FIRST_TEN[1], {"loss, epoch 1": None, "loss, epoch 9": None}, "losses"
        ),
    ),
    (
        "Every step's loss is on masked images with AML and on whole ones without, so the first two rows do not "
        "compare models. The last two do: one fixed set of training pairs, whole images, evaluation mode.",
    ),
)
TABLE_15 = Table(
    ("table15",),
    "Table 15",
    "seven perturbations of the test image",
    tuple(
        Row(
            label,
            Run(recipe),
            {
                f"{dataset}:val/{metric}, {name}": value
                for dataset, rows in PERTURBED[recipe].items()
                for name, values in rows.items()
                for metric, value in zip(("mIoU", "oIoU", "Pr@0.5"), values, strict=True)
            },
            "robustness",
        )
        for label, recipe in (("CARIS", CARIS), ("CARIS + AML", AML))
    ),
    (
        "Trained on RefCOCO+. The paper does not give its factors nor, as far as we know, its split: ours are in "
        "docs/evaluation.md, and the split is val.",
    ),
)


def _rho_recipe(tau: float, rho: float) -> str:
    return AML + ("" if tau == 0.4 else f"_tau_{tau:g}") + ("" if rho == 0.25 else f"_rho_{rho:g}")


TABLE_16 = Table(
    ("table16",),
    "Table 16",
    "share rho, RefCOCO+ testB",
    (
        Row("CARIS", Run(CARIS), _on("refcoco+", "testB", FIVE, (62.69, 57.97, 70.24, 62.41, 31.27))),
        *(
            Row(f"tau {tau:g}, rho {rho:g}", Run(_rho_recipe(tau, rho)), _on("refcoco+", "testB", FIVE, values))
            for (tau, rho), values in RHOS.items()
        ),
        *(
            Row(
                f"tau 0.4, rho {rho:g} of blocks",
                Run(f"paper/refcoco+_aml_selection_patch{end}"),
                _on("refcoco+", "testB", FIVE, (None,) * 5),
            )
            for rho, end in ((0.1, "_rho_0.1"), (0.25, ""), (0.5, "_rho_0.5"))
        ),
    ),
    (
        "With a share of pixels rho changes nothing: 0.030 of the image is masked at 0.1, 0.25 and 0.5 (docs/aml.md). "
        "Which setting a row of the paper has is inferred from their order.",
    ),
)
TABLE_18 = Table(
    ("table18",),
    "Table 18",
    "what is masked",
    (
        Row("CARIS", Run(CARIS), _val(65.54, testA=71.86, testB=57.97)),
        Row("features", Run("paper/refcoco+_aml_level_feature"), _val(66.34, testA=71.21, testB=58.32)),
        Row("random blocks", Run("paper/refcoco+_aml_level_random"), _val(None, testA=None, testB=None)),
        Row("blocks of the image", Run(AML), _val(67.37, testA=73.19, testB=59.51)),
    ),
    ("Random blocks take their number from the scores of their own run: they are no control of equal share.",),
)
FIGURE_4A = Table(
    ("figure4a", "figure5"),
    "Figures 4a, 5",
    "activation maps",
    tuple(
        Row(label, Run(recipe), {"positive in truth": None, "positive outside": None}, "activation")
        for label, recipe in (("CARIS", CARIS), ("random", "paper/refcoco+_aml_level_random"), ("AML", AML))
    ),
    ("The pictures are next to this table's results; the numbers are shares of the pixels, in percent.",),
)
FIGURE_4B = Table(
    ("figure4b",),
    "Figure 4b",
    "occlusion of the test image",
    tuple(
        Row(
            label,
            Run(recipe),
            {f"refcoco+:testA/oIoU, {cell}": None for cell in ("0 %", "drop at 30 %", "drop at 50 %")},
            "occlusion",
        )
        for label, recipe in (
            ("CARIS", CARIS),
            ("random blocks", "paper/refcoco+_aml_level_random"),
            ("CARIS + AML", AML),
        )
    ),
    ("The paper reports a drop of 9.4 on testA without AML and of 3.7 with it; at which share is not known to us.",),
)
FIGURE_6 = Table(
    ("figure6",),
    "Figure 6",
    "histogram of the alignment scores",
    tuple(
        Row(label, Run(recipe), dict.fromkeys(SCORES), "histogram")
        for label, recipe in (("CARIS", CARIS), ("CARIS + AML", AML))
    ),
    ("The temperature is solved for each model on its own, so that both means start from 0.75.",),
)
TABLES = (
    *(MAIN, COMBINED, TABLE_2, GRES, TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7, TABLE_9, TABLE_10, TABLE_12),
    *(TABLE_13, TABLE_14, TABLE_15, TABLE_16, TABLE_18, FIGURE_4A, FIGURE_4B, FIGURE_6),
)
BY_NAME = {name: table for table in TABLES for name in table.names}


def find_tables(names: Sequence[str]) -> list[Table]:
    """Tables by their names, each once; "all": every one. Raises UserError for an unknown name."""
    for name in names:
        if name not in BY_NAME and name != "all":
            raise unknown_name("table", name, [*BY_NAME, "all"])
    wanted = list(BY_NAME) if "all" in names else names
    return list({BY_NAME[name].name: BY_NAME[name] for name in wanted}.values())
