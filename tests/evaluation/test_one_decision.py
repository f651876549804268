"""One sample has one mask and one number, whoever shows it: evaluation, predictor, figures, report, the ONNX script."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from amltrain.commands.evaluate import main as evaluate
from amltrain.config.schema import DataConfig, EvaluationConfig
from amltrain.data.loaders import build_eval_loaders, build_tokenizer
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.hub.model_folder import load_pretrained, save_pretrained
from amltrain.inference.export import export_folder
from amltrain.inference.predictor import Predictor
from amltrain.models import create_model, model_info
from amltrain.paper.analyse import main as analyse
from amltrain.report.collect import choose, predict_cards, sample_rows

SAMPLES = (0, 7, 20)


@pytest.fixture(scope="module", params=["caris_tiny", "rela_tiny says nothing", "rela_tiny"])
def folder(request: pytest.FixtureRequest, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose masks are neither empty nor full; with a head, one that always says "nothing"."""
    name, _, mood = request.param.partition(" ")
    info, folder = model_info(name), tmp_path_factory.mktemp("decision") / "model"
    tokenizer = build_tokenizer(DataConfig(datasets=["refshapes"], prepared=str(shapes)), info.preprocess)
    kwargs = {"vocab_size": tokenizer.vocab_size}
    torch.manual_seed(3)
    model = create_model(name, **kwargs)
    heads = [module for path, module in model.named_modules() if "no_target" in path]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters(recurse=False):
                if parameter.shape == (2,):
                    parameter.copy_(torch.tensor([-50.0, 50.0]) * (1 if mood else -1))
    save_pretrained(
        folder, name=name, kwargs=kwargs, preprocess=info.preprocess, state_dict=model.state_dict(),
        protocol=info.protocol, tokenizer=tokenizer,
    )  # fmt: skip
    return folder


def test_everyone_gives_the_same(folder: Path, shapes: Path, tmp_path: Path) -> None:
    pretrained = load_pretrained(folder)
    assert pretrained.tokenizer is not None
    data = DataConfig(datasets=["refshapes"], prepared=str(shapes), workers=0)
    loader = build_eval_loaders(
        data, pretrained.preprocess, EvaluationConfig(), pretrained.protocol, pretrained.tokenizer, seed=0
    )["val"]
    at_original = replace(pretrained.protocol, frame="original")
    shown_loader = build_eval_loaders(
        data, pretrained.preprocess, EvaluationConfig(), at_original, pretrained.tokenizer, seed=0
    )["val"]
    dataset, accelerator = loader.dataset, Accelerator(cpu=True)
    results = evaluate_model(
        accelerator, pretrained.model, loader, pretrained.protocol, pictures=len(dataset), provenance={}
    )
    kept = {p.sample_id: p.mask for p in results.predictions}
    rows = sample_rows(results, dataset)
    numbers = dict(zip(rows.sample_id.tolist(), rows.iou.tolist(), strict=True))

    evaluate(["--checkpoint", str(folder), "--data.datasets", "[refshapes]", "--data.prepared", str(shapes), "--output",
              str(tmp_path / "evaluation")])  # fmt: skip
    [file] = (tmp_path / "evaluation" / "samples").glob("*.parquet")
    table = pq.read_table(file).to_pydict()
    assert dict(zip(table["sample_id"], table["iou"], strict=True)) == numbers

    analyse(["pictures", "--models", f"m={folder}", "--datasets", "refshapes", "--prepared", str(shapes), "--workers",
             "0", "--output", str(tmp_path / "pictures"), "--samples", *map(str, SAMPLES)])  # fmt: skip
    shown = (tmp_path / "pictures" / "pictures.md").read_text().splitlines()
    for sample in SAMPLES:
        rows_of = [[cell.strip() for cell in line.split("|")] for line in shown]
        [row] = [row for row in rows_of if row[2:3] == [str(sample)]]
        assert row[-2] == f"{100 * numbers[sample]:.1f}"

    predictor = Predictor(pretrained)
    picked = choose(rows, 0, 0, chosen=SAMPLES)
    collected = predict_cards(
        accelerator, pretrained.model, shown_loader, pretrained.protocol, rows, picked, None, batch_size=4, side=64
    )
    cards = {card.sample_id: card for card in collected}
    for sample in SAMPLES:
        info = dataset.info(sample)
        [found] = predictor(dataset.picture(sample), info.sentence)
        assert np.array_equal(found.mask, kept[sample])
        assert cards[sample].iou == numbers[sample]
        assert ("no target" in cards[sample].note) == bool(table["predicted_no_target"][sample])


def test_the_onnx_script_gives_the_mask_of_the_predictor(folder: Path, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pretrained = load_pretrained(folder)
    export_folder(pretrained, tmp_path / "out", ["onnx"], runs=1)
    settings = json.loads((tmp_path / "out" / "export.json").read_text())
    assert settings["no_target_pixels"] == pretrained.protocol.no_target_pixels
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    picture.save(tmp_path / "scene.png")
    script = [
        sys.executable,
        "-P",
        str(tmp_path / "out" / "run_onnx.py"),
        str(tmp_path / "scene.png"),
        "the red circle",
    ]
    subprocess.run([*script, str(tmp_path / "mask.png")], check=True, capture_output=True)
    [found] = Predictor(pretrained)(tmp_path / "scene.png", "the red circle")
    differ = np.asarray(Image.open(tmp_path / "mask.png")) > 0
    assert np.mean(differ != found.mask) < 0.002
